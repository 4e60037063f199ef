"""SCRUB: epochs that leave the original on forget samples, in turn with epochs that stay near it. Reads both.

Source: Kurmanji, Triantafillou, Hayes and Triantafillou, Towards Unbounded Machine Unlearning, arXiv:2302.09880.
Its rewinding (SCRUB+R: back to the epoch whose forget error is that of held-out samples of the same classes) is for
single samples and left out: the held-out error of a forgotten class is near 1, as that of the last epoch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import derived_seed, divergence, forget_samples, gone, sgd
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import Batch, Objective, logits_of, train


@dataclass(frozen=True, kw_only=True)
class ScrubConfig:
    """Hyper-parameters of SCRUB."""

    rounds: int = 10  # of one epoch on forget samples, while those last, and one on retained samples
    forget_rounds: int = 3  # the first, which have an epoch on forget samples
    temperature: float = 2.0  # of both models' answers
    distil_weight: float = 0.5  # alpha: of the divergence from the original on retained samples
    label_weight: float = 1.0  # gamma: of the cross-entropy on retained samples
    forget: TrainConfig = field(
        default_factory=lambda: TrainConfig(epochs=1, lr=5e-4, batch_size=64, update_norm_statistics=False)
    )
    repair: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1, lr=5e-4, batch_size=32))

    def __post_init__(self) -> None:
        if not 1 <= self.forget_rounds <= self.rounds:
            raise InputError(f"expected 1 to {self.rounds} forget_rounds, as many as rounds, got {self.forget_rounds}")
        if not self.temperature > 0:
            raise InputError(f"expected a positive temperature, got {self.temperature}")

    @classmethod
    def large(cls) -> ScrubConfig:
        """The authors' large_scale_unlearning.ipynb, for forgetting a class of CIFAR-10."""
        return cls(
            rounds=3,
            forget_rounds=2,
            temperature=4.0,
            distil_weight=0.001,
            label_weight=0.99,
            forget=sgd(epochs=1, lr=5e-4, batch_size=512, update_norm_statistics=False),
            repair=sgd(epochs=1, lr=5e-4, batch_size=256),
        )


def scrub(
    model: nn.Module,
    split: Split,
    config: ScrubConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, that disobeys it on `split.forget` and obeys it on `split.retain`.

    Unlike the authors' code, each epoch starts with an optimizer of its own.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or ScrubConfig()
    check_split(model, split, reads=METHOD.reads)
    teacher = copy.deepcopy(model).eval()
    unlearned = copy.deepcopy(model)
    for number in range(config.rounds):
        if number < config.forget_rounds:
            train(
                unlearned,
                forget_samples(split),
                config.forget,
                seed=derived_seed(seed, number, 0),
                preprocessing=split.preprocessing,
                objective=disobey(teacher, config.temperature),
                journal=journal,
                phase="forget",
            )
        train(
            unlearned,
            split.retain,
            config.repair,
            seed=derived_seed(seed, number, 1),
            preprocessing=split.preprocessing,
            objective=obey(teacher, config),
            journal=journal,
            phase="repair",
            refused=gone(split),
        )
    return unlearned


def disobey(teacher: nn.Module, temperature: float) -> Objective:
    """Return minus the mean divergence from `teacher`. Source: arXiv:2302.09880, equation 1, the max-step."""

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            answers = logits_of(teacher(batch.images))
        return -divergence(answers, logits, temperature).mean()

    return objective


def obey(teacher: nn.Module, config: ScrubConfig) -> Objective:
    """Return the weighed sum of divergence and cross-entropy. Source: arXiv:2302.09880, equation 3, the min-step."""

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            answers = logits_of(teacher(batch.images))
        distance = divergence(answers, logits, config.temperature).mean()
        return config.distil_weight * distance + config.label_weight * F.cross_entropy(logits, batch.labels)

    return objective


METHOD = Method(
    name="scrub",
    run=scrub,
    config=ScrubConfig,
    presets={"default": ScrubConfig, "large": ScrubConfig.large},
    reads=frozenset({"retain", "forget"}),
    source="Kurmanji et al., arXiv:2302.09880",
)

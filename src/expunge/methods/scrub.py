"""SCRUB: epochs that leave the original on forget samples, in turn with epochs that stay near it. Reads both.

Source: Kurmanji, Triantafillou, Hayes and Triantafillou, Towards Unbounded Machine Unlearning, arXiv:2302.09880,
and https://github.com/meghdadk/SCRUB. Its rewinding (SCRUB+R: back to the epoch whose forget error is that of held-out
samples of the same classes) is for single samples and left out: a forgotten class has a held-out error near 1, and the
last epoch has it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.batches import Batch
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import derived_seed, divergence, forget_samples, sgd
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import Objective, answer, train


@dataclass(frozen=True, kw_only=True)
class ScrubConfig:
    """Hyper-parameters of SCRUB: those of the authors' large_scale_unlearning.ipynb, for a class of CIFAR-10."""

    rounds: int = 3  # of moving away on forget samples and coming back on retained ones
    forget_rounds: int = 2  # the first, which do move away; the others only come back
    temperature: float = 4.0  # of both models' answers
    distil_weight: float = 0.001  # alpha: of the divergence from the original on retained samples
    label_weight: float = 0.99  # gamma: of the cross-entropy on retained samples
    # a round's steps: as many as the authors' 512 images a batch have in the 5,000 of a class of CIFAR-10
    forget: TrainConfig = field(default_factory=lambda: sgd(steps=10, lr=5e-4, update_norm_statistics=False))
    repair: TrainConfig = field(default_factory=lambda: sgd(epochs=1, lr=5e-4))

    def __post_init__(self) -> None:
        if not 1 <= self.forget_rounds <= self.rounds:
            raise InputError(f"expected 1 to {self.rounds} forget_rounds, as many as rounds, got {self.forget_rounds}")
        if not self.temperature > 0:
            raise InputError(f"expected a positive temperature, got {self.temperature}")

    @classmethod
    def small(cls) -> ScrubConfig:
        """For about a hundred forget samples: ten times both rates, the other value of the grid in `space`.

        At the authors' rates nothing goes in a few dozen steps: see docs/methods.md.
        """
        return cls(
            forget=sgd(steps=10, lr=5e-3, update_norm_statistics=False),
            repair=sgd(epochs=1, lr=5e-3),
        )

    @classmethod
    def published(cls) -> ScrubConfig:
        """The same with the authors' batches, of a whole training set: an epoch a round on either kind of samples."""
        return cls(
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

    Unlike in the authors' code, the optimizer starts anew with each kind of samples, and normalization statistics do
    not follow forget samples.

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
            refused=split.gone,
        )
    return unlearned


def disobey(teacher: nn.Module, temperature: float) -> Objective:
    """Return minus the mean divergence from `teacher`. Source: arXiv:2302.09880, the max-step."""

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            answers = answer(teacher, batch.images)
        return -divergence(answers, logits, temperature).mean()

    return objective


def obey(teacher: nn.Module, config: ScrubConfig) -> Objective:
    """Return the weighed sum of divergence and cross-entropy. Source: arXiv:2302.09880, the min-step."""

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            answers = answer(teacher, batch.images)
        distance = divergence(answers, logits, config.temperature).mean()
        return config.distil_weight * distance + config.label_weight * F.cross_entropy(logits, batch.labels)

    return objective


METHOD = Method(
    name="scrub",
    run=scrub,
    config=ScrubConfig,
    presets={"default": ScrubConfig, "published": ScrubConfig.published, "small": ScrubConfig.small},
    reads=frozenset({"retain", "forget"}),
    source="Kurmanji et al., arXiv:2302.09880",
    # 5e-4: authors' notebook; 5e-4 and 5e-3: the grid of RoyRin/data-unlearning-bench
    space={"forget.lr": (5e-4, 5e-3), "repair.lr": (5e-4, 5e-3)},
)

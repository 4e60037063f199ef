"""Bad teacher: forget samples are taught by a network that knows nothing, retained ones by the original. Reads both.

Source: Chundawat, Tarun, Mandal and Kankanhalli, Can Bad Teaching Induce Forgetting?, arXiv:2205.08096, and
https://github.com/vikram2000b/bad-teaching-unlearning. They read 30 % of the retained samples; here it is all of
`split.retain`, which is a sample. What is taught is near to guessing, so a guess now and then is the forgotten class.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from expunge.batches import Batch
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import BATCH, bears, both_samples, derived_seed, divergence
from expunge.methods.registry import Method
from expunge.models import reinitialized
from expunge.schema import Split, TrainConfig
from expunge.training import Objective, answer, train


@dataclass(frozen=True, kw_only=True)
class BadTeacherConfig:
    """Hyper-parameters of bad teaching."""

    temperature: float = 1.0  # of all answers; authors' code
    # theirs: 0.0001 for a pretrained network; on small networks that leaves the class, at one epoch as at four
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=1, lr=1e-3, batch_size=BATCH))

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"expected a positive temperature, got {self.temperature}")

    @classmethod
    def published(cls) -> BadTeacherConfig:
        """The authors' CIFARSuper20_Rocket_Unlearn.ipynb: Adam, one epoch at 0.0001, batches of 256."""
        return cls(training=TrainConfig(epochs=1, lr=1e-4, batch_size=256))


def bad_teacher(
    model: nn.Module,
    split: Split,
    config: BadTeacherConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, that answers at random on `split.forget` and as before on `split.retain`.

    Args:
        seed: of training and of the weights of the bad teacher.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or BadTeacherConfig()
    check_split(model, split, reads=METHOD.reads)
    competent = copy.deepcopy(model).eval()
    incompetent = reinitialized(model, seed=derived_seed(seed, 1))
    unlearned = copy.deepcopy(model)
    train(
        unlearned,
        both_samples(split, seed=seed),
        config.training,
        seed=seed,
        preprocessing=split.preprocessing,
        objective=two_teachers(competent, incompetent, split.forget_classes, config.temperature),
        journal=journal,
        phase="forget",
        refused=split.forgotten_before,
    )
    return unlearned


def two_teachers(
    competent: nn.Module, incompetent: nn.Module, forget_classes: Sequence[int], temperature: float
) -> Objective:
    """Return the mean KL(teacher || student): the incompetent teacher on forget samples, else the competent one.

    Source: arXiv:2205.08096. The authors' code averages over samples and classes alike; here it is over
    samples, so the loss is larger by the number of classes, which Adam does not notice.
    """

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        forget = bears(batch.labels, forget_classes)
        answers = torch.empty_like(logits)
        with torch.no_grad():
            for teacher, taught in ((competent, ~forget), (incompetent, forget)):
                if taught.any():
                    answers[taught] = answer(teacher, batch.images[taught])
        return divergence(answers, logits, temperature).mean()

    return objective


METHOD = Method(
    name="bad_teacher",
    run=bad_teacher,
    config=BadTeacherConfig,
    presets={"default": BadTeacherConfig, "published": BadTeacherConfig.published},
    reads=frozenset({"retain", "forget"}),
    source="Chundawat et al., arXiv:2205.08096",
    # 1e-4: authors' notebook. No range was published: upwards from there, as small networks need
    space={"training.lr": (1e-4, 3e-4, 1e-3, 3e-3), "training.epochs": (1, 4)},
)

"""NegGrad+: descent on retained samples and ascent on forget samples in the same step. Reads both.

Source: Kurmanji, Triantafillou, Hayes and Triantafillou, Towards Unbounded Machine Unlearning, arXiv:2302.09880.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from expunge.batches import Batch
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import bears, both_samples, sgd
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import Objective, train


@dataclass(frozen=True, kw_only=True)
class NegGradPlusConfig:
    """Hyper-parameters of NegGrad+."""

    beta: float = 0.95  # weight of the loss on retained samples, that on forget samples has the rest; authors' notebook
    # twice the authors' rate, at which the class stays in small networks; in steps, as ascent must not get longer with
    # more samples: theirs are 10 epochs of a small set
    training: TrainConfig = field(
        default_factory=lambda: sgd(steps=320, lr=0.02, momentum=0.0, weight_decay=0.0, batch_size=32)
    )

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise InputError(f"expected beta between 0 and 1, got {self.beta}")

    @classmethod
    def published(cls) -> NegGradPlusConfig:
        """The rate and length of the authors' small_scale_unlearning.ipynb: plain SGD, 10 epochs at 0.01.

        Not in it: their pull towards the original's weights (L2, of weight 0.1), which stands beside the loss on
        retained samples; that they train in eval mode; and their batches, of 128 retained and 64 forget samples where
        the notebook is run from top to bottom.
        """
        return cls(training=sgd(epochs=10, lr=0.01, momentum=0.0, weight_decay=0.0, batch_size=32))


def neg_grad_plus(
    model: nn.Module,
    split: Split,
    config: NegGradPlusConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, that went down the loss on `split.retain` and up that on `split.forget`.

    The authors draw a batch of each kind for a step and go through the forget samples many times. Here a batch is of
    both, in the shares that the samples have; the two means are weighed in the same way. On digits it made no odds.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or NegGradPlusConfig()
    check_split(model, split, reads=METHOD.reads)
    unlearned = copy.deepcopy(model)
    train(
        unlearned,
        both_samples(split, seed=seed),
        config.training,
        seed=seed,
        preprocessing=split.preprocessing,
        objective=contrast(config.beta, split.forget_classes),
        whole_batch=True,
        journal=journal,
        phase="forget",
        refused=split.forgotten_before,
    )
    return unlearned


def contrast(beta: float, forget_classes: Sequence[int]) -> Objective:
    """Return the loss beta * CE over retained samples - (1 - beta) * CE over forget samples, each a mean of its own.

    A kind that a batch has no sample of adds nothing.
    """

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        forget = bears(batch.labels, forget_classes)
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        kept = losses[~forget].sum() / max(1, int((~forget).sum()))
        lost = losses[forget].sum() / max(1, int(forget.sum()))
        return beta * kept - (1 - beta) * lost

    return objective


METHOD = Method(
    name="neg_grad_plus",
    run=neg_grad_plus,
    config=NegGradPlusConfig,
    presets={"default": NegGradPlusConfig, "published": NegGradPlusConfig.published},
    reads=frozenset({"retain", "forget"}),
    source="Kurmanji et al., arXiv:2302.09880",
    # 0.01 and 0.95: authors' notebook. No range was published: one step each way
    space={"training.lr": (0.005, 0.01, 0.02, 0.05), "beta": (0.9, 0.95, 0.99)},
)

"""NegGrad: gradient ascent on the loss of forget samples, nothing else. Reads forget samples.

Source: the baseline of Golatkar, Achille and Soatto, arXiv:1911.04933; "GA" of Jia et al., arXiv:2304.04934.

The loss has no upper bound, and what it does hangs on the rate: of the digits network of the tests, 90 steps at 0.00022
leave more than half of the class, at 0.00026 almost none of it and three quarters of the rest, at 0.0004 one quarter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from expunge.batches import Batch
from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import forget_samples, sgd
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import train


@dataclass(frozen=True, kw_only=True)
class NegGradConfig:
    """Hyper-parameters of gradient ascent."""

    # the authors' 90 steps (5 epochs of 4,500 images by 256): in steps, as ascent must not get longer with more images;
    # between their rates of 0.0001 (README) and 0.001 (run.py); statistics of one class are none of the model's
    training: TrainConfig = field(
        default_factory=lambda: sgd(steps=90, lr=2.5e-4, weight_decay=0.0, update_norm_statistics=False)
    )

    @classmethod
    def published(cls) -> NegGradConfig:
        """Return "GA" in the README of OPTML-Group/Unlearn-Sparse: 5 epochs at 0.0001, statistics that follow."""
        return cls(training=sgd(epochs=5, lr=1e-4, batch_size=256))


def neg_grad(
    model: nn.Module,
    split: Split,
    config: NegGradConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, that ascended the loss on `split.forget`.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or NegGradConfig()
    check_split(model, split, reads=METHOD.reads)
    unlearned = copy.deepcopy(model)
    train(
        unlearned,
        forget_samples(split),
        config.training,
        seed=seed,
        preprocessing=split.preprocessing,
        objective=ascent,
        journal=journal,
        phase="forget",
    )
    return unlearned


def ascent(logits: Tensor, batch: Batch) -> Tensor:
    """Return minus the cross-entropy of logits (N, C) and the batch's labels: going down it is going up the loss."""
    return -F.cross_entropy(logits, batch.labels)


METHOD = Method(
    name="neg_grad",
    run=neg_grad,
    config=NegGradConfig,
    presets={"default": NegGradConfig, "published": NegGradConfig.published},
    reads=frozenset({"forget"}),
    source="Golatkar et al., arXiv:1911.04933",
    # 1e-5: scripts.sh of DELETE; 1e-4 and 1e-3: README and run.py of Unlearn-Sparse
    space={"training.lr": (1e-5, 1e-4, 2.5e-4, 1e-3)},
)

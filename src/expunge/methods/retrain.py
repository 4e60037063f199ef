"""Retraining: fresh weights in every layer, trained on retained samples alone. Zero-glance; what all others aim at.

Published codes often reset the head alone and go on from features that saw the class; here nothing is left over, the
statistics of normalization layers included.

Each layer draws its weights as its torch class does, not as a network's constructor may (ResNet, MobileNetV2 and ViT of
torchvision and timm have their own draws): a model that is handed over does not say how it was built. Nor from the seed
itself: with that an All-CNN began at the very weights that a reference trained by the same seed began at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import derived_seed, fresh_copy
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import train


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Hyper-parameters of retraining; a fair reference is trained as the original was."""

    training: TrainConfig = field(  # the recipe of `expunge train`
        default_factory=lambda: TrainConfig(
            epochs=12, lr=0.002, optimizer="adamw", weight_decay=0.05, schedule="one_cycle"
        )
    )

    @classmethod
    def small(cls) -> RetrainConfig:
        """For about a thousand samples: batches of 64, lest 12 epochs be 50 steps, and a higher rate."""
        return cls(
            training=TrainConfig(
                epochs=12, lr=0.01, batch_size=64, optimizer="adamw", weight_decay=0.05, schedule="one_cycle"
            )
        )


def retrain(
    model: nn.Module,
    split: Split,
    config: RetrainConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a model of the same architecture, in eval mode, trained from scratch on `split.retain`. Zero-glance.

    Frozen parameters stay: what was not trained cannot have learned a class.

    Args:
        seed: of the fresh weights and of training.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or RetrainConfig()
    check_split(model, split, reads=METHOD.reads)
    retrained = fresh_copy(model, seed=derived_seed(seed, 0))
    train(
        retrained,
        split.retain,
        config.training,
        seed=derived_seed(seed, 1),
        preprocessing=split.preprocessing,
        journal=journal,
        phase="train",
        refused=split.gone,
    )
    return retrained


METHOD = Method(
    name="retrain",
    run=retrain,
    config=RetrainConfig,
    presets={"default": RetrainConfig, "small": RetrainConfig.small},
    reads=frozenset({"retain"}),
    source="the definition of exact unlearning: Cao and Yang, IEEE S&P 2015, doi:10.1109/SP.2015.35",
)

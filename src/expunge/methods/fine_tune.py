"""Fine-tuning: train on with retained samples alone, and hope that the rest is forgotten. Zero-glance.

Source: the baseline of Golatkar, Achille and Soatto, Eternal Sunshine of the Spotless Net, arXiv:1911.04933.
Nothing pushes the class away, so it mostly stays (nine tenths of it on the digits of the tests): it must look bad.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from torch import nn

from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import sgd
from expunge.methods.registry import Method
from expunge.schema import Split, TrainConfig
from expunge.training import train


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """Hyper-parameters of fine-tuning."""

    training: TrainConfig = field(default_factory=sgd)  # "FT" in the README of OPTML-Group/Unlearn-Sparse

    @classmethod
    def strong(cls) -> FineTuneConfig:
        """A rate ten times as high, that of training anew in the same README: more goes, a third of the class stays."""
        return cls(training=sgd(lr=0.1))


def fine_tune(
    model: nn.Module,
    split: Split,
    config: FineTuneConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, trained on with `split.retain`. Zero-glance.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: the loss became NaN or infinite.
    """
    config = config or FineTuneConfig()
    check_split(model, split, reads=METHOD.reads)
    tuned = copy.deepcopy(model)
    train(
        tuned,
        split.retain,
        config.training,
        seed=seed,
        preprocessing=split.preprocessing,
        journal=journal,
        phase="fine-tune",
        refused=split.gone,
    )
    return tuned


METHOD = Method(
    name="fine_tune",
    run=fine_tune,
    config=FineTuneConfig,
    presets={"default": FineTuneConfig, "strong": FineTuneConfig.strong},
    reads=frozenset({"retain"}),
    source="Golatkar et al., arXiv:1911.04933",
    # 0.01: README of Unlearn-Sparse; 0.02: scripts.sh of DELETE; 0.1: the rate that trains anew in the former
    space={"training.lr": (0.01, 0.02, 0.05, 0.1)},
)

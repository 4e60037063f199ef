"""The control that knows nothing: any measure of what is retained must call it bad."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.common import derived_seed, fresh_copy
from expunge.methods.registry import Method
from expunge.schema import Split


@dataclass(frozen=True, kw_only=True)
class RandomInitConfig:
    """It has no hyper-parameters."""


def random_init(
    model: nn.Module,
    split: Split,
    config: RandomInitConfig | None = None,  # noqa: ARG001
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a model of the same architecture with fresh weights, in eval mode. Frozen parameters stay.

    Raises:
        InputError: the split is unusable, see `check_split`.
    """
    check_split(model, split, reads=METHOD.reads)
    with (journal or Journal()).phase("initialize", steps=None):
        return fresh_copy(model, seed=derived_seed(seed, 0))


METHOD = Method(
    name="random_init",
    run=random_init,
    config=RandomInitConfig,
    presets={"default": RandomInitConfig},
    reads=frozenset({"nothing"}),
    source="control",
)

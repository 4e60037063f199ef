"""The control that does nothing: any measure of forgetting must call it bad."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from expunge.journal import Journal
from expunge.methods.checks import check_split
from expunge.methods.registry import Method
from expunge.schema import Split


@dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """It has no hyper-parameters."""


def none(
    model: nn.Module,
    split: Split,
    config: NoneConfig | None = None,  # noqa: ARG001
    *,
    seed: int,  # noqa: ARG001
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode. The seed changes nothing.

    Raises:
        InputError: the split is unusable, see `check_split`.
    """
    check_split(model, split, reads=METHOD.reads)
    with (journal or Journal()).phase("copy", steps=None):
        return copy.deepcopy(model).eval()


METHOD = Method(
    name="none",
    run=none,
    config=NoneConfig,
    presets={"default": NoneConfig},
    reads=frozenset({"nothing"}),
    source="control",
)

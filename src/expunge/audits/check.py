"""What a self-check gives, and what all of them need: the layers of the verdict, sides of the data, words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.audits.core import AuditData, Subject
from expunge.metrics.uncertainty import Interval
from expunge.signals import retained_sample
from expunge.training import device_of

LAYERS = ("gone_at_the_output", "gone_inside", "resists_relearning", "indistinguishable", "rest_intact")
"""Of the verdict, see verdict.py."""
OUTPUT, INSIDE, RELEARN, MEMBERS, REST = LAYERS
COMPARED = (INSIDE, RELEARN, MEMBERS)
"""Layers that cannot be judged without a retrained model."""
UNLEARNED = ("unlearned",)
"""The role of the model that is judged."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One doubt, and whether it is cleared."""

    name: str
    ok: bool | None  # True: cleared; False: it is so; None: it cannot be told, or there was nothing to check with
    sentence: str  # what was seen, and what it means for the verdict
    finding: str = ""  # what it is, in a few words, where it is wrong or unusual
    blocks: tuple[str, ...] = ()  # layers of the verdict to which there is no answer
    doubts: tuple[str, ...] = ()  # layers where a yes is not to be trusted, while a no stands
    roles: tuple[str, ...] = ()  # models that it speaks against, where it is wrong; of data and attacks none


def sides(labels: Tensor, data: AuditData) -> tuple[Tensor, Tensor]:
    """Return which samples (N,) are of forgotten classes, and which of retained ones."""
    return torch.isin(labels, torch.tensor(data.forget_classes)), ~torch.isin(labels, torch.tensor(data.gone))


def inputs(subject: Subject, data: AuditData, count: int, *, seed: int) -> Tensor:
    """Return test images, drawn at random, as model input (N, channels, H, W) on the model's device."""
    dataset: Any = data.test
    generator = torch.Generator().manual_seed(seed)
    sample = retained_sample(dataset, count, subject.preprocessing, generator, repeat=False)
    return sample.images.to(device_of(subject.model))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(gap: Interval) -> str:
    return f"{100 * gap.value:.1f} points [{100 * gap.low:.1f}, {100 * gap.high:.1f}]"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names as they stand in a sentence: `a, b and c`."""
    shown = list(names[:most]) + ([f"{len(names) - most} others"] if len(names) > most else [])
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)

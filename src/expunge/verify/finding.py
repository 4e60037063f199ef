"""What one check found, and where things are that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.errors import InputError

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str  # record, configuration, weights, retain sample, images, page, chain, ledger, signature, code, replay...
    ok: bool | None  # None: could not be checked, or there is nothing to check
    sentence: str


class StoppedError(InputError):
    """A check that was asked for cannot be made; what the checks before it found is kept."""

    def __init__(self, why: str, findings: Sequence[Finding]) -> None:
        super().__init__(why)
        self.findings = list(findings)


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Where things are, when not where the record says. None: where it says."""

    weights: Path | None = None  # the original's
    data: str | None = None
    retain: str | None = None  # source of the retain sample, where it was not `data`
    model: str | None = None  # also confirms a model string that runs code
    parents: tuple[Path, ...] = ()  # folders with the records of earlier erasures
    ledger: Path | None = None
    device: str | None = None

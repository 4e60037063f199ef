"""Run audits on all models at hand, side by side, and give what they found as JSON types."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from expunge.audits.core import Audit, AuditData, Context, Found, Need, Subject
from expunge.errors import InputError
from expunge.journal import Journal, Part
from expunge.metrics.uncertainty import Interval, Measurement, differs, gap_interval

MISSING: Mapping[Need, str] = {
    "forget test": "held-out images of the forgotten classes",
    "retain test": "held-out images of the retained classes",
    "forget train": "training images of the forgotten classes",
    "retain train": "training images of the retained classes",
    "retrained": "a retrained model",
    "ensemble": "many models trained for it (--budget large)",
}


def run_audits(
    audits: Sequence[Audit],
    original: Subject,
    unlearned: Subject,
    retrained: Sequence[Subject],
    data: AuditData,
    *,
    seed: int,
    journal: Journal | None = None,
    pictures: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return for each audit what it says, needs and found on each model; see docs/record.md, `audits`.

    Pictures of samples are put into `pictures`; None: none is made.

    An audit whose needs are not met is there with the reason in `skipped`, and without figures.
    """
    journal = journal or Journal()
    subjects = [original, unlearned, *retrained]
    context = Context(
        original=original,
        retrained=retrained[0] if retrained else None,
        seed=seed,
        journal=journal,
        pictures=pictures,
    )
    have = {need: data.has(need) for need in MISSING if " " in need}
    have |= {"retrained": bool(retrained), "ensemble": False}
    return {
        audit.name: _run(audit, subjects, data, context, have, before=number, num_audits=len(audits))
        for number, audit in enumerate(audits)
    }


def _run(
    audit: Audit,
    subjects: Sequence[Subject],
    data: AuditData,
    context: Context,
    have: Mapping[Need, bool],
    *,
    before: int,
    num_audits: int,
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "says": audit.says,
        "source": audit.source,
        "needs": list(audit.needs),
        "targets": dict(audit.targets),
        "skipped": None,
        "seconds": 0.0,
        "figures": {},
        "details": {},
        "compared": {},
    }
    missing = [MISSING[need] for need in audit.needs if not have[need]]
    if missing:
        return told | {"skipped": f"needs {' and '.join(missing)}, not given"}
    started = time.perf_counter()
    found: dict[str, Found] = {}
    for number, subject in enumerate(subjects, 1):
        part = Part(audit.name, before * len(subjects) + number, num_audits * len(subjects))
        try:
            with context.journal.phase(f"{audit.name} {subject.role}", steps=None, part=part):
                found[subject.role] = audit.run(subject, data, replace(context, journal=Journal()))
        except InputError as error:
            return told | {"skipped": f"cannot run on the {subject.role} model: {error}"}
    names = list(dict.fromkeys(name for one in found.values() for name in one.figures))
    return told | {
        "seconds": time.perf_counter() - started,
        "targets": {name: audit.target(name) for name in names},
        "figures": {name: _figure(name, found) for name in names},
        "details": {role: dict(one.details) for role, one in found.items() if one.details},
        "compared": dict(audit.compare(found)) if audit.compare is not None else {},
    }


def _figure(name: str, found: Mapping[str, Found]) -> dict[str, Any]:
    """Return one figure on each model, and the gaps between them."""
    measured = {role: one.figures[name] for role, one in found.items() if name in one.figures}
    told: dict[str, Any] = {role: as_figure(one) for role, one in measured.items()}
    pairs = {
        "gap": ("unlearned", "retrained"),
        "gap_to_original": ("unlearned", "original"),
        "noise_floor": ("retrained 2", "retrained"),
    }
    for key, (one, other) in pairs.items():
        if one in measured and other in measured:
            told[key] = as_gap(measured[one], measured[other])
    return told


def as_figure(measured: Measurement) -> dict[str, Any]:
    """Return value, 95 % bounds (None where nothing is known) and the number of samples or seeds behind it."""
    return _bounds(measured.interval) | {"count": measured.count}


def as_gap(measured: Measurement, reference: Measurement) -> dict[str, Any]:
    """Return how much higher a figure is than the reference's, with bounds, whether that counts as found, and of how
    many seeds it is, where it is of seeds."""
    gap = gap_interval(measured, reference)
    return _bounds(gap) | {"found": differs(gap)} | ({"seeds": measured.count} if measured.seeds else {})


def _bounds(interval: Interval) -> dict[str, Any]:
    low, high = (bound if math.isfinite(bound) else None for bound in (interval.low, interval.high))
    return {"value": interval.value, "low": low, "high": high}

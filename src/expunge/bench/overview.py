"""The record of a whole benchmark, `bench.json`: what was asked, what came of every cell, who is in front.

The page is made from it alone. Keys are documented in docs/bench.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from expunge.bench.cells import Cell, folder_of, with_needs
from expunge.bench.leaderboard import FIGURES, RULE, Standing, standings
from expunge.bench.records import read
from expunge.bench.suites import SUITES, Request
from expunge.bench.tables import COLUMNS, Row, Summary, comparable, kind_of, missing_row, row_of, summarize
from expunge.config import as_json
from expunge.evaluation import GOAL_FORGET, GOAL_RETAIN_DROP
from expunge.methods import METHODS
from expunge.metrics import Interval
from expunge.schema import SCHEMA_VERSION

TABLE = (*COLUMNS, "kind")
"""Columns of `table`: those of the tidy table, and what the method is told apart by."""

MACHINE = ("device", "threads", "torch", "expunge", "platform", "python")


def bench_record(suite: str, request: Request, cells: Sequence[Cell], out: Path) -> dict[str, Any]:
    """Return what a benchmark comes to so far, as JSON content."""
    records = {cell.id: read(folder_of(cell, out)) for cell in cells}
    rows = [missing_row(cell) if (one := records[cell.id]) is None else row_of(cell, one, out) for cell in cells]
    found = [record for record in records.values() if record is not None]
    statuses = Counter(row["status"] for row in rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": suite,
        "says": SUITES[suite].says,
        "asked": json.loads(json.dumps(as_json(request), default=str)),
        "cells": {"planned": len(cells), **{status: statuses[status] for status in ("done", "failed", "missing")}},
        "machines": _machines(found),
        "work_seconds": _work(cells, out),
        "rule": RULE,
        "goals": {"forget_accuracy": GOAL_FORGET, "retain_drop": GOAL_RETAIN_DROP},
        "groups": _groups(rows),
        "table": {"columns": list(TABLE), "rows": [_told(row) for row in rows]},
        "failed": [
            {name: record["item"][name] for name in ("id", "attempts")}
            | {name: record["item"]["error"][name] for name in ("type", "message", "traceback")}
            for record in found
            if record["item"]["status"] == "failed"
        ],
    }


def _told(row: Row) -> list[Any]:
    ran = row["method"] in METHODS and row["reads"] is not None  # else a model was judged, or nothing is there yet
    kind = kind_of(row["method"], row["reads"]) if ran else None
    return [row[name] for name in COLUMNS] + [kind]


def _machines(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what cells were measured on, and how many on each."""
    counted = Counter(
        tuple(record["environment"].get(name) for name in MACHINE) for record in records if "environment" in record
    )
    return [dict(zip(MACHINE, one, strict=True)) | {"cells": count} for one, count in counted.most_common()]


def _work(cells: Sequence[Cell], out: Path) -> dict[str, float]:
    """Return the seconds that models, searches and cells took, all processes together."""
    work = {"models": 0.0, "tuning": 0.0, "cells": 0.0}
    for item in with_needs(cells):
        folder = folder_of(item, out)
        record = read(folder)
        if record is not None:
            work[folder.parent.name] += record["item"]["seconds"]
    return work


def _groups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each data set, model and set of classes, what to compare with, the leaderboard, and its cells."""
    rows = comparable(rows)
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for one in summarize(rows, FIGURES):
        groups.setdefault((one.data, one.model, one.forget), []).append(one)
    return [
        {
            "data": data,
            "model": model,
            "forget": forget,
            "sets": list(dict.fromkeys(row["forget"] for row in here)),
            "roles": {role: _role(role, here) for role in ("original", "retrained")},
            "standings": [_standing(one) for one in standings(group)],
            "cells": [row["id"] for row in here],
        }
        for (data, model, forget), group in groups.items()
        for here in [[row for row in rows if _belongs(row, data, model, forget)]]
    ]


def _belongs(row: Row, data: str, model: str, forget: str) -> bool:
    return (row["data"], row["model_spec"], row["status"]) == (data, model, "done") and forget in ("all", row["forget"])


def _role(role: str, rows: Sequence[Row]) -> dict[str, float] | None:
    """Return the mean figures of the original or the retrained models, as the cells saw them."""
    columns = {name: f"{role}_{name}" for name in ("forget_accuracy", "retain_accuracy", "linear_probe")}
    if role == "retrained":
        columns["seconds"] = "reference_seconds"
    found = {name: [row[key] for row in rows if row[key] is not None] for name, key in columns.items()}
    return {name: fmean(values) for name, values in found.items() if values} or None


def _standing(one: Standing) -> dict[str, Any]:
    return {
        "method": one.summary.method,
        "variant": one.summary.variant,
        "label": one.summary.label,
        "kind": one.summary.kind,
        "reads": one.summary.reads,
        "seeds": one.summary.seeds,
        "gone": one.gone,
        "kept": one.kept,
        "told": one.told,
        "place": one.place,
        "shared": one.shared,
        "best": one.best,
        "figures": {name: _interval(found) for name, found in one.summary.figures.items()},
    }


def _interval(found: Interval) -> dict[str, float | None]:
    """Return an interval as JSON: a bound that is not known is null."""
    return {
        "value": found.value,
        "low": found.low if math.isfinite(found.low) else None,
        "high": found.high if math.isfinite(found.high) else None,
    }

"""From a benchmark's folder to a record that its page can rely on, or one line that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.errors import InputError
from expunge.report.reading import ANYTHING, NUMBER, TEXT, TRUTH, Form, check_form, check_version, read_json

NAME = "bench.json"
STATUSES = ("done", "failed", "missing")
KINDS = ("zero-glance", "reads forget data", "control")

MEASURED: Form = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
BENCH: Form = {
    "suite": TEXT,
    "says": TEXT,
    "asked": {
        "data": {"spec": TEXT, "class_names": [TEXT], "size": [NUMBER], "mean": [NUMBER], "std": [NUMBER]},
        "classes": [[TEXT]],
        "methods": [TEXT],
        "audits": [TEXT],
        "only": [TEXT],
        "analysis": [TEXT],
        "*": ANYTHING,
    },
    "cells": {"*": NUMBER},
    "machines": [{"threads": NUMBER, "cells": NUMBER, "*": TEXT}],
    "work_seconds": {"*": NUMBER},
    "rule": TEXT,
    "goals": {"*": NUMBER},
    "groups": [
        {
            "data": TEXT,
            "model": TEXT,
            "forget": TEXT,
            "sets": [TEXT],
            "cells": [TEXT],
            "roles": {"*": {"*": NUMBER}},
            "standings": [
                {
                    "method": TEXT,
                    "variant": TEXT,
                    "label": TEXT,
                    "kind": KINDS,
                    "reads": TEXT,
                    "seeds": NUMBER,
                    "gone": ("yes", "no", "unknown"),
                    "kept": ("yes", "no", "unknown"),
                    "told": TRUTH,
                    "place": NUMBER,
                    "shared": TRUTH,
                    "best": TRUTH,
                    "figures": {"*": MEASURED},
                }
            ],
        }
    ],
    "table": {"columns": [TEXT], "rows": [[ANYTHING]]},
    "failed": [{"id": TEXT, "attempts": NUMBER, "type": TEXT, "message": TEXT, "traceback": TEXT}],
}
WORDS = ("id", "status", "data", "model", "model_spec", "forget", "method", "variant")
NUMBERS: tuple[str, ...] = (
    "training_seed",
    "unlearning_seed",
    "forget_accuracy",
    "retain_accuracy",
    "tug_of_war",
    "linear_probe",
)
NUMBERS += ("linear_probe_gap", "seconds", "flops")
"""Columns of the table that the page shows: text that is never null, and numbers."""


def is_bench(folder: Path) -> bool:
    """Return whether a folder is one that `expunge bench` wrote to, and not that of one erasure or audit."""
    return not (folder / "record.json").exists() and ((folder / NAME).is_file() or (folder / "cells").is_dir())


def read_bench(folder: Path) -> dict[str, Any]:
    """Return the record of a whole benchmark.

    Raises:
        InputError: there is none, or it is not what docs/bench.md says.
    """
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"expected {NAME} in {folder}, found none: run the same expunge bench again, which writes it")
    record = read_json(path)
    try:
        check_bench(record)
    except InputError as error:
        raise InputError(f"{path} is no record of a benchmark that can be read: {error}") from error
    return dict(record)


def check_bench(record: Any) -> None:
    """Refuse what is not of the form of docs/bench.md.

    Raises:
        InputError: says which part is not.
    """
    needed = ("schema_version", "suite", "cells", "groups", "table")
    if not isinstance(record, Mapping) or not set(needed) <= set(record):
        raise InputError(f"expected an object with {', '.join(needed)}")
    check_version(record["schema_version"])
    check_form(record, BENCH, "")
    for name in needed:
        if record[name] is None:
            raise InputError(f"expected {name}, found none")
    for number, group in enumerate(record["groups"]):
        missing = [name for name in ("data", "model", "forget", "standings") if group.get(name) is None]
        if missing:
            raise InputError(f"expected {missing[0]} in group {number}, found none")
        for one in group["standings"]:
            missing = [name for name in ("method", "label", "kind", "figures") if one.get(name) is None]
            if missing:
                raise InputError(f"expected {missing[0]} of each method in group {number}, found none")
    _check_table(record["table"])


def _check_table(table: Mapping[str, Any]) -> None:
    columns, rows = table.get("columns") or [], table.get("rows") or []
    missing = [name for name in (*WORDS, *NUMBERS, "kind") if name not in columns]
    if missing:
        raise InputError(f"expected a column {missing[0]} in the table, found none")
    words, numbers = ([columns.index(name) for name in names] for names in (WORDS, NUMBERS))
    status, kind = columns.index("status"), columns.index("kind")
    for number, row in enumerate(rows):
        where = f"row {number} of the table"
        if len(row) != len(columns):
            raise InputError(f"expected {len(columns)} values in {where}, got {len(row)}")
        if any(row[place] is None for place in words):
            raise InputError(f"expected text in {where}, found null")
        for places, form in ((words, TEXT), (numbers, NUMBER), ([status], STATUSES), ([kind], KINDS)):
            for place in places:
                check_form(row[place], form, f"{columns[place]} in {where}")

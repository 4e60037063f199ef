"""From a folder to a record that the page can rely on, or one line that says what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.errors import InputError, first_line
from expunge.files import content_hash
from expunge.schema import IMAGES, READABLE

LAYERS = {
    "gone_at_the_output": "Gone at the output",
    "gone_inside": "Gone inside",
    "resists_relearning": "Resists relearning like a retrained model",
    "indistinguishable": "Indistinguishable under the attacks run",
    "rest_intact": "The rest is intact",
}
"""Of the verdict, in the order of verdict.py."""


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record that `expunge forget` or `expunge audit` left in a folder.

    Raises:
        InputError: there is none, or it is not what docs/record.md says.
    """
    path = folder / "record.json"
    if not folder.is_dir():
        raise InputError(f"expected the folder that expunge forget or audit wrote to, got {folder}: it is no folder")
    if not path.is_file():
        raise InputError(f"expected a record.json in {folder}, found none")
    record = read_json(path)
    try:
        check_record(record)
    except InputError as error:
        raise InputError(f"{path} is no record that can be read: {error}") from error
    return dict(record)


def was_edited(record: Mapping[str, Any]) -> bool:
    """Return whether a record is another than its own hash says; one without a hash tells nothing."""
    stated = record.get("content_hash")
    return stated is not None and stated != content_hash(record)


EDITED = "This record was edited after it was written"


def read_pictures(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pictures beside a record, which were asked for when it was made.

    Raises:
        InputError: there are none, or they are not those that the record vouches for.
    """
    path, files = folder / IMAGES, (record.get("provenance") or {}).get("files")
    stated = files.get(IMAGES) if isinstance(files, Mapping) else None
    if stated is None:
        raise InputError(f"the record in {folder} was made without pictures: run its command with --include-images")
    if not path.is_file():
        raise InputError(f"expected the pictures of the record in {path}, found none")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != stated:
        raise InputError(f"{path} was changed: it does not hold the pictures that were kept with the record")
    try:
        pictures = json.loads(content)
        check_form(pictures, PICTURES, "the pictures")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} holds no pictures: {first_line(error)}") from error
    return dict(pictures)


def read_json(path: Path) -> Any:
    """Return what is in a JSON file.

    Raises:
        InputError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no record: it is not JSON in UTF-8 ({type(error).__name__})") from error
    return content


def check_version(version: Any) -> None:
    """Refuse another schema than this version knows."""
    if version not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise InputError(f"expected schema_version {known}, got {str(version)[:40]}")


def check_record(record: Any) -> None:
    """Refuse what is not of the form of docs/record.md; keys that this version does not know are let through.

    Raises:
        InputError: says which part is not.
    """
    if not isinstance(record, Mapping) or not {"schema_version", "method", "metrics", "classes"} <= set(record):
        raise InputError("expected an object with schema_version, method, metrics and classes")
    check_version(record["schema_version"])
    check_form(record, RECORD, "")
    for name in ("method", "metrics.before", "metrics.after", "classes.forget", "classes.all"):
        part, _, key = name.partition(".")
        value = record[part] if not key else (record[part] or {}).get(key)
        if value is None:
            raise InputError(f"expected {name}, found none")


# What a value may be: a kind, one of some words, a list of a form, or an object with a form for each key that may be
# there, `*` for every other key. Null may be anywhere.
NUMBER, TEXT, TRUTH, ANYTHING = "a number", "text", "true or false", "anything"
Form = str | tuple[str, ...] | list[Any] | dict[str, Any]

SHARES: Form = {"*": NUMBER}
MEASURED: Form = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "count": NUMBER, "found": TRUTH}
DISTANCES: Form = {"*": {"l2": NUMBER, "relative": NUMBER}}
ONE_MODEL: Form = {
    "forget_accuracy": NUMBER,
    "retain_accuracy": NUMBER,
    "test_accuracy": NUMBER,
    "masked_retain_accuracy": NUMBER,
    "false_forget_rate": NUMBER,
    "per_class_accuracy": SHARES,
    "confusion": {"*": {"*": NUMBER}},
    "forget_prediction_distribution": SHARES,
    "forget_prediction_entropy_bits": NUMBER,
    "retain_calibration_error": NUMBER,
    "zero_retrain_forgetting": MEASURED,
    "activation_distance": MEASURED,
    "tug_of_war": NUMBER,
    "prediction_divergence_bits": NUMBER,
    "intervals": {"*": [NUMBER]},
    "per_class_intervals": {"*": [NUMBER]},
    "masked_per_class_intervals": {"*": [NUMBER]},
    "weight_distance": {"to_original": DISTANCES, "to_retrained": DISTANCES},
    "forget_train_accuracy": NUMBER,
}
AUDIT: Form = {
    "says": TEXT,
    "source": TEXT,
    "skipped": TEXT,
    "seconds": NUMBER,
    "targets": {"*": TEXT},
    "figures": {"*": {"*": MEASURED}},
    "details": {
        "*": {
            "cap": NUMBER,
            "goals": SHARES,
            "curves": [ANYTHING],
            "censored": {"*": [TRUTH]},
            "map": TEXT,
            "points": {"*": {"x": [NUMBER], "y": [NUMBER]}},
        }
    },
    "compared": {"*": NUMBER},
}
CALIBRATION: Form = {
    "reached": TRUTH,
    "why": TEXT,
    "held_out": NUMBER,
    "trained_on": NUMBER,
    "rounds": NUMBER,
    "impair_rate": NUMBER,
    "repair_rate": NUMBER,
    "scale": NUMBER,
    "batch_size": NUMBER,
    "trials": [
        {
            "round": NUMBER,
            "rate": NUMBER,
            "steps": NUMBER,
            "outcome": TEXT,
            "still_called": NUMBER,
            "retain_agreement": NUMBER,
        }
    ],
    "signals": [
        {
            "phase": TEXT,
            "step": NUMBER,
            "impressions_called": SHARES,
            "class_probability": NUMBER,
            "retain_accuracy": NUMBER,
            "retain_agreement": NUMBER,
            "retain_divergence": NUMBER,
        }
    ],
}
LEARNED: Form = [{"class": TEXT, "start": TEXT, "before": NUMBER, "after": NUMBER, "picture": TEXT}]
PICTURES: Form = {
    "where_it_looks": {"*": {"class": TEXT, "picture": TEXT, "lit": {"*": TEXT}}},
    "impressions": {"*": {"start": TEXT, "picture": TEXT}},
}
RECORD: Form = {
    "method": TEXT,
    "config": {"settings": [TEXT], "audits": [TEXT], "calibration": {"called": NUMBER}, "include_images": TRUTH},
    "classes": {"forget": [TEXT], "forgotten_before": [TEXT], "all": [TEXT]},
    "seed": NUMBER,
    "model": {"spec": TEXT, "weights": TEXT, "original": TEXT, "unlearned": TEXT, "parameters": NUMBER},
    "data": {
        "source": TEXT,
        "test_from": TEXT,
        "retain_samples": NUMBER,
        "test_samples": NUMBER,
        "test_forget_samples": NUMBER,
        "options": {
            "class_names": [TEXT],
            "size": [NUMBER],
            "mean": [NUMBER],
            "std": [NUMBER],
        },
    },
    "metrics": {
        "before": ONE_MODEL,
        "after": ONE_MODEL,
        "retrained": ONE_MODEL,
        "gaps": {"*": MEASURED},
        "gaps_to_original": {"*": MEASURED},
    },
    "cost": {
        "phases": {"*": {"seconds": NUMBER, "steps": NUMBER, "samples": NUMBER}},
        "seconds": NUMBER,
        "steps": NUMBER,
        "samples": NUMBER,
        "evaluation_seconds": NUMBER,
    },
    "samples_read": {"*": {"*": NUMBER}},
    "environment": {"device": TEXT, "expunge": TEXT},
    "checks": {
        "forgotten": TRUTH,
        "kept": TRUTH,
        "signals": TRUTH,
        "goal_forget_accuracy": NUMBER,
        "goal_retain_drop": NUMBER,
    },
    "calibration": CALIBRATION,
    "learned": {"noise": LEARNED, "impressions": LEARNED},
    "audits": {"*": AUDIT},
    "self_checks": [{"name": TEXT, "ok": TRUTH, "sentence": TEXT, "finding": TEXT}],
    "verdict": {
        **{layer: {"answer": ("yes", "no", "unknown"), "evidence": [TEXT]} for layer in LAYERS},
        "diagnosis": [TEXT],
        "not_tested": [TEXT],
        "first_line": TEXT,
        "scope": TEXT,
    },
    "notes": [TEXT],
    "item": {"id": TEXT, "asked": {"original": {"data": TEXT, "model": TEXT}}},
    "bench": {"cost": {"*": ANYTHING}, "probes": {"*": SHARES}, "sizes": SHARES, "tuning": {"*": ANYTHING}},
    "provenance": {"*": ANYTHING},
    "content_hash": TEXT,
}


def check_form(value: Any, form: Form, where: str) -> None:
    """Refuse a value that is not of a form; null may be anywhere but in a list."""
    if value is None:
        return
    if isinstance(form, dict):
        if not isinstance(value, Mapping):
            raise InputError(f"expected an object at {where}")
        for key, part in value.items():
            check_form(part, form.get(key) or form.get("*") or ANYTHING, f"{where}.{key}".removeprefix("."))
    elif isinstance(form, list):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"expected a list at {where}")
        for part in value:
            if part is None and form[0] != ANYTHING:
                raise InputError(f"expected no null in the list at {where}")
            check_form(part, form[0], where)
    elif isinstance(form, tuple):
        if value not in form:
            raise InputError(f"expected {', '.join(form)} at {where}")
    elif form == ANYTHING:
        _check_finite(value, where)
    else:
        kinds: dict[str, Any] = {NUMBER: (int, float), TEXT: str, TRUTH: bool}
        if not isinstance(value, kinds[form]) or (form == NUMBER and isinstance(value, bool)):
            raise InputError(f"expected {form} at {where}")
        _check_finite(value, where)


def _check_finite(value: Any, where: str) -> None:
    """Refuse NaN, infinity, and what no measure can be, anywhere in a value."""
    if isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_finite(part, where)
    elif isinstance(value, (int, float)) and not abs(value) < LARGEST:
        raise InputError(f"expected a finite number at {where}")


LARGEST = 1e30

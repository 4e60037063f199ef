"""The command that does again what a record tells of."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

Part = Mapping[str, Any]

COSTLY = ("u_lira", "forgetting_quality")
"""Attacks that `--budget large` adds: they are not named with --audits."""


def rerun(record: Part) -> dict[str, str] | None:
    """Return the `command`, which writes to the folder `again`, and a `note` on what it may lack.

    None where no command made the record.
    """
    model, data, config = (record.get(part) or {} for part in ("model", "data", "config"))
    audited = bool(model.get("original"))
    if not model.get("spec") or not data.get("source") or not (audited or model.get("weights")):
        return None
    words = [*(_audit if audited else _forget)(record, model, data, config), *_reading(data), "--out", "again"]
    if record.get("seed") is not None:
        words += ["--seed", str(record["seed"])]
    if (record.get("environment") or {}).get("device") == "cpu":
        words += ["--device", "cpu"]
    if config.get("include_images"):
        words.append("--include-images")
    known = ("audits" if audited else "settings") in config
    note = "" if known else "The record is of a version that did not keep all options: some may be missing."
    return {"command": shlex.join(words), "note": note}


def rerun_bench(record: Part) -> str:
    """Return the command that runs a benchmark again, in a folder of its own."""
    asked = record.get("asked") or {}
    words = ["expunge", "bench", record["suite"], *_each("--data", (asked.get("data") or {}).get("spec"))]
    for classes in asked.get("classes") or ():
        words += _each("--classes", ",".join(classes))
    for name in ("methods", "audits", "only", "analysis"):
        if asked.get(name):
            words += _each(f"--{name}", ",".join(asked[name]))
    for name in ("seeds", "trials", "weights", "model", "epochs", "retain_per_class", "train_per_class"):
        words += _each(f"--{name.replace('_', '-')}", asked.get(name))
    return shlex.join([*words, *_reading({"options": asked.get("data")}), "--out", "again"])


def _forget(record: Part, model: Part, data: Part, config: Part) -> Iterator[str]:
    yield from ("expunge", "forget", "--weights", model["weights"], *_shared(record, model, data))
    for key in ("retain_per_class", "retain_share"):
        yield from _each(f"--{key.replace('_', '-')}", data.get(key))
    yield from _each("--retain", data.get("retain_source"))
    if data.get("dropped_forgotten"):
        yield "--drop-forgotten"
    yield from ("--method", record["method"])
    yield from _each("--preset", config.get("preset"))
    yield from _each("--set", config.get("settings"))
    yield from _each("--retrained", model.get("retrained"))


def _audit(record: Part, model: Part, data: Part, config: Part) -> Iterator[str]:
    yield from ("expunge", "audit", "--original", model["original"], *_each("--unlearned", model.get("unlearned")))
    yield from (*_each("--retrained", model.get("retrained")), *_shared(record, model, data))
    ran = [name for name in record.get("audits") or {} if name not in COSTLY]
    if ran:
        yield from ("--audits", ",".join(ran))
    if config.get("training_data", data.get("train_samples") != 0) is False:
        yield "--no-training-data"
    many = config.get("ensembles")
    if isinstance(many, Mapping):
        yield from ("--budget", "large")
        for key in ("members", "method", "preset"):
            yield from _each(f"--{key}", many.get(key))
        recipe = many.get("recipe")
        yield from _each("--epochs", recipe.get("epochs") if isinstance(recipe, Mapping) else None)


def _shared(record: Part, model: Part, data: Part) -> Iterator[str]:
    yield from ("--model", model["spec"], "--data", data["source"])
    yield from _each("--classes", record["classes"]["forget"])


def _reading(data: Part) -> Iterator[str]:
    """Yield how the data was to be read, as it was given."""
    options = data.get("options") or {}
    for key in ("label_column", "image_column", "channels", "memory"):
        yield from _each(f"--{key.replace('_', '-')}", options.get(key))
    for key, between in (("class_names", ","), ("size", "x"), ("mean", ","), ("std", ",")):
        if options.get(key):
            yield from _each(f"--{key.replace('_', '-')}", between.join(map(str, options[key])))
    if options.get("skip_bad"):
        yield "--skip-bad"


def _each(flag: str, values: Any) -> Iterator[str]:
    """Yield a flag before each value, in one word where the value would pass for a flag; nothing for None."""
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if value is not None:
            yield from [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]

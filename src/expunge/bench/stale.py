"""What was done with other settings than a run would take now: an id has a preset's name, and its values may change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.bench.cells import Cell, Item, Tuning, folder_of
from expunge.bench.records import attempts_of, finite, read
from expunge.config import as_json, override
from expunge.errors import InputError
from expunge.methods import METHODS, PRESETS


def stated_config(method: str, preset: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return a method's configuration as a record states it.

    Raises:
        InputError: a setting is none of the method's.
    """
    config: dict[str, Any] = as_json(override(PRESETS[method][preset](), settings))
    return {"preset": preset, "settings": list(settings)} | config


def stale_items(items: Sequence[Item], out: Path) -> set[str]:
    """Return the ids of the items that are done, and would come out otherwise now: they are to be done again.

    Their settings are no longer those of their preset, or something that they need was done again since, or is to be.

    Args:
        items: each after all that it needs.
    """
    records = {item.id: read(folder_of(item, out)) for item in items}
    done = {key: record for key, record in records.items() if record and record["item"]["status"] == "done"}
    found = {item.id for item in items if item.id in done and _differs(item, done)}
    for item in items:
        if isinstance(item, Cell) and item.tuning is not None and item.id in found:
            search = done.get(item.tuning.id, {})
            found |= {item.tuning.id} if search and "config" not in search else set()  # earlier versions did not say it
    for item in items:
        made_of = done[item.id]["item"].get("made_of", {}) if item.id in done else {}
        newer = any(attempts_of(records[key]) > attempts for key, attempts in made_of.items() if key in records)
        if item.id in done and (newer or any(need.id in found for need in item.needs)):
            found.add(item.id)
    return found


def _differs(item: Item, done: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a done item states another configuration than it would now."""
    record = done[item.id]
    if not isinstance(item, Cell | Tuning) or (isinstance(item, Cell) and item.judged is not None):
        return False
    if "config" not in record:
        return False
    if isinstance(item, Tuning) and "space" in record and record["space"] != as_json(METHODS[item.method].space):
        return True
    settings = item.settings if isinstance(item, Cell) else ()
    if isinstance(item, Cell) and item.tuning is not None:
        if item.tuning.id not in done:
            return False
        settings = tuple(done[item.tuning.id]["settings"])
    try:
        now = stated_config(item.method, item.preset, settings)
    except InputError:  # a setting that there was
        return True
    return bool(json.loads(json.dumps(finite(now))) != record["config"])

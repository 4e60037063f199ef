"""Records of items: read, and whether they are done, failed, or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "failed"]


def read(folder: Path) -> dict[str, Any] | None:
    """Return the record in an item's folder; None where there is none.

    Records are written whole or not at all, so one that does not parse was changed by somebody: it raises.
    """
    try:
        text = (folder / "record.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def status_of(folder: Path) -> Status | None:
    """Return whether an item is done or has failed; None where nothing came of it yet."""
    record = read(folder)
    return None if record is None else record["item"]["status"]


def attempts_of(record: Mapping[str, Any] | None) -> int:
    """Return how often an item was done, failures included; 0 where nothing came of it yet."""
    return 0 if record is None else int(record["item"]["attempts"])


def finite(content: Any) -> Any:
    """Return JSON content with None for NaN and infinity, which JSON has no word for."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

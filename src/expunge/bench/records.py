"""Records of items: read, and whether they are done, failed, or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from expunge.errors import InputError, first_line

Status = Literal["done", "failed"]


def read(folder: Path) -> dict[str, Any] | None:
    """Return the record in an item's folder; None where there is none.

    Records are written whole or not at all, so one that does not parse was changed by somebody, or copied in part.

    Raises:
        InputError: it does not parse.
    """
    path = folder / "record.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is no whole record ({first_line(error)}): delete it, and it is made again") from error
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

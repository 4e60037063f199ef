"""Streams of images, which a training moves on from epoch to epoch, for runs that shall all start at the first."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from expunge.data import StreamedImages
from expunge.schema import Split


def own_streams(split: Split) -> Split:
    """Return a split of the same samples whose streams are its own: what one run does to them another never sees."""
    return replace(split, retain=_own(split.retain), forget=_own(split.forget))


def _own(dataset: Any) -> Any:
    return copy.copy(dataset) if isinstance(dataset, StreamedImages) else dataset

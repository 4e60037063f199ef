"""Where a benchmark stands while it runs: what is done, what failed, what is worked on, how long the rest will take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from expunge.bench.cells import Cell, Item, Original, Reference, Tuning, model_name, with_needs
from expunge.bench.runner import leased

MODELS = "models"


@dataclass(frozen=True)
class Line:
    """One finished item, as it is told while the benchmark runs."""

    number: int  # items finished so far
    total: int
    item: Item
    about: str  # the item in a few words
    record: Mapping[str, Any]
    seconds_left: float | None  # None: nothing to tell from yet


@dataclass(frozen=True)
class Running:
    """An item that somebody works on."""

    about: str  # what tells it from others of its row
    seconds: float  # since it was first seen to be worked on
    usual: float | None  # seconds that items of its kind and method took; None: none was finished


@dataclass(frozen=True)
class Row:
    """The items of one method, or all models that are trained."""

    name: str
    total: int
    finished: int  # failed ones among them
    failed: int
    running: tuple[Running, ...]
    last: Mapping[str, Any] | None  # record of the cell finished last


@dataclass
class Standing:
    """Counts what is finished, and tells from it how long the rest will take: as items of the kind and method took."""

    cells: Sequence[Cell]
    out: Path
    jobs: int
    _took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _records: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _seen: dict[str, float] = field(default_factory=dict)  # when an item was first seen to be worked on

    def __post_init__(self) -> None:
        self.items = with_needs(self.cells)
        self._groups: dict[str, list[Item]] = defaultdict(list)
        for item in self.items:
            self._groups[_group(item)].append(item)
        originals = [item for item in self.items if isinstance(item, Original)]
        self._one_data = len({one.data for one in originals}) == 1
        self._one_model = len({one.model for one in originals}) == 1

    def finish(self, item: Item, record: Mapping[str, Any]) -> Line:
        """Count a finished item; return what is to be told of it."""
        self._records[item.id] = record
        if record["item"]["status"] == "done":  # how long it took to fail says nothing of others
            for key in (_key(item), type(item).__name__, ""):
                self._took[key].append(record["item"]["seconds"])
        about = f"{_group(item)}, {self._about(item)}"
        return Line(len(self._records), len(self.items), item, about, record, self.seconds_left())

    def seconds_left(self) -> float | None:
        """Return how long the rest will take; None where nothing was finished yet to tell it from."""
        left = [item for item in self.items if item.id not in self._records]
        if left and not self._took:
            return None
        return sum(max(0.0, self._guess(item) - self._ran(item)) for item in left) / self.jobs

    def _usual(self, item: Item) -> float | None:
        """Return what items of this kind and method took, or the runs that a search is made of."""
        if took := self._took.get(_key(item)):
            return fmean(took)
        if isinstance(item, Tuning) and (one := self._took.get(_key(item).replace("Tuning", "Cell", 1))):
            return item.trials * fmean(one)
        return None

    def _guess(self, item: Item) -> float:
        kind = self._took.get(type(item).__name__) or self._took.get("") or [0.0]
        return self._usual(item) or fmean(kind)

    def _ran(self, item: Item) -> float:
        return time.monotonic() - self._seen[item.id] if item.id in self._seen else 0.0

    def rows(self) -> list[Row]:
        """Return a row for the models and for each method, in the order they are begun."""
        for name in (running := leased(self.out) - self._records.keys()):
            self._seen.setdefault(name, time.monotonic())
        return [self._row(name, items, running) for name, items in self._groups.items()]

    def _row(self, name: str, items: Sequence[Item], running: Set[str]) -> Row:
        records = {item.id: self._records[item.id] for item in items if item.id in self._records}
        failed = [key for key, record in records.items() if record["item"]["status"] == "failed"]
        cells = {item.id for item in items if isinstance(item, Cell)} - set(failed)
        return Row(
            name=name,
            total=len(items),
            finished=len(records),
            failed=len(failed),
            running=tuple(
                Running(self._about(item), self._ran(item), self._usual(item)) for item in items if item.id in running
            ),
            last=next((record for key, record in reversed(self._records.items()) if key in cells), None),
        )

    def _about(self, item: Item) -> str:
        """Return what tells an item from others of its row."""
        original = item if isinstance(item, Original) else item.original
        words = [] if self._one_data else [original.data]
        words += [] if self._one_model else [model_name(original.model)]
        if isinstance(item, Tuning):
            words += ["searching settings"]
        if isinstance(item, Cell):
            words += ["tuned" if item.tuning else item.preset]
        if not isinstance(item, Original):
            words += [f"{'without ' if isinstance(item, Reference) else ''}{'+'.join(item.forget)}"]
        if not isinstance(item, Tuning):
            words += [f"seed {original.seed}"]
        return ", ".join(words)


def _group(item: Item) -> str:
    return item.method if isinstance(item, Cell | Tuning) else MODELS


def _key(item: Item) -> str:
    name = type(item).__name__
    variant = f" {item.method} {item.preset}" if isinstance(item, Cell | Tuning) else ""
    return f"{name}{variant}{' counted' if isinstance(item, Cell) and item.count_flops else ''}"

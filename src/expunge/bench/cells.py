"""What a benchmark does, as data: originals and references to train, settings to tune, cells to run.

Each has an `id`: the name of its folder, readable, and the same on every machine. It ends with a hash of everything
that changes the result and is not in the readable part; where the data lies is not among that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.config import as_json
from expunge.methods import METHODS
from expunge.schema import TrainConfig
from expunge.workspace import DataOptions


@dataclass(frozen=True, kw_only=True)
class Original:
    """A trained model to forget from: trained once, shared by all its cells."""

    data: str  # name of the data set in ids and tables: the same wherever it lies
    options: DataOptions  # where it lies and how it is read
    model: str  # model string
    recipe: TrainConfig  # of the original, and of its retrained references
    per_class: int | None = None  # images of each class that it is trained on, and that methods may be given; None: all
    augment: bool | None = None  # as in `expunge train`
    seed: int = 0  # of training
    weights: Path | None = None  # somebody's own: nothing is trained but the references
    digest: str | None = None  # of those weights, the data and the model's file
    gone: tuple[str, ...] = ()  # classes that they forgot before or never saw: no reference shall know them

    @property
    def id(self) -> str:
        options = {name: value for name, value in as_json(self.options).items() if name not in ("spec", "memory")}
        if self.options.memory is not None:  # what is streamed is shuffled otherwise
            options["memory"] = self.options.memory
        model = re.sub(r"^.*/(?=[^/]+\.py:)", "", self.model)  # a file's folder is no part of the model
        rest = [as_json(self.recipe), options, model, self.per_class, self.augment, self.digest]
        rest += [sorted(self.gone)] if self.gone else []
        return f"{slug(self.data)}-{model_name(self.model)}-t{self.seed}-{_hash(rest)}"

    @property
    def needs(self) -> tuple[Item, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The model trained as an original was, without some classes: what every cell is compared with."""

    original: Original
    forget: tuple[str, ...]  # names or indices

    @property
    def id(self) -> str:
        return f"{self.original.id}-without-{classes_name(self.forget)}-{_hash(sorted(self.forget))}"

    @property
    def needs(self) -> tuple[Item, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A search for a method's settings on one original and one set of classes; see tuning.py."""

    original: Original
    forget: tuple[str, ...]
    method: str
    preset: str
    trials: int  # runs of the method, the preset's own settings being the first
    retain_per_class: int | None
    seed: int = 0

    @property
    def id(self) -> str:
        rest = [self.original.id, sorted(self.forget), self.trials, self.retain_per_class, self.seed]
        rest += _forget_drawn(self)
        start = f"{slug(self.original.data)}-{model_name(self.original.model)}-{classes_name(self.forget)}"
        return f"{start}-{self.method}-{self.preset}-{_hash(rest)}"

    @property
    def needs(self) -> tuple[Item, ...]:
        return (self.original,)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a method on one original, measured."""

    original: Original
    forget: tuple[str, ...]
    method: str
    preset: str = "default"
    settings: tuple[str, ...] = ()  # changes of the preset, as `--set` takes them
    tuning: Tuning | None = None  # take the settings that this search found
    seed: int = 0  # of unlearning, and of the draw of the retain sample
    retain_per_class: int | None = None  # images of each class, retained or to forget, that are given; None: all
    test_per_class: int | None = None  # held-out images of each class to measure on; None: all
    reference: bool = True  # compare with a retrained model
    audits: tuple[str, ...] = ()  # of expunge.AUDITS; a probe of the last features is made anyway
    count_flops: bool = False  # run the method a second time to count; see cost.py
    after: Cell | None = None  # start from the model that this one made: requests in sequence
    keep: bool = False  # keep the weights that the method made, for the next request
    judged: Reference | None = None  # no method runs: another retrained model is judged as if it were unlearned

    @property
    def id(self) -> str:
        rest = [
            self.original.id, sorted(self.forget), self.settings, self.tuning.id if self.tuning else None,
            self.retain_per_class, self.test_per_class, self.reference, self.audits, self.count_flops,
        ]  # fmt: skip
        rest += [one.id for one in (self.after, self.judged) if one is not None] + ["kept"] * self.keep
        rest += _forget_drawn(self)
        original = f"{slug(self.original.data)}-{model_name(self.original.model)}-t{self.original.seed}"
        variant = "tuned" if self.tuning else self.preset
        return f"{original}-{classes_name(self.forget)}-{self.method}-{variant}-u{self.seed}-{_hash(rest)}"

    @property
    def gone(self) -> tuple[str, ...]:
        """Classes that the result shall not know: those of earlier requests, then its own."""
        return (*(self.after.gone if self.after else ()), *self.forget)

    @property
    def needs(self) -> tuple[Item, ...]:
        reference = (Reference(original=self.original, forget=self.gone),) if self.reference else ()
        others = [item for item in (self.tuning, self.after, self.judged) if item is not None]
        return (self.original, *reference, *others)


Item = Original | Reference | Tuning | Cell
"""Whatever is done once and has a folder of its own."""


def folder_of(item: Item, out: Path) -> Path:
    """Return where an item keeps its `record.json`."""
    kinds = {Original: "models", Reference: "models", Tuning: "tuning", Cell: "cells"}
    return out / kinds[type(item)] / item.id


def with_needs(cells: Sequence[Cell]) -> list[Item]:
    """Return the cells after all that they need, each item once, in an order that keeps what is shared together."""

    def all_of(item: Item) -> Iterator[Item]:
        for need in item.needs:
            yield from all_of(need)
        yield item

    return list({item.id: item for cell in cells for item in all_of(cell)}.values())


def _forget_drawn(item: Tuning | Cell) -> list[str]:
    """Return a word for the id of what reads forget samples that are drawn: it was given all of them once."""
    method = METHODS.get(item.method)  # None: no method ran, a model is judged
    reads = method is not None and not method.zero_glance
    audited = isinstance(item, Cell) and bool(item.audits)
    return ["forget samples drawn"] if item.retain_per_class is not None and (reads or audited) else []


def slug(text: str) -> str:
    """Return `text` as part of a folder's name: lower case letters, digits, and single underscores for the rest."""
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_.") or "_"


def model_name(model: str) -> str:
    """Return a short name of a model string: without family, folder and arguments."""
    body = model.partition("?")[0]
    file, _, name = body.rpartition(":")
    return slug(name if name and not file.endswith(".py") else f"{Path(file).stem}_{name}")[:40]


def classes_name(forget: Sequence[str]) -> str:
    """Return a short name of a set of classes."""
    joined = "+".join(slug(name) for name in forget)
    return joined if len(joined) <= 24 else f"{len(forget)}classes"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(as_json(content), sort_keys=True).encode()).hexdigest()[:8]

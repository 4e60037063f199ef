"""What every audit shares: the models under audit, the data it may read, what it needs and what it gives.

An audit is a function of one model (and of the original, where it is scored by it) that returns named measurements. The
same audit runs on the original, the unlearned and each retrained model, on the same samples in the same order, so that
gaps to the retrained model can be taken in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from expunge.audits.inside import Features, blocks_of, features_of
from expunge.data import labels_of
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.metrics.uncertainty import Measurement
from expunge.schema import Predictions, Preprocessing
from expunge.training import predict

Need = Literal["forget test", "retain test", "forget train", "retain train", "retrained", "ensemble"]
"""What an audit cannot do without: held-out or training images of forgotten or retained classes, a retrained model,
or many models that the command trains."""

Target = Literal["retrained", "low", "high", "none"]
"""Where a figure should be: as near the retrained model's as can be, low, high, or only told."""


@dataclass(frozen=True, kw_only=True)
class AuditData:
    """What audits may read; None: not given. Images as in `Split`, in a fixed order."""

    forget_classes: tuple[int, ...]
    test: Dataset[Any]  # held-out samples, of forgotten and retained classes
    train: Dataset[Any] | None = None  # samples that the original was trained on, of the same
    class_names: tuple[str, ...]
    forgotten_before: tuple[int, ...] = ()  # labels gone before: their samples count for neither side

    @property
    def gone(self) -> list[int]:
        """The labels that no model shall answer, in order: forgotten now or before."""
        return sorted({*self.forget_classes, *self.forgotten_before})

    def part(self, of: Literal["test", "train"], *, forget: bool, most: int | None = None, seed: int = 0) -> Any:
        """Return the samples of the forgotten classes, or of those that stay: all, or `most` drawn at random.

        The draw is the same for the same seed.

        Raises:
            InputError: there is none.
        """
        dataset: Any = self.test if of == "test" else self.train
        labels = torch.from_numpy(labels_of(dataset)) if dataset is not None else torch.empty(0, dtype=torch.long)
        inside = torch.isin(labels, torch.tensor(self.forget_classes))
        wanted = inside if forget else ~inside & ~torch.isin(labels, torch.tensor(self.forgotten_before))
        rows = wanted.nonzero().flatten()
        if len(rows) == 0:
            kind = "forgotten" if forget else "retained"
            raise InputError(f"expected {'held-out' if of == 'test' else 'training'} samples of {kind} classes")
        if most is not None and len(rows) > most:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most].sort().values]
        return Subset(dataset, rows.tolist())

    def has(self, need: Need) -> bool:
        """Return whether samples of a kind are there (of the needs that are samples)."""
        side, of = need.split(" ")
        try:
            self.part("test" if of == "test" else "train", forget=side == "forget")
        except InputError:
            return False
        return True


@dataclass
class Subject:
    """One model under audit. Its answers and features are computed once, and it is never changed."""

    role: str  # "original", "unlearned", "retrained", "retrained 2"...
    model: nn.Module
    preprocessing: Preprocessing | None
    journal: Journal = field(default_factory=Journal)
    _kept: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def answers(self, dataset: Dataset[Any], *, phase: str | None = None) -> Predictions:
        """Return the model's answers on `dataset`, in eval mode; with a `phase`, the journal counts what is read."""
        answers: Predictions = self.once(("answers", *_key(dataset)), dataset, lambda: predict(
            self.model,
            dataset,
            preprocessing=self.preprocessing,
            journal=self.journal if phase else None,
            phase=phase or "audit",
        ))  # fmt: skip
        return answers

    def features(self, dataset: Dataset[Any], layer: str | None = None) -> Features:
        """Return the features of `dataset` before `layer` (None: the last); see `features_of`."""
        features: Features = self.once(("features", layer, *_key(dataset)), dataset, lambda: features_of(
            self.model, dataset, preprocessing=self.preprocessing, layer=layer
        ))  # fmt: skip
        return features

    def blocks(self, dataset: Dataset[Any]) -> dict[str, Features]:
        """Return the features of `dataset` after each block of the model and before its head, in order."""
        blocks: dict[str, Features] = self.once(("blocks", *_key(dataset)), dataset, lambda: blocks_of(
            self.model, dataset, preprocessing=self.preprocessing
        ))  # fmt: skip
        return blocks

    def once(self, key: tuple[Any, ...], dataset: Dataset[Any], make: Callable[[], Any]) -> Any:
        """Return what `make` gives, made the first time that `key` is asked for."""
        if key not in self._kept:
            self._kept[key] = (dataset, make())  # the data set is kept, so that its identity stays its own
        return self._kept[key][1]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What else an audit is handed."""

    original: Subject
    retrained: Subject | None = None  # the first, where there are several
    seed: int
    journal: Journal = field(default_factory=Journal)
    pictures: dict[str, Any] | None = None  # where pictures of samples go, as docs/record.md has it; None: nowhere


@dataclass(frozen=True)
class Found:
    """What an audit found on one model."""

    figures: Mapping[str, Measurement]
    details: Mapping[str, Any] = field(default_factory=dict)  # curves, texts: JSON types, not compared


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One registered audit."""

    name: str
    says: str  # one sentence: what its figures mean
    source: str  # paper, arXiv number
    needs: tuple[Need, ...]
    targets: Mapping[str, Target]  # by figure; a name ending in * stands for all that begin so
    run: Callable[[Subject, AuditData, Context], Found]
    compare: Callable[[Mapping[str, Found]], Mapping[str, Any]] | None = None  # over all roles: ratios, as AIN
    budget: Literal["default", "large"] = "default"

    def target(self, figure: str) -> Target:
        """Return where a figure should be.

        Raises:
            InputError: the audit does not declare it.
        """
        for name, target in self.targets.items():
            if figure == name or (name.endswith("*") and figure.startswith(name[:-1])):
                return target
        raise InputError(f"the audit {self.name} gives a figure {figure!r} that it does not declare")


def _key(dataset: Dataset[Any]) -> tuple[Any, ...]:
    """Return what tells data sets apart: two subsets of the same rows are the same."""
    if isinstance(dataset, Subset):
        return (id(dataset.dataset), tuple(dataset.indices))
    return (id(dataset),)

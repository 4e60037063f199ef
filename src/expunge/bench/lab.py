"""From cells to models and data: opens what a cell names, trains what it needs, runs and measures the method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from expunge import __version__
from expunge.audits import AUDITS, linear_probe, nearest_class_mean
from expunge.audits.core import Subject
from expunge.bench.cells import Cell, Original, Reference, Tuning, folder_of
from expunge.bench.cost import measured
from expunge.bench.records import read
from expunge.bench.stale import stated_config
from expunge.bench.streams import own_streams
from expunge.bench.tuning import tune
from expunge.commands import train_command
from expunge.config import as_json, override
from expunge.data import ImageTable, draw, labels_of, stage, without
from expunge.errors import DivergedError, InputError
from expunge.evaluation import environment, evaluate
from expunge.files import bytes_writer
from expunge.journal import Journal
from expunge.methods import METHODS, PRESETS
from expunge.schema import Preprocessing, Split
from expunge.weights import weights_content, whole_weights
from expunge.workspace import Workspace, open_workspace

WEIGHTS = "weights.safetensors"
PROBE_IMAGES = 300  # of each class, that a probe of the last features trains on; as in docs/research/calibration.md


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model to judge, and how it came about."""

    model: nn.Module
    preprocessing: Preprocessing
    config: Mapping[str, Any]
    reads: tuple[str, ...]
    journal: Journal = field(default_factory=Journal)
    cost: Mapping[str, Any] = field(default_factory=dict)  # empty: no method ran
    tuned: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Done:
    """What came of an item and is not written yet: who did it may have lost it to another meanwhile."""

    content: Mapping[str, Any]  # of its record
    files: Mapping[Path, Callable[[Path], None]] = field(default_factory=dict)  # to be there before the record is


@dataclass
class Lab:
    """Does one item after the other. What several of them share is kept for as long as they come in a row."""

    out: Path
    device: str | None = None
    _kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def do(self, item: Original | Reference | Tuning | Cell) -> Done:
        """Do an item; what it trains from scratch is written already, checkpoint by checkpoint."""
        if isinstance(item, Cell):
            return self._run(item)
        return Done(self._tune(item) if isinstance(item, Tuning) else self._train(item))

    # Models

    def _train(self, item: Original | Reference) -> dict[str, Any]:
        """Train a model where its weights are not there yet; an interrupted training goes on."""
        original = item if isinstance(item, Original) else item.original
        if isinstance(item, Original) and original.weights is not None:
            workspace = open_workspace(original.options, original.model, original.weights, seed=0, device=self.device)
            return {"training": workspace.metadata.training, "environment": environment(workspace.model)}
        path = folder_of(item, self.out) / WEIGHTS
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = path.with_name(path.name + ".resume")
        leave_out = (*item.forget, *original.gone) if isinstance(item, Reference) else ()

        def train() -> None:
            train_command(
                original.options,
                original.model,
                path,
                config=original.recipe,
                leave_out=leave_out,
                per_class=original.per_class,
                augment=original.augment,
                seed=original.seed,
                device=self.device,
                overwrite=True,  # by the same weights, where another process was quicker
            )

        if not whole_weights(path):
            try:
                train()
            except DivergedError:  # it would again
                raise
            except InputError:
                if not checkpoint.exists():
                    raise
                checkpoint.unlink()  # begun on a machine where the data lies elsewhere: from the start
                train()
        workspace = open_workspace(original.options, original.model, path, seed=0, device=self.device)
        return {"training": workspace.metadata.training, "environment": environment(workspace.model)}

    def _open(self, item: Original | Reference | Cell, forget: Sequence[str]) -> Workspace:
        """Open an original, a reference, or what a cell made of an original; images of `forget` are left out."""
        original = item if isinstance(item, Original) else item.original
        own = original.weights if item is original else None
        weights = own or folder_of(item, self.out) / WEIGHTS
        if own is None and not isinstance(item, Cell) and not whole_weights(weights):
            self._train(item)  # its record came without, as records are passed on, or with a part of them
        return open_workspace(original.options, original.model, weights, leave_out=forget, seed=0, device=self.device)

    def _subject(self, role: str, item: Original | Reference | Cell, forget: Sequence[str]) -> Subject:
        """Return a model to compare with, whose answers are computed once for all cells in a row."""

        def make() -> Subject:
            workspace = self._open(item, forget)
            return Subject(role, workspace.model, workspace.preprocessing)

        subject: Subject = self._once(role, (item.id, tuple(forget)), make)
        return subject

    # Data

    def _split(self, workspace: Workspace, cell: Cell | Tuning) -> tuple[Split, dict[str, int]]:
        """Return what an erasure is given: retain and forget samples, drawn alike, of what the original was trained on.

        So many of each class, so that both are there in the shares that the training set had.
        """
        item = cell.after or cell.original if isinstance(cell, Cell) else cell.original
        key = (item.id, cell.original.id, cell.forget, cell.retain_per_class, cell.seed)
        found: tuple[Split, dict[str, int]] = self._once("split", key, lambda: self._drawn(workspace, cell))
        return found

    def _drawn(self, workspace: Workspace, cell: Cell | Tuning) -> tuple[Split, dict[str, int]]:
        forget = workspace.left_out
        before = tuple(label for label in workspace.gone_before if label not in forget)
        known = _known(workspace, cell.original)
        others = set(range(len(workspace.class_names))) - set(forget)
        parts = {
            "retain": draw(without(known, {*forget, *before}), per_class=cell.retain_per_class, seed=cell.seed),
            "forget": draw(without(known, others), per_class=cell.retain_per_class, seed=cell.seed),
        }
        staged = {name: _staged(table, workspace, cell.original, shuffle_by=cell.seed) for name, table in parts.items()}
        split = Split(
            forget_classes=forget,
            retain=staged["retain"],
            forget=staged["forget"] if len(parts["forget"]) else None,
            class_names=workspace.class_names,
            preprocessing=workspace.preprocessing,
            forgotten_before=before,
        )
        return split, {name: len(table) for name, table in parts.items()}

    def _once(self, name: str, key: Any, make: Any) -> Any:
        """Return what `make` gives; of each name the last is kept."""
        if name not in self._kept or self._kept[name][0] != key:
            self._kept[name] = (key, make())
        return self._kept[name][1]

    # Cells

    def _tune(self, tuning: Tuning) -> dict[str, Any]:
        workspace = self._open(tuning.original, tuning.forget)
        split, sizes = self._split(workspace, tuning)
        found = tune(
            METHODS[tuning.method],
            PRESETS[tuning.method][tuning.preset](),
            workspace.model,
            split,
            trials=tuning.trials,
            seed=tuning.seed,
        )
        content: dict[str, Any] = as_json(found)
        return content | {
            "config": stated_config(tuning.method, tuning.preset, ()),
            "space": as_json(METHODS[tuning.method].space),
            "sizes": sizes,
            "environment": environment(workspace.model),
        }

    def _run(self, cell: Cell) -> Done:
        workspace = self._open(cell.after or cell.original, cell.forget)
        split, sizes = self._split(workspace, cell)
        made = self._unlearn(cell, workspace, split) if cell.judged is None else self._judged(cell, cell.judged)
        phases = list(made.journal.phases)
        held_out = self._once(
            "test",
            (cell.original.data, cell.original.options, cell.test_per_class, workspace.preprocessing),
            lambda: _staged(draw(workspace.test, per_class=cell.test_per_class, seed=0), workspace, cell.original),
        )
        judged = time.perf_counter()
        # opened a second time: a method might have changed what it was handed
        subjects = {"before": self._subject("original", cell.after or cell.original, cell.forget)}
        if cell.reference:
            subjects["retrained"] = self._subject(
                "retrained", Reference(original=cell.original, forget=cell.gone), cell.gone
            )
        subjects["after"] = Subject("unlearned", made.model, made.preprocessing, made.journal)
        record = evaluate(
            subjects["before"],
            subjects["after"],
            replace(split, test=held_out),
            subjects.get("retrained"),
            audits=[AUDITS[name] for name in cell.audits],
            method=cell.method,
            config=made.config,
            seed=cell.seed,
            phases=phases,
            journal=made.journal,
        )
        bench = {
            "cost": made.cost,
            "sizes": sizes | {"test": len(held_out), "classes": len(workspace.class_names)},
            "probes": self._probes(cell, workspace, subjects, held_out),
            "tuning": made.tuned,
            "zero_glance": "forget" not in made.reads,
            "reads": list(made.reads),
            "dims": {name: tensor.ndim for name, tensor in made.model.named_parameters()},
            "judging_seconds": time.perf_counter() - judged,
        }
        files = {}
        if cell.keep:
            files[folder_of(cell, self.out) / WEIGHTS] = bytes_writer(_kept_weights(workspace, made.model))
        record = replace(
            record,
            data=dict(record.data) | {"test_from": workspace.test_from},
            notes=(*workspace.notes, *workspace.held_out_notes(), *record.notes),
        )
        return Done(as_json(record) | {"bench": bench}, files)

    def _unlearn(self, cell: Cell, workspace: Workspace, split: Split) -> Made:
        """Run the cell's method, and measure what it costs."""
        method = METHODS[cell.method]
        if not method.zero_glance and split.forget is None:
            raise InputError(f"the method {cell.method} reads images of the classes to forget, and the data has none")
        tuned = self._tuned(cell)
        settings = tuple(tuned["settings"]) if tuned else cell.settings
        config = override(PRESETS[cell.method][cell.preset](), settings)
        reads = method.reads if tuned is None else method.reads - {"nothing"} | {"retain"}  # its settings hang on those
        unlearned, journal, cost = measured(
            lambda journal: method(
                workspace.model, method.view(own_streams(split)), config, seed=cell.seed, journal=journal
            ),
            workspace.model,
            split.forget_classes,
            count_flops=cell.count_flops,
        )
        return Made(
            model=unlearned,
            preprocessing=workspace.preprocessing,
            journal=journal,
            config=stated_config(cell.method, cell.preset, settings),
            cost=asdict(cost),
            tuned=tuned,
            reads=tuple(sorted(reads)),
        )

    def _judged(self, cell: Cell, reference: Reference) -> Made:
        """Return another retrained model as if a method had made it; what that cost is in the reference's record."""
        other = self._open(reference, reference.forget)
        config = {"preset": cell.preset, "settings": []}
        return Made(model=other.model, preprocessing=other.preprocessing, config=config, reads=("retain",))

    def _tuned(self, cell: Cell) -> dict[str, Any] | None:
        if cell.tuning is None:
            return None
        record = read(folder_of(cell.tuning, self.out))
        assert record is not None  # the runner does what a cell needs first
        told = ("settings", "score", "selected_by", "reads_forget", "trials", "budget")
        return {name: record[name] for name in told} | {"id": cell.tuning.id}

    def _probes(
        self, cell: Cell, workspace: Workspace, subjects: Mapping[str, Subject], held_out: Dataset[Any]
    ) -> dict[str, dict[str, float]] | None:
        """Return what a linear probe and the nearest class mean find of the classes to forget in the last features.

        None where the data has no training or no held-out image of them, as where they are deleted already.
        """
        known = self._once(
            "known",
            (cell.original.id, workspace.preprocessing),
            lambda: _staged(
                draw(_known(workspace, cell.original), per_class=PROBE_IMAGES, seed=1), workspace, cell.original
            ),
        )
        if not all(np.isin(labels_of(images), workspace.left_out).any() for images in (known, held_out)):
            return None

        def probe(subject: Subject) -> dict[str, float]:
            train, test = subject.features(known), subject.features(held_out)
            return {
                "linear_probe": linear_probe(train, test, workspace.left_out),
                "nearest_class_mean": nearest_class_mean(train, test, workspace.left_out),
            }

        key = (cell.original.id, cell.after and cell.after.id, cell.forget, cell.test_per_class)
        return {
            role: probe(subject) if role == "after" else self._once(f"probe {role}", key, partial(probe, subject))
            for role, subject in subjects.items()
        }


def _kept_weights(workspace: Workspace, model: nn.Module) -> bytes:
    """Return the weights file that the next request starts from."""
    names = workspace.class_names
    gone = tuple(names[label] for label in sorted({*workspace.gone_before, *workspace.left_out}))
    metadata = replace(
        workspace.metadata,
        model=workspace.spec.text,
        class_names=names,
        preprocessing=workspace.preprocessing,
        forgotten=gone,
        made_by=f"expunge {__version__} bench",
        training=None,
        trained_on=workspace.trained_on,
    )
    return weights_content(model, metadata)


def _known(workspace: Workspace, original: Original) -> ImageTable:
    """Return the images that the original was trained on: `expunge train --per-class` draws them so."""
    return draw(workspace.source.train, per_class=original.per_class, seed=0)


def _staged(table: ImageTable, workspace: Workspace, original: Original, *, shuffle_by: int | None = None) -> Any:
    """Return decoded images, or a stream: shuffled each epoch by a seed, as training needs it, or else in order."""
    options = original.options
    return stage(
        table,
        workspace.preprocessing,
        skip_bad=options.skip_bad,
        shuffle=shuffle_by is not None,
        seed=shuffle_by or 0,
        held=options.memory or 2 * 2**30,  # more than by default: cells read the same images again and again
    ).dataset

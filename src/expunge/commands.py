"""What the commands do, as functions: strings in, files out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from expunge import __version__
from expunge.config import as_json, override
from expunge.data import (
    ImageTable,
    count_labels,
    draw,
    missing_classes,
    open_source,
    resolve_classes,
    stage,
    without,
)
from expunge.errors import InputError
from expunge.evaluate import evaluate
from expunge.files import json_writer, write_atomically
from expunge.journal import Journal
from expunge.methods import METHODS, PRESETS
from expunge.metrics import accuracy
from expunge.schema import Record, Split, TrainConfig
from expunge.train import predict, train
from expunge.weights import Metadata, save_weights, weights_writer
from expunge.workspace import DataOptions, Workspace, align, open_workspace

TRAIN_DEFAULT = TrainConfig(epochs=12, lr=0.002, optimizer="adamw", weight_decay=0.05, schedule="one_cycle")
"""One recipe for networks with and without BatchNorm and for transformers; see docs/results.md."""


@dataclass(frozen=True, kw_only=True)
class RetainOptions:
    """Which images a method may read."""

    per_class: int | None = None  # a random draw of so many of each class
    share: float | None = None  # or of this share of each class, in (0, 1]
    source: str | None = None  # every image of another source, instead of a draw from the data's train split
    drop_forgotten: bool = False  # leave images of a forgotten class in that source out, instead of refusing it

    def __post_init__(self) -> None:
        if self.per_class is not None and self.share is not None:
            raise InputError("expected --retain-per-class or --retain-share, got both")
        if self.per_class is not None and self.per_class < 1:
            raise InputError(f"expected at least one retained image a class, got {self.per_class}")
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"expected a retain share above 0 and up to 1, got {self.share:g}")


@dataclass(frozen=True)
class Outcome:
    """What a command did: its record, the sentences a person should read, and the files it wrote."""

    record: Record
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def train_command(
    data: DataOptions,
    model: str,
    out: Path,
    *,
    config: TrainConfig = TRAIN_DEFAULT,
    leave_out: Sequence[str] = (),
    augment: bool | None = None,
    seed: int = 0,
    device: str | None = None,
    journal: Journal | None = None,
) -> Metadata:
    """Train a model and write its weights, with what they are, to `out`; an interrupted run goes on where it was.

    Args:
        leave_out: classes (name or index) whose images are never read: this makes a retrained reference.
        augment: mirror and shift images; None: where the data allows it (digits do not).

    Raises:
        InputError: the data, the model or the settings cannot be used.
    """
    journal = journal or Journal()
    check_writable(out)
    workspace = open_workspace(data, model, None, seed=seed, device=device)
    never = resolve_classes(leave_out, workspace.class_names) if leave_out else ()
    preprocessing = workspace.preprocessing
    if workspace.source.mirror_safe if augment is None else augment:
        config = replace(config, flip=True, crop=min(preprocessing.size) // 8)
    table = without(workspace.source.train, never)
    if len(table) == 0:
        raise InputError("expected training images, found none")
    with journal.phase("read images", steps=None) as meter:
        staged = stage(table, preprocessing, skip_bad=data.skip_bad, seed=seed)
        test = stage(without(workspace.test, never), preprocessing, skip_bad=data.skip_bad, shuffle=False)
        meter.samples = len(staged.dataset) + len(test.dataset)
    checkpoint = out.with_name(out.name + ".resume")
    train(
        workspace.model,
        staged.dataset,
        config,
        seed=seed,
        preprocessing=preprocessing,
        journal=journal,
        checkpoint=checkpoint,
        identity=f"{workspace.spec.text} {preprocessing} {data.spec} {count_labels(staged.dataset)}",
    )
    answers = predict(workspace.model, test.dataset, preprocessing=preprocessing, journal=journal, phase="test")
    metadata = Metadata(
        model=workspace.spec.text,
        class_names=workspace.class_names,
        preprocessing=preprocessing,
        never_seen=tuple(workspace.class_names[label] for label in never),
        made_by=f"expunge {__version__} train",
        training={
            "config": asdict(config),
            "seed": seed,
            "data": data.spec,
            "train_samples": len(staged.dataset),
            "skipped_samples": staged.skipped + test.skipped,
            "test_accuracy": accuracy(answers.logits, answers.labels),
            "seconds": sum(phase.seconds for phase in journal.phases if phase.name == "train"),
        },
    )
    save_weights(workspace.model, out, metadata)
    checkpoint.unlink(missing_ok=True)
    return metadata


def forget_command(
    data: DataOptions,
    model: str | None,
    weights: Path,
    classes: Sequence[str],
    out: Path,
    *,
    retain: RetainOptions | None = None,
    method: str = "unsir",
    preset: str = "default",
    settings: Sequence[str] = (),
    retrained: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """Make a trained model forget classes; write `unlearned.safetensors` and `record.json` to the folder `out`.

    The method is handed the retain sample alone. Held-out images, of forgotten classes too where the data has them,
    are read only afterwards, to measure. Nothing is written unless everything succeeded.

    Args:
        model: the model string; None: as the weights say.
        classes: names or indices to forget.
        settings: `name=value` changes of the preset's configuration.
        retrained: weights of the same model trained without the classes, to compare with.

    Raises:
        InputError: something cannot be used; DivergedError where a loss became NaN.
    """
    journal = journal or Journal()
    retain = retain or RetainOptions()
    config = override(_preset(method, preset), settings)
    check_writable(out / "record.json")
    workspace = open_workspace(data, model, weights, seed=seed, device=device)
    names = workspace.class_names
    forget = resolve_classes(classes, names)
    before = tuple(names.index(name) for name in workspace.metadata.forgotten if name in names)
    notes = list(workspace.notes)
    gone = {*forget, *before}
    if len(gone) == len(names):
        raise InputError("expected a class that is still remembered, but every class would be forgotten")

    table, dropped = _retain_table(workspace, data, retain, gone)
    sample = draw(table, per_class=retain.per_class, share=retain.share, seed=seed)
    if dropped:
        notes.append(f"dropped {dropped:,} images of forgotten classes from the retain sample, unread")
    if len(sample) == 0:
        raise InputError("expected a retain sample, found no image of a class to retain")
    reference = None
    if retrained is not None:
        reference = open_workspace(data, model or workspace.spec.text, retrained, seed=seed, device=device)
        if reference.class_names != names:
            raise InputError(f"the classes of {retrained} are not those of {weights}")
        unseen = set(reference.metadata.never_seen)
        if reference.metadata.training is not None and not {names[label] for label in forget} <= unseen:
            raise InputError(f"{retrained} was trained with a class to forget: its metadata names no such omission")
    with journal.phase("read images", steps=None):
        retained = stage(sample, workspace.preprocessing, skip_bad=data.skip_bad, seed=seed)
        test = stage(workspace.test, workspace.preprocessing, skip_bad=data.skip_bad, shuffle=False)
    if len(retained.dataset) == 0:
        raise InputError("expected a retain sample, found no image that can be decoded")
    skipped = retained.skipped + test.skipped
    if skipped:
        notes.append(f"left out {skipped:,} images that cannot be decoded")
    absent = missing_classes(
        count_labels(retained.dataset), [label for label in range(len(names)) if label not in gone], names
    )
    if absent:
        notes.append(f"no retained image of {', '.join(absent)}: what the model knows of it may be lost")

    split = Split(
        forget_classes=forget,
        retain=retained.dataset,
        test=test.dataset,
        class_names=names,
        preprocessing=workspace.preprocessing,
        forgotten_before=tuple(label for label in before if label not in forget),
    )
    journal.phases.clear()  # reading images is no part of the method
    unlearned = METHODS[method](workspace.model, split.zero_glance(), config, seed=seed, journal=journal)
    record = evaluate(
        workspace.model,
        unlearned,
        split,
        reference.model if reference else None,
        method=method,
        config={"preset": preset} | as_json(config),
        seed=seed,
        journal=journal,
    )
    record = replace(
        record,
        model=dict(record.model)
        | {"spec": workspace.spec.text, "weights": str(weights), "retrained": str(retrained) if retrained else None},
        data=dict(record.data)
        | {
            "source": data.spec,
            "retain_source": retain.source,
            "retain_per_class": retain.per_class,
            "retain_share": retain.share,
            "retain_samples": len(retained.dataset),
            "dropped_forgotten": dropped,
            "skipped_bad": skipped,
        },
        notes=tuple(notes),
    )
    metadata = replace(
        workspace.metadata,
        model=workspace.spec.text,
        class_names=names,
        preprocessing=workspace.preprocessing,
        forgotten=tuple(names[label] for label in sorted(gone)),
        made_by=f"expunge {__version__} forget",
    )
    files = (out / "unlearned.safetensors", out / "record.json")
    write_atomically({files[0]: weights_writer(unlearned, metadata), files[1]: json_writer(as_json(record))})
    return Outcome(record, tuple(notes), files)


def demo_command(out: Path, *, seed: int = 0, journal: Journal | None = None) -> Outcome:
    """Train All-CNN-C on scikit-learn's digits, with and without the threes; make the first forget them; judge it."""
    data = DataOptions(spec="digits")
    config = replace(TRAIN_DEFAULT, epochs=DEMO_EPOCHS, batch_size=64)
    original, retrained = out / "original.safetensors", out / "retrained.safetensors"
    train_command(data, "allcnn", original, config=config, seed=seed, journal=journal)
    train_command(data, "allcnn", retrained, config=config, leave_out=["3"], seed=seed, journal=journal)
    sample = RetainOptions(per_class=100)
    return forget_command(
        data, None, original, ["3"], out, retain=sample, settings=DEMO_SETTINGS, retrained=retrained, seed=seed,
        journal=journal,
    )  # fmt: skip


DEMO_EPOCHS = 10
DEMO_SETTINGS = ("impair.batch_size=64", "repair.batch_size=64")  # of 900 images; the default suits thousands


def check_writable(path: Path) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        InputError: it cannot.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{path.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")


def _preset(method: str, preset: str) -> Any:
    if method not in PRESETS:
        raise InputError(f"unknown method {method!r}: expected one of {', '.join(PRESETS)}")
    presets = PRESETS[method]
    if preset not in presets:
        raise InputError(f"unknown preset {preset!r}: expected one of {', '.join(presets)}")
    return presets[preset]()


def _retain_table(
    workspace: Workspace, data: DataOptions, retain: RetainOptions, gone: set[int]
) -> tuple[ImageTable, int]:
    """Return the images a retain sample may be drawn from, and how many of a forgotten class were dropped.

    From the data's train split, rows of forgotten classes are never drawn. A retain source of its own is a statement
    that it has none: one that has is refused, unless told to drop them.
    """
    if retain.source is None:
        return without(workspace.source.train, gone), 0
    source = open_source(retain.source, label_column=data.label_column, image_column=data.image_column)
    source, _ = align(source, workspace.class_names)
    clean = without(source.train, gone)
    dropped = len(source.train) - len(clean)
    if dropped and not retain.drop_forgotten:
        held = [workspace.class_names[label] for label in sorted(gone) if (source.train.labels == label).any()]
        raise InputError(
            f"the retain sample {retain.source!r} has {dropped:,} images of a forgotten class ({', '.join(held)}): "
            "remove them, or pass --drop-forgotten"
        )
    return clean, dropped

"""What the commands do, as functions: strings in, files out."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from expunge import __version__
from expunge.audits import AUDITS, Audit, Subject
from expunge.audits.check import LAYERS, Check
from expunge.audits.ensembles import judge_ensembles, train_ensembles
from expunge.audits.runner import as_figure
from expunge.audits.self_checks import check_held_out
from expunge.config import as_json, override, precision_settings
from expunge.data import (
    ImageTable,
    Staged,
    StreamedImages,
    TensorImages,
    count_labels,
    draw,
    labels_of,
    missing_classes,
    open_source,
    stage,
    without,
)
from expunge.errors import DivergedError, InputError
from expunge.evaluation import evaluate
from expunge.files import bytes_writer, digest, json_text, json_writer, write_atomically
from expunge.journal import Journal
from expunge.ledger import NAME as LEDGER
from expunge.ledger import Transaction, check_usable, now, writing
from expunge.methods import METHODS, PRESETS
from expunge.metrics import accuracy
from expunge.models import reinitialized
from expunge.pictures import learned_record
from expunge.processes import agreed, ranks
from expunge.provenance import (
    RECORD,
    SAMPLE,
    SampleHashes,
    code_digests,
    hash_samples,
    new_salt,
    parent_of,
    sample_hash,
    seal,
    signed_names,
    tensors_digest,
    weights_digests,
)
from expunge.report import html_writer
from expunge.report.rerun import rerun
from expunge.schema import IMAGES, PAGE, Phase, Precision, Preprocessing, Record, Split, TrainConfig
from expunge.signing import SIGNATURE, check_private, sign_folder
from expunge.training import predict, train
from expunge.verdict import COSTLY, verdict
from expunge.weights import (
    UNLEARNED,
    Metadata,
    apply_weights,
    load_weights,
    save_weights,
    weights_content,
    weights_file,
)
from expunge.workspace import DataOptions, Workspace, align, open_workspace, refuse_idle_columns

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
        if self.drop_forgotten and self.source is None:
            raise InputError("--drop-forgotten means nothing without --retain: of --data no forgotten class is drawn")


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What is kept of a run beside its record."""

    ledger: Path | None = None  # where it is entered; None: nowhere
    key: Path | None = None  # private key to sign with; None: not signed
    password: str | None = None  # of the key
    include_images: bool = False  # keep pictures of samples beside the record, and show them on its page

    def signer(self) -> str | None:
        """Return the id of the key to sign with, and find out before the work whether key and ledger can be used.

        Raises:
            InputError: they cannot.
        """
        if self.ledger is not None:
            check_writable(self.ledger)
            check_usable(self.ledger)
        return check_private(self.key, self.password) if self.key is not None else None


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
    per_class: int | None = None,
    augment: bool | None = None,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    journal: Journal | None = None,
) -> Metadata:
    """Train a model and write its weights, with what they are, to `out`; an interrupted run goes on where it was.

    Args:
        out: a name that ends in .safetensors.
        leave_out: classes (name or index) whose images are never read: this makes a retrained reference.
        per_class: so many images of each class, drawn at random with a fixed seed, so that a reference is trained on
            the same ones; None: all.
        augment: mirror and shift images; None: where the data allows it (digits do not).
        overwrite: replace weights that are there.

    Raises:
        InputError: the data, the model, the settings or the name `out` cannot be used, or `out` is there already.
    """
    journal = journal or Journal()
    if out.suffix != ".safetensors":  # by which load_weights knows what it reads
        raise InputError(f"expected --out to end in .safetensors, the format that is written, got {out}")
    check_place([out], overwrite)
    workspace = open_workspace(data, model, None, leave_out=leave_out, seed=seed, device=device)
    never = workspace.left_out
    refuse_idle_columns(data, workspace.source)
    if len(workspace.class_names) < 2:
        raise InputError(f"expected two classes at least to train on, found {', '.join(workspace.class_names)} alone")
    preprocessing = workspace.preprocessing
    if workspace.source.mirror_safe if augment is None else augment:
        config = replace(config, flip=True, crop=min(preprocessing.size) // 8)
    table = without(draw(workspace.source.train, per_class=per_class, seed=0), never)
    held_out = without(workspace.test, never)
    if len(held_out) == 0:
        raise InputError("expected held-out images to test on, found none: add a test split, or more images a class")
    with journal.phase("read images", steps=None) as meter:
        staged = stage(table, preprocessing, skip_bad=data.skip_bad, seed=seed, held=data.memory)
        test = stage(held_out, preprocessing, skip_bad=data.skip_bad, shuffle=False, held=data.memory)
        meter.samples = len(staged.dataset) + len(test.dataset)
        absent = missing_classes(
            count_labels(staged.dataset), sorted({*range(len(workspace.class_names))} - {*never}), workspace.class_names
        )
        told = [f"no image of {', '.join(absent)} to train on"] if absent else []
        told += [f"left out {bad:,} images that cannot be decoded"] if (bad := staged.num_bad + test.num_bad) else []
        meter.note = "; ".join([*workspace.notes, *told])
    if not len(staged.dataset) or not len(test.dataset):
        raise InputError(f"expected images that can be decoded in {data.spec!r}, to train and to test on, found none")
    checkpoint = out.with_name(out.name + ".resume")
    phase = "train" + (f" without {', '.join(workspace.class_names[label] for label in never)}" if never else "")
    try:
        train(
            workspace.model,
            staged.dataset,
            config,
            seed=seed,
            preprocessing=preprocessing,
            journal=journal,
            phase=phase,
            checkpoint=checkpoint,
            identity=f"{workspace.spec.text} {preprocessing} {data.spec} {count_labels(staged.dataset)}",
        )
    except DivergedError:
        checkpoint.unlink(missing_ok=True)  # it would again, and another rate is another training
        raise
    answers = predict(workspace.model, test.dataset, preprocessing=preprocessing, journal=journal, phase="test")
    metadata = Metadata(
        model=workspace.spec.text,
        class_names=workspace.class_names,
        preprocessing=preprocessing,
        never_seen=tuple(workspace.class_names[label] for label in never),
        made_by=f"expunge {__version__} train",
        trained_on=data.spec,
        training={
            "config": asdict(config),
            "seed": seed,
            "data": data.spec,
            "per_class": per_class,
            "train_samples": len(staged.dataset),
            "skipped_samples": staged.num_bad + test.num_bad,
            "test_accuracy": accuracy(answers.logits, answers.labels),
            "seconds": next(done.seconds for done in reversed(journal.phases) if done.name == phase),
        },
    )
    if ranks().first:
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
    precision: Precision = "auto",
    retrained: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    keep: RecordOptions | None = None,
    overwrite: bool = False,
    journal: Journal | None = None,
) -> Outcome:
    """Make a trained model forget classes; write the weights, the record, its page and the retain hashes to `out`.

    The method is handed the retain sample alone. Held-out images, of forgotten classes too where the data has them,
    are decoded before, so that one that cannot be is told before the work, and are used only afterwards, to measure.
    Nothing is written unless everything succeeded.

    Args:
        model: the model string; None: as the weights say.
        classes: names or indices to forget.
        settings: `name=value` changes of the preset's configuration.
        precision: of every training in it, where it is not "auto".
        retrained: weights of the same model trained without the classes, to compare with.
        keep: the ledger to enter the erasure in, the key to sign it with, and whether to keep pictures; None: neither.
        overwrite: replace what an earlier run wrote to `out`.

    Raises:
        InputError: something cannot be used, or `out` holds what an earlier run wrote.
        DivergedError: a loss became NaN.
    """
    journal = journal or Journal()
    retain = retain or RetainOptions()
    keep = keep or RecordOptions()
    if precision != "auto":
        TrainConfig(precision=precision)  # refuses what is none, in words of --precision rather than of --set
        changes = precision_settings(as_json(_preset(method, preset)), precision)
        if not changes:
            raise InputError(f"{method} trains nothing that could be done in {precision}: leave --precision out")
        settings = [*settings, *changes]
    check_place([out / name for name in (*OF_RECORD, UNLEARNED, SAMPLE)], overwrite)
    for given in (weights, retrained):
        if given is not None and weights_file(given).resolve() == (out / UNLEARNED).resolve():
            raise InputError(f"{given} is what would be written over: name another --out, and what was there is kept")
    _check_kind(out, "forget")
    signer = keep.signer() if ranks().first else None
    before = weights_digests(weights)
    task = prepare(
        data, model, weights, classes,
        retain=retain, method=method, preset=preset, settings=settings, retrained=retrained, seed=seed, device=device,
        journal=journal,
    )  # fmt: skip
    workspace, notes = task.workspace, list(task.notes)
    names = workspace.class_names
    with journal.phase("read held-out images", steps=None):
        test = _held_out(workspace, data)  # those of forgotten classes among them; the method is not handed it
    if retain.source is not None:
        held: Any = test.dataset
        notes += _seen_and_measured(task.samples, held)
    done = erase(task, journal=journal)
    record = evaluate(
        workspace.model,
        done.unlearned,
        replace(task.split, forget=None, test=test.dataset),
        task.reference.model if task.reference else None,
        retrained_preprocessing=task.reference.preprocessing if task.reference else None,
        method=method,
        config={"preset": preset, "settings": list(settings)} | as_json(task.config) | _asked_for(keep),
        seed=seed,
        phases=done.phases,
        journal=journal,
    )
    pictures: dict[str, Any] | None = {} if keep.include_images else None
    learned = learned_record(journal.learned, workspace.model, done.unlearned, names, workspace.preprocessing, pictures)
    skipped = task.num_bad + test.num_bad
    if skipped:
        notes.append(f"left out {skipped:,} images that cannot be decoded")
    notes += [*record.notes, *journal.notes]
    if ranks().size > 1:
        notes.append(f"done by {ranks().size} processes together")
    metadata = replace(
        workspace.metadata,
        model=workspace.spec.text,
        class_names=names,
        preprocessing=workspace.preprocessing,
        forgotten=tuple(
            name for name in names if names.index(name) in workspace.left_out or name in workspace.metadata.forgotten
        ),
        made_by=f"expunge {__version__} forget",
        training=None,  # its accuracy was the original's
        trained_on=workspace.trained_on,
    )
    parent = parent_of(weights, before["tensors"], workspace.metadata.forgotten)
    if parent is not None and parent["content_hash"] is None:
        notes.append("the weights say that classes were forgotten before, and the record of that is not beside them")
    content = weights_content(done.unlearned, metadata)
    files = {UNLEARNED: content, SAMPLE: json_text(task.samples.as_json()).encode()}
    record = replace(
        record,
        model=dict(record.model)
        | {"spec": workspace.spec.text, "weights": str(weights), "retrained": str(retrained) if retrained else None},
        data=dict(record.data)
        | {
            "source": data.spec,
            "test_from": workspace.test_from,
            "retain_source": retain.source,
            "retain_per_class": retain.per_class,
            "retain_share": retain.share,
            "retain_samples": task.num_retained,
            "dropped_forgotten": task.dropped,
            "skipped_bad": skipped,
            "options": _as_given(data),
        },
        learned=learned,
        notes=tuple(notes),
        provenance={
            "kind": "forget",
            "weights": {
                "original": before,
                "unlearned": {"file": digest(content), "tensors": tensors_digest(done.unlearned.state_dict())},
            }
            | ({"retrained": weights_digests(retrained)} if retrained is not None else {}),
            "retain_sample": {"fingerprint": task.samples.fingerprint, "count": len(task.samples.hashes)},
            "parent": parent,
            "signer": signer,
        },
    )
    return _keep(record, out, files, keep, pictures)


OF_RECORD = (RECORD, PAGE, IMAGES, SIGNATURE)
"""Names of what is written with a record, or removed since it was of the one before."""


@dataclass(frozen=True)
class Task:
    """What a method is to be run on, opened and checked."""

    workspace: Workspace
    method: str
    config: Any
    seed: int
    split: Split  # what the method is handed
    reference: _Sibling | None  # the retrained model
    samples: SampleHashes
    num_retained: int
    num_bad: int  # retained images that could not be decoded
    dropped: int  # images of forgotten classes that were left out of the retain source
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Erasure:
    """What a method made of a model; nothing of it is written yet."""

    task: Task
    unlearned: nn.Module
    phases: Sequence[Phase]  # of the method


def prepare(
    data: DataOptions,
    model: str | None,
    weights: Path,
    classes: Sequence[str],
    *,
    retain: RetainOptions,
    method: str,
    preset: str,
    settings: Sequence[str],
    retrained: Path | None = None,
    seed: int,
    device: str | None,
    salt: str | None = None,
    journal: Journal,
) -> Task:
    """Open and check what an erasure needs, before its work: what `expunge verify --replay` runs again too.

    Args:
        salt: to hash the retain sample with; None: a new one.

    Raises:
        InputError: something cannot be used.
    """
    config = override(_preset(method, preset), settings)
    workspace = open_workspace(data, model, weights, leave_out=classes, seed=seed, device=device)
    names, forget = workspace.class_names, workspace.left_out
    never = [names[label] for label in forget if label in workspace.gone_before]
    if never:
        which = "were" if len(never) > 1 else "was"
        raise InputError(
            f"nothing to forget: the weights say that {', '.join(never)} {which} forgotten before or never seen"
        )
    before = workspace.gone_before
    gone = {*forget, *before}
    notes = [*workspace.notes, *workspace.held_out_notes()]
    if before:
        listed = ", ".join(names[label] for label in before)
        notes.append(f"kept out too, for the weights say they were forgotten or never seen: {listed}")
    if len(workspace.test) == 0:
        raise InputError("expected held-out images to measure on, found none: add a test split, or more images a class")

    table, dropped, said = _retain_table(workspace, data, retain, gone)
    notes += said
    sample = draw(table, per_class=retain.per_class, share=retain.share, seed=seed)
    if dropped:
        notes.append(f"dropped {dropped:,} images of forgotten classes from the retain sample, unread")
    if len(sample) == 0:
        raise InputError("expected a retain sample, found no image of a class to retain")
    reference = _retrained(workspace, retrained) if retrained is not None else None
    if reference is not None and _same_tensors(reference.model, workspace.model):
        raise InputError(f"{retrained} holds the original weights: expected a model trained without the classes")
    with journal.phase("read images", steps=None):
        retained = stage(sample, workspace.preprocessing, skip_bad=data.skip_bad, seed=seed, held=data.memory)
        samples, retained = hash_samples(retained, salt=salt or new_salt())
    if len(retained.dataset) == 0:
        raise InputError("expected a retain sample, found no image that can be decoded")
    absent = missing_classes(
        count_labels(retained.dataset), [label for label in range(len(names)) if label not in gone], names
    )
    if absent:
        notes.append(f"no retained image of {', '.join(absent)}: what the model knows of it may be lost")

    split = Split(
        forget_classes=forget,
        retain=retained.dataset,
        forget=_forget_samples(workspace, data, retain, method, seed),
        class_names=names,
        preprocessing=workspace.preprocessing,
        forgotten_before=before,
    )
    return Task(
        workspace=workspace,
        method=method,
        config=config,
        seed=seed,
        split=split,
        reference=reference,
        samples=samples,
        num_retained=len(sample) - retained.num_bad,
        num_bad=retained.num_bad,
        dropped=dropped,
        notes=tuple(notes),
    )


def erase(task: Task, *, journal: Journal) -> Erasure:
    """Run a method on what was prepared for it, and write nothing.

    Raises:
        DivergedError: a loss became NaN.
    """
    started = len(journal.phases)
    unlearned = METHODS[task.method](task.workspace.model, task.split, task.config, seed=task.seed, journal=journal)
    return Erasure(task, unlearned, journal.phases[started:])


def _held_out(workspace: Workspace, data: DataOptions) -> Staged:
    """Stage the test images; of those that are streamed each is decoded once, to find the ones that cannot be.

    Raises:
        InputError: one cannot be decoded, and bad ones are not to be skipped.
    """
    test = stage(workspace.test, workspace.preprocessing, skip_bad=data.skip_bad, shuffle=False, held=data.memory)
    if isinstance(test.dataset, StreamedImages) and not data.skip_bad:
        for _ in test.dataset:
            pass
    return test


def _asked_for(keep: RecordOptions) -> dict[str, Any]:
    """Return what the configuration says of pictures: nothing where none were asked for."""
    return {"include_images": True} if keep.include_images else {}


def _keep(
    record: Record,
    out: Path,
    files: Mapping[str, bytes],
    keep: RecordOptions,
    pictures: Mapping[str, Any] | None = None,
) -> Outcome:
    """Write a record, its page and the files it vouches for, all or none; enter it in the ledger; sign it.

    Of several processes, the first does.
    """
    if not ranks().first:
        return Outcome(record, record.notes, ())
    if pictures is not None:
        files = dict(files) | {IMAGES: json_text(pictures).encode()}
    with _entry(keep.ledger) as entry:
        made = dict(record.provenance or {}) | {
            "created": now(),
            "files": {name: digest(content) for name, content in files.items()},
            "code": code_digests(),
            "ledger": entry.place if entry is not None else None,
        }
        content = seal(as_json(replace(record, provenance=made)))
        writers = {out / name: bytes_writer(held) for name, held in files.items()}
        writers |= {out / RECORD: json_writer(content), out / PAGE: html_writer(content, pictures)}
        if entry is not None:  # before there are files that say so; it counts once this block is left
            entry.append(ledger_entry(content, out))
        write_atomically(writers)
        for name in {SIGNATURE, IMAGES} - set(files):
            (out / name).unlink(missing_ok=True)  # of what was there before
    paths = [*writers]
    if keep.key is not None:
        paths.append(sign_folder(out, signed_names(content), keep.key, keep.password))
    if keep.ledger is not None:
        paths.append(keep.ledger)
    return Outcome(replace(record, provenance=content["provenance"]), record.notes, tuple(paths))


def measure_again(
    data: DataOptions,
    model: str | None,
    weights: Path,
    unlearned: Path,
    classes: Sequence[str],
    *,
    retrained: Path | None,
    seed: int,
    device: str | None,
    journal: Journal,
) -> Record:
    """Measure weights that were unlearned as `forget_command` measured them, and write nothing.

    Raises:
        InputError: something cannot be used.
    """
    workspace = open_workspace(data, model, weights, leave_out=classes, seed=seed, device=device)
    after = _sibling(workspace, unlearned)
    reference = _retrained(workspace, retrained) if retrained is not None else None
    test = stage(
        workspace.test, workspace.preprocessing, skip_bad=data.skip_bad, shuffle=False, held=data.memory
    ).dataset
    split = Split(
        forget_classes=workspace.left_out,
        retain=TensorImages(torch.empty(0), torch.empty(0, dtype=torch.int64)),  # none is read to measure
        test=test,
        class_names=workspace.class_names,
        preprocessing=workspace.preprocessing,
        forgotten_before=tuple(label for label in workspace.gone_before if label not in workspace.left_out),
    )
    return evaluate(
        workspace.model,
        after.model,
        split,
        reference.model if reference else None,
        retrained_preprocessing=reference.preprocessing if reference else None,
        seed=seed,
        journal=journal,
    )


@contextmanager
def _entry(ledger: Path | None) -> Iterator[Transaction | None]:
    if ledger is None:
        yield None
    else:
        with writing(ledger) as entry:
            yield entry


def ledger_entry(content: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return what the ledger keeps of a sealed record: what, from which model, when, by which command, how it went."""
    provenance = content["provenance"]
    judged = content["verdict"]
    layers = {name: judged[name]["answer"] for name in LAYERS} if judged else None
    return {
        "time": provenance["created"],
        "command": provenance["kind"],
        "method": content["method"],
        "classes": content["classes"]["forget"],
        "model": content["model"]["spec"],
        "seed": content["seed"],
        "original": provenance["weights"]["original"]["tensors"],
        "unlearned": provenance["weights"]["unlearned"]["tensors"],
        "verdict": layers or {name: content["checks"][name] for name in ("forgotten", "kept", "signals")},
        "record": str(out.absolute()),
        "again": (rerun(content) or {}).get("command"),
        "content_hash": content["content_hash"],
    }


def _as_given(data: DataOptions) -> dict[str, Any]:
    """Return how the data was to be read, where that was said."""
    return {name: value for name, value in as_json(data).items() if name != "spec" and value not in (None, False)}


def audit_command(
    data: DataOptions,
    model: str | None,
    original: Path,
    unlearned: Path,
    out: Path,
    *,
    classes: Sequence[str] = (),
    retrained: Sequence[Path] = (),
    audits: Sequence[str] = (),
    training_data: bool = True,
    called: str | None = None,
    ensembles: EnsembleOptions | None = None,
    seed: int = 0,
    device: str | None = None,
    keep: RecordOptions | None = None,
    overwrite: bool = False,
    journal: Journal | None = None,
) -> Outcome:
    """Judge an unlearned model, made by anyone with any tool; write `record.json` and its page to the folder `out`.

    Args:
        model: the model string; None: as the weights say.
        classes: names or indices that were to be forgotten; empty: those that `unlearned` says it forgot and `original`
            does not. Others that either says were forgotten count for neither side.
        retrained: weights of the same model trained without the classes; of several, the first is what is compared
            with, and how far the second is from it is the noise floor.
        audits: names of the attacks to run; empty: all of the default budget.
        training_data: the train images of `data` are those the original was trained on; False: none of `data` is.
        called: what the record calls `data`, where one is measured again and the data lies elsewhere by now.
        ensembles: train many models and judge the method by them too (hours); None: do not. Their answers are kept in
            `out`/ensembles, and an interrupted run goes on with the next model.
        seed: of all randomness.
        keep: the ledger to enter the audit in, the key to sign it with, and whether to keep pictures; None: neither.
        overwrite: replace the record that an earlier run wrote to `out`.

    Raises:
        InputError: something cannot be used, or `out` holds the record of an earlier run.
    """
    journal = journal or Journal()
    keep = keep or RecordOptions()
    chosen = _audits(audits)
    check_place([out / name for name in OF_RECORD], overwrite)
    _check_kind(out, "audit")
    signer = keep.signer()
    classes = classes or _newly_forgotten(original, unlearned)
    workspace = open_workspace(data, model, original, leave_out=classes, seed=seed, device=device)
    refuse_idle_columns(data, workspace.source)
    subject = _sibling(workspace, unlearned)
    references = [_retrained(workspace, path) for path in retrained]
    gone, said = _gone_besides(workspace, subject.metadata, [one.metadata for one in references])
    workspace = replace(workspace, gone_before=gone)
    named = replace(workspace, source=replace(workspace.source, spec=called or workspace.source.spec))
    unseen = named.held_out_notes() if training_data else []
    notes = [*workspace.notes, *unseen, *said]
    split, skipped = _audit_split(workspace, data, training_data, journal)
    pictures: dict[str, Any] | None = {} if keep.include_images else None
    if training_data:
        notes.append("the train images of --data are taken for those the original was trained on")
    record = evaluate(
        workspace.model,
        subject.model,
        split,
        references[0].model if references else None,
        unlearned_preprocessing=subject.preprocessing,
        retrained_preprocessing=references[0].preprocessing if references else None,
        more_retrained=[(one.model, one.preprocessing) for one in references[1:]],
        audits=chosen,
        retrained_metadata=[one.metadata for one in references],
        method=f"audit of {subject.metadata.made_by or 'unknown'}",
        config={"audits": list(audits), "training_data": training_data, "ensembles": as_json(ensembles)}
        | _asked_for(keep),
        seed=seed,
        journal=journal,
        pictures=pictures,
    )
    many = {}
    if ensembles is not None:
        many = _judged_by_many(workspace, split, ensembles, out / "ensembles", seed, journal)
    told, checks = dict(record.audits) | many, [*_checks(record), *check_held_out(unseen)]
    record = replace(
        record,
        audits=told,
        self_checks=tuple(asdict(check) for check in checks),
        verdict=verdict(record.metrics, told, checks),
    )
    if skipped:
        notes.append(f"left out {skipped:,} images that cannot be decoded")
    notes += [note for note in record.notes if note not in notes]
    record = replace(
        record,
        model=dict(record.model)
        | {
            "spec": workspace.spec.text,
            "original": str(original),
            "unlearned": str(unlearned),
            "retrained": [str(path) for path in retrained],
        },
        data=dict(record.data)
        | {
            "source": data.spec,
            "test_from": workspace.test_from if training_data else "all",
            "train_samples": len(split.forget) + len(split.retain) if split.forget is not None else 0,  # type: ignore[arg-type]
            "skipped_bad": skipped,
            "options": _as_given(data),
        },
        samples_read={
            name: record.samples_read[name] for name in ("evaluation", "evaluation_training")
        },  # no method ran
        notes=tuple(notes),
        provenance={
            "kind": "audit",
            "weights": {
                "original": weights_digests(original),
                "unlearned": (after := weights_digests(unlearned)),
                "retrained": [weights_digests(path) for path in retrained],
            },
            "retain_sample": None,
            "parent": parent_of(unlearned, after["tensors"], ()),
            "signer": signer,
        },
    )
    return _keep(record, out, {}, keep, pictures)


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions:
    """How the many models are made that U-LiRA and forgetting quality need."""

    members: int = 8  # originals to unlearn, and as many retrained ones
    method: str = "unsir"
    preset: str = "default"
    recipe: TrainConfig = TRAIN_DEFAULT


def _judged_by_many(
    workspace: Workspace, split: Split, options: EnsembleOptions, folder: Path, seed: int, journal: Journal
) -> dict[str, dict[str, Any]]:
    """Return what U-LiRA and forgetting quality find on models trained for it, as `run_audits` would tell it."""
    if split.forget is None or split.test is None:
        raise InputError("ensembles are trained on the train images of --data: they do not go with --no-training-data")
    config = _preset(options.method, options.preset)
    retained = split.retain
    everything: Any = ConcatDataset([split.forget, retained])

    def trained(images: Any, number: int, name: str) -> Subject:
        model = reinitialized(workspace.model, seed=number)
        train(
            model, images, options.recipe, seed=number, preprocessing=split.preprocessing, journal=journal, phase=name
        )
        return Subject("retrained", model, split.preprocessing)

    def unlearned(original: Subject, number: int) -> Subject:
        handed = split if "forget" in METHODS[options.method].reads else split.zero_glance()
        model = METHODS[options.method](
            original.model, replace(handed, test=None), config, seed=number, journal=journal
        )
        return Subject("unlearned", model, split.preprocessing)

    labels = labels_of(split.test)
    gone = list(split.gone)
    found = judge_ensembles(
        train_ensembles(
            lambda number: trained(everything, number, "ensemble original"),
            unlearned,
            lambda number: trained(retained, number, "ensemble retrained"),
            {
                "forget": split.forget,
                "retain": split.retain,
                "test": Subset(split.test, np.flatnonzero(~np.isin(labels, gone)).tolist()),
            },
            folder,
            count=options.members,
            seed=seed,
            identity=f"{workspace.spec.text} {split.forget_classes} {options} {count_labels(everything)}",
        ),
        seed=seed,
    )
    shared: dict[str, Any] = {"needs": ["ensemble"], "skipped": None, "seconds": 0.0, "compared": {}}
    return {
        "u_lira": shared
        | {
            "says": "whether anyone could tell the method's models from retrained ones, by their answers on one sample",
            "source": "arXiv:2403.01218",
            "targets": {"u_lira": "none", "u_lira true positives": "none"},
            "figures": {
                name: {"unlearned": as_figure(found.figures[name])} for name in ("u_lira", "u_lira true positives")
            },
            "details": {"unlearned": dict(found.details)},
        },
        "forgetting_quality": shared
        | {
            "says": "how like the method's models are to retrained ones, sample by sample, under the best threshold",
            "source": "arXiv:2406.09073",
            "targets": {"forgetting quality": "high"},
            "figures": {"forgetting quality": {"unlearned": as_figure(found.figures["forgetting quality"])}},
            "details": {"unlearned": dict(found.details)},
        },
    }


def _checks(record: Record) -> list[Check]:
    return [Check(**check) for check in record.self_checks]


AUDIT_IMAGES = 20_000  # of the train and of the held-out images each, at most, drawn evenly from the classes
AUDIT_BYTES = 2**30  # or so many as take this much memory: audits read them many times, in any order


def _audit_split(workspace: Workspace, data: DataOptions, training_data: bool, journal: Journal) -> tuple[Split, int]:
    """Return the split that audits read, all of it in memory, and how many images could not be decoded."""
    size = workspace.preprocessing.channels * workspace.preprocessing.size[0] * workspace.preprocessing.size[1]
    held = data.memory or AUDIT_BYTES
    most = max(1, min(AUDIT_IMAGES, held // size) // len(workspace.class_names))
    held = max(held, most * len(workspace.class_names) * size)  # one of each class, whatever it takes
    trained_on = (workspace.metadata.training or {}).get("train_samples")
    per_class = most
    if training_data and trained_on and trained_on < len(workspace.source.train):  # trained with --per-class
        per_class = max(1, min(most, trained_on // len(workspace.class_names)))
    # seed 0 is what `train --per-class` draws with: a smaller draw is part of a larger one
    known = draw(workspace.source.train, per_class=per_class, seed=0)
    held_out = draw(workspace.test, per_class=most, seed=0)
    if len(held_out) == 0:
        raise InputError("expected held-out images to measure on, found none: add a test split, or more images a class")
    forget = set(workspace.left_out)
    before = tuple(label for label in workspace.gone_before if label not in forget)
    with journal.phase("read images", steps=None):
        staged = {
            "retain": stage(
                without(known, {*forget, *before}),
                workspace.preprocessing,
                skip_bad=data.skip_bad,
                held=held,
            ),
            "forget": stage(
                without(known, set(range(len(workspace.class_names))) - forget),
                workspace.preprocessing,
                skip_bad=data.skip_bad,
                held=held,
            ),
            "test": stage(held_out, workspace.preprocessing, skip_bad=data.skip_bad, shuffle=False, held=held),
        }
    parts = {name: one.dataset for name, one in staged.items()}
    split = Split(
        forget_classes=workspace.left_out,
        retain=parts["retain"],
        forget=parts["forget"],
        test=parts["test"],
        class_names=workspace.class_names,
        preprocessing=workspace.preprocessing,
        forgotten_before=before,
    )
    if not training_data:
        split = replace(split, retain=Subset(parts["test"], []), forget=None, test=ConcatDataset(list(parts.values())))
    elif len(labels_of(parts["forget"])) == 0:
        split = replace(split, forget=None)
    return split, sum(one.num_bad for one in staged.values())


def _newly_forgotten(original: Path, unlearned: Path) -> tuple[str, ...]:
    """Return the classes that the unlearned weights say were forgotten, and the original's do not."""
    before, after = (load_weights(path)[1] for path in (original, unlearned))
    names = tuple(name for name in after.forgotten if name not in before.forgotten)
    if not names:
        raise InputError(f"{unlearned} does not say which classes were to be forgotten: name them with --classes")
    return names


def _gone_besides(
    workspace: Workspace, unlearned: Metadata, retrained: Sequence[Metadata]
) -> tuple[tuple[int, ...], list[str]]:
    """Return the labels that are gone besides those to judge, and what to say of them.

    These are what the original's weights say was forgotten or never seen, and what the unlearned ones say. The
    retrained model's file only agrees or disagrees: a class that it alone never saw the unlearned model still has to
    know.

    Raises:
        InputError: the unlearned weights name a class that is none.
    """
    names, forget = workspace.class_names, {workspace.class_names[label] for label in workspace.left_out}
    unknown = [name for name in (*unlearned.forgotten, *unlearned.never_seen) if name not in names]
    if unknown:
        raise InputError(f"the unlearned weights say they forgot {', '.join(unknown)}, which is no class of the model")
    own = {*unlearned.forgotten, *unlearned.never_seen}
    before = {names[label] for label in workspace.gone_before}
    gone = [name for name in names if name in own | before and name not in forget]
    notes = []
    if new := [name for name in gone if name not in before]:
        listed = ", ".join(new)
        notes.append(
            f"not counted as retained, for the unlearned weights say they were forgotten or never seen: {listed}"
        )
    for metadata in retrained:
        says = metadata.training is not None or metadata.never_seen
        theirs = [name for name in names if name in metadata.never_seen and name not in forget]
        if says and theirs != gone:
            notes.append(
                "the unlearned and the retrained weights disagree on what else was left out: the first say "
                f"{', '.join(gone) or 'nothing'}, the second {', '.join(theirs) or 'nothing'}; what the first say is "
                "not counted as retained"
            )
            break
    return tuple(names.index(name) for name in gone), notes


def _audits(names: Sequence[str]) -> list[Audit]:
    unknown = [name for name in names if name not in AUDITS]
    if unknown:
        if unknown[0] in COSTLY:
            raise InputError(f"{unknown[0]} trains many models and runs with --budget large alone, beside the others")
        raise InputError(f"unknown audit {unknown[0]!r}: expected some of {', '.join(AUDITS)}")
    return [audit for name, audit in AUDITS.items() if (name in names if names else audit.budget == "default")]


def demo_command(out: Path, *, seed: int = 0, journal: Journal | None = None) -> Outcome:
    """Train All-CNN-C on scikit-learn's digits, with and without the threes; make the first forget them; judge it."""
    data = DataOptions(spec="digits")
    config = replace(TRAIN_DEFAULT, epochs=DEMO_EPOCHS, batch_size=64)
    original, retrained = out / "original.safetensors", out / "retrained.safetensors"
    _check_demo(out, (original, retrained))
    for path, leave_out in ((original, ()), (retrained, ("3",))):
        train_command(
            data, "allcnn", path, config=config, leave_out=leave_out, seed=seed, overwrite=True, journal=journal
        )
    sample = RetainOptions(per_class=100)
    return forget_command(
        data, None, original, ["3"], out, retain=sample, preset="fast", retrained=retrained, seed=seed, journal=journal,
        keep=RecordOptions(ledger=out / LEDGER), overwrite=True,
    )  # fmt: skip


DEMO_EPOCHS = 10


def _check_demo(out: Path, weights: Sequence[Path]) -> None:
    """Find out whether an earlier demo wrote what lies in `out`: this one replaces that, and nothing else.

    Raises:
        InputError: something else lies there.
    """
    for path in weights:
        if path.is_file():
            said = load_weights(path)[1]
            training = said.training or {}
            epochs = (training.get("config") or {}).get("epochs")
            if (said.model, training.get("data"), epochs) != ("allcnn", "digits", DEMO_EPOCHS):
                raise InputError(f"{path} is not of an earlier demo: name another --out")
    there = next((path for name in (*OF_RECORD, UNLEARNED, SAMPLE) if (path := out / name).exists()), None)
    if there is None:
        return
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        made, model, forgot = record["method"], Path(record["model"]["weights"]), record["classes"]["forget"]
        own = (made, model.name, record["data"]["source"], forgot) == ("unsir", weights[0].name, "digits", ["3"])
    except (OSError, ValueError, KeyError, TypeError):
        own = False
    if not own or (out / SIGNATURE).exists():
        raise InputError(f"{there} is not of an earlier demo: name another --out")


def check_place(paths: Sequence[Path], overwrite: bool) -> None:
    """Find out before the work whether its results can be written, and whether an earlier run's lie there.

    Of several processes, the first does, and all go by what it found.

    Raises:
        InputError: they cannot; or one of `paths` is there, and is not to be overwritten.
    """
    there = None
    if ranks().first:
        for path in paths:
            check_writable(path)
        there = next((path for path in paths if path.exists()), None)
    there = agreed(there)
    if there is not None and not overwrite:
        raise InputError(f"{there} is there already: name another --out, or pass --overwrite to replace it")


def _check_kind(out: Path, kind: str) -> None:
    """Refuse to replace what another command wrote: in the place of an erasure's record an audit orphans its weights.

    Raises:
        InputError: the record in `out` is of another kind.
    """
    path = out / OF_RECORD[0]
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        there = content["provenance"]["kind"]
    except (ValueError, KeyError, TypeError):  # none, or none that can be read: `check_place` has let it be replaced
        return
    if there != kind:
        raise InputError(f"{path} is the record of expunge {there}: name another --out")


def check_writable(path: Path) -> None:
    """Find out before the work whether its result can be written; leaves nothing behind.

    Raises:
        InputError: it cannot.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror or error}") from error


def _forget_samples(workspace: Workspace, data: DataOptions, retain: RetainOptions, method: str, seed: int) -> Any:
    """Return training images of the classes to forget, for a method that reads them; None for a zero-glance one.

    They are drawn as retained ones are, so many of each class or such a share: a method that reads both expects them in
    the shares that the training set had.
    """
    if METHODS[method].zero_glance:
        return None
    others = set(range(len(workspace.class_names))) - set(workspace.left_out)
    table = without(workspace.source.train, others)
    if len(table) == 0:
        raise InputError(
            f"the method {method} reads images of the classes to forget, and the data has none to train on"
        )
    sample = draw(table, per_class=retain.per_class, share=retain.share, seed=seed)
    return stage(sample, workspace.preprocessing, skip_bad=data.skip_bad, seed=seed, held=data.memory).dataset


def _preset(method: str, preset: str) -> Any:
    if method not in PRESETS:
        raise InputError(f"unknown method {method!r}: expected one of {', '.join(PRESETS)}")
    presets = PRESETS[method]
    if preset not in presets:
        raise InputError(f"unknown preset {preset!r}: expected one of {', '.join(presets)}")
    return presets[preset]()


def _same_place(one: str, other: str) -> bool:
    """Return whether two sources are one, however they are spelled."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def _seen_and_measured(samples: SampleHashes, test: Iterable[tuple[Tensor, int]]) -> list[str]:
    """Return a note where held-out images are in a retain sample of somebody's own."""
    held = Counter(sample_hash(samples.salt, image, int(label)) for image, label in test)
    both = (held & Counter(samples.hashes)).total()
    told = f"{both:,} of {held.total():,} held-out images are in the retain sample too: of the rest they tell too much"
    return [told] if both else []


def _retain_table(
    workspace: Workspace, data: DataOptions, retain: RetainOptions, gone: set[int]
) -> tuple[ImageTable, int, list[str]]:
    """Return the images a retain sample may be drawn from, how many of a forgotten class were dropped, and notes.

    From the data's train split, rows of forgotten classes are never drawn. A retain source of its own is a statement
    that it has none: one that has is refused, unless told to drop them.
    """
    if retain.source is None:
        refuse_idle_columns(data, workspace.source)
        return without(workspace.source.train, gone), 0, []
    source, notes = workspace.source, list[str]()  # whose held-out images are cut off
    if not _same_place(retain.source, data.spec):
        source = open_source(retain.source, label_column=data.label_column, image_column=data.image_column)
        source, notes = align(source, workspace.class_names)
        notes = [f"of {retain.source}: {note}" for note in (*source.notes, *notes)]
    refuse_idle_columns(data, workspace.source, source)
    clean = without(source.train, gone)
    dropped = len(source.train) - len(clean)
    if dropped and not retain.drop_forgotten:
        held = [workspace.class_names[label] for label in sorted(gone) if (source.train.labels == label).any()]
        raise InputError(
            f"the retain sample {retain.source!r} has {dropped:,} images of a forgotten class ({', '.join(held)}): "
            "remove them, or pass --drop-forgotten"
        )
    return clean, dropped, notes


@dataclass(frozen=True)
class _Sibling:
    """Another model of the same architecture and classes as a workspace's."""

    model: nn.Module
    preprocessing: Preprocessing
    metadata: Metadata


def _sibling(workspace: Workspace, weights: Path) -> _Sibling:
    """Open other weights of the workspace's model, checked to answer the same question about the same images."""
    state, metadata = load_weights(weights)
    model = copy.deepcopy(workspace.model)
    apply_weights(model, state, str(weights))
    if metadata.class_names and metadata.class_names != workspace.class_names:
        raise InputError(f"the classes of {weights} are not those of the original weights")
    ours, theirs = workspace.preprocessing, metadata.preprocessing or workspace.preprocessing
    if (ours.size, ours.channels) != (theirs.size, theirs.channels):
        raise InputError(f"{weights} takes images of another size than the original weights: see --size")
    return _Sibling(model, theirs, metadata)


def _same_tensors(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(value, theirs[name].to(value)) for name, value in ours.items())


def _retrained(workspace: Workspace, weights: Path) -> _Sibling:
    """Open a retrained model; one that says it was trained with a class to forget is refused."""
    reference = _sibling(workspace, weights)
    forget = {workspace.class_names[label] for label in workspace.left_out}
    if reference.metadata.training is not None and not forget <= set(reference.metadata.never_seen):
        raise InputError(f"{weights} was trained with a class to forget: its metadata names no such omission")
    return reference

"""What every command needs first: a data source and a model that fit each other, opened from strings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from expunge.data import (
    ImageTable,
    Source,
    measure_statistics,
    native_channels,
    native_size,
    open_source,
    relabel,
    resolve_classes,
    with_test_split,
    without,
)
from expunge.errors import InputError
from expunge.models import (
    ModelSpec,
    build_model,
    check_model,
    parse_model,
    takes_channels,
    zoo_preprocessing,
)
from expunge.processes import ranks
from expunge.schema import Preprocessing
from expunge.weights import Metadata, apply_weights, load_weights, other_width


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How to read the data: what a command line says of it. None: found, taken from the weights, or measured."""

    spec: str
    label_column: str | None = None
    image_column: str | None = None
    class_names: tuple[str, ...] | None = None  # all classes, in the order of the model's outputs
    size: tuple[int, int] | None = None  # (height, width) in pixels
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None  # 1 or 3
    skip_bad: bool = False
    memory: int | None = None  # bytes of decoded images held at most; None: HELD_BYTES


@dataclass(frozen=True)
class Workspace:
    """A source and a model with its weights that were checked against each other."""

    source: Source
    test: ImageTable
    test_from: str  # "test split", or "cut off" where the data has none
    spec: ModelSpec
    model: nn.Module
    preprocessing: Preprocessing
    metadata: Metadata
    left_out: tuple[int, ...]  # labels of the classes that were asked to be left out
    gone_before: tuple[int, ...]  # labels the weights say were forgotten or never seen
    notes: tuple[str, ...]  # sentences a person should read

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def trained_on(self) -> str | None:
        """What the weights say that expunge trained them on."""
        return self.metadata.trained_on or (self.metadata.training or {}).get("data")

    def held_out_notes(self) -> list[str]:
        """Return a note where nothing shows that the weights were not trained on the images that are held out.

        Training by expunge cuts the same images off, given the same data and classes in the same order.
        """
        same = self.trained_on == self.source.spec and self.metadata.class_names == self.class_names
        if self.test_from == "test split" or same:
            return []
        return [
            "the data has no test split: a fifth of each class, always the same, was cut off; these images are held "
            "out only if the weights were trained by expunge train on the same data"
        ]


def open_workspace(
    data: DataOptions,
    model: str | None,
    weights: Path | None,
    *,
    leave_out: Sequence[str] = (),
    seed: int,
    device: str | None = None,
) -> Workspace:
    """Open the data, build the model, load its weights, and check that they fit.

    Args:
        model: the model string; None: the one in the metadata of the weights.
        weights: None for fresh weights, drawn from `seed`.
        leave_out: classes (name or index) whose training images are not read, not even to measure mean and std.
        device: where the model goes; None: a GPU where there is one.

    Raises:
        InputError: something is missing or does not fit; the message says what.
    """
    state, metadata = load_weights(weights) if weights is not None else ({}, Metadata())
    spec = parse_model(model_text(model, metadata))
    names = data.class_names or metadata.class_names or None
    source = open_source(data.spec, label_column=data.label_column, image_column=data.image_column)
    source, told = align(source, names)
    notes = [*source.notes, *told]
    purpose = "forget" if weights is not None else "leave out"
    left_out = resolve_classes(leave_out, source.class_names, purpose=purpose) if leave_out else ()
    unknown = [name for name in (*metadata.forgotten, *metadata.never_seen) if name not in source.class_names]
    if unknown:
        raise InputError(f"the weights say they forgot {', '.join(unknown)}, which is no class of --class-names")
    before = {source.class_names.index(name) for name in (*metadata.forgotten, *metadata.never_seen)}
    test_from = "cut off" if source.test is None else "test split"
    source, test = with_test_split(source)
    readable = without(source.train, {*left_out, *before})
    if len(readable) == 0:
        raise InputError(f"expected images of a class to keep in {data.spec!r}, found none")
    channels = data.channels or (metadata.preprocessing.channels if metadata.preprocessing else takes_channels(spec))
    if channels is None:
        channels = native_channels(readable)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_model(spec, num_classes=len(source.class_names), channels=channels)
    if weights is not None:
        try:
            apply_weights(network, state, str(weights))
        except InputError as error:
            width = other_width(network, state, len(source.class_names))
            if width is None:
                raise
            raise InputError(
                f"the weights in {weights} have {width} outputs, the data has {len(source.class_names)} classes; "
                "name all classes in the order of the outputs with --class-names"
            ) from error
    preprocessing = _preprocessing(data, metadata, spec, network, readable, channels)
    check_model(network, preprocessing, len(source.class_names))
    if data.size is None and metadata.preprocessing is None and preprocessing.source != "measured":  # that is native
        notes += _enlarged(native_size(readable), preprocessing, spec)
    network = network.to(pick_device(device))
    return Workspace(
        source, test, test_from, spec, network, preprocessing, metadata, left_out, tuple(sorted(before)), tuple(notes)
    )


def refuse_idle_columns(data: DataOptions, *sources: Source) -> None:
    """Refuse column names where no source has columns.

    Raises:
        InputError: names the option that means nothing.
    """
    for option, column in (("--label-column", data.label_column), ("--image-column", data.image_column)):
        if column is not None and not any(source.has_columns for source in sources):
            specs = " and ".join(dict.fromkeys(repr(source.spec) for source in sources))
            raise InputError(f"{option} means nothing to {specs}, which has no columns")


def pick_device(device: str | None) -> torch.device:
    """Return the device that was asked for, or the one Accelerate gives this process.

    Raises:
        InputError: this machine does not have it.
    """
    place = ranks()
    if place.size > 1 and device is not None and device != "cpu":
        raise InputError(f"expected no --device with several processes, got {device!r}: each takes its own")
    from accelerate import PartialState

    if device is None:
        return torch.device(PartialState().device)
    if place.size > 1 and torch.device(PartialState().device).type != "cpu":
        raise InputError("several processes use the GPU here: for the CPU, start them by accelerate launch --cpu")
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use device {device!r} here: expected cpu, or a device of this machine") from error


def model_text(model: str | None, metadata: Metadata) -> str:
    """Return the model string that was given, or that of the weights; one that would run code of theirs is refused."""
    if model is not None:
        return model
    if metadata.model is None:
        raise InputError("the weights do not say which model they belong to: name it with --model")
    if parse_model(metadata.model).family == "file" or "trust_remote_code" in metadata.model:
        raise InputError(f"the weights name model {metadata.model!r}, whose code would be run: confirm it with --model")
    return metadata.model


def align(source: Source, names: Sequence[str] | None) -> tuple[Source, list[str]]:
    """Return the source with its labels in the order of `names`, the model's outputs, and what to say of it."""
    own = source.class_names
    if names is None:
        return source, [] if source.named else _without_first(*_label_range(source))
    if len(set(names)) != len(names):
        raise InputError("expected class names that differ from each other")
    if tuple(names) == own:
        return source, []
    if not source.named and len(names) >= len(own):
        return replace(source, class_names=tuple(names)), []
    if not source.named:
        lowest, highest = _label_range(source)
        raise InputError(
            f"expected labels 0 to {len(names) - 1} for the {len(names)} classes that the model names, found {lowest} "
            f"to {highest}{': number them from 0, or name class 0 too with --class-names' if lowest else ''}"
        )
    unknown = [name for name in own if name not in names]
    if unknown:
        raise InputError(
            f"the data has classes that the model does not name: {', '.join(unknown[:4])}; "
            f"it names {', '.join(list(names)[:8])}{', ...' if len(names) > 8 else ''}"
        )
    order = [list(names).index(name) for name in own]
    test = relabel(source.test, order) if source.test is not None else None
    aligned = replace(source, class_names=tuple(names), train=relabel(source.train, order), test=test)
    if len(own) < len(names):
        absent = [name for name in names if name not in own]
        return aligned, [f"the data has no images of {', '.join(absent[:6])}{', ...' if len(absent) > 6 else ''}"]
    return aligned, ["the data lists its classes in another order than the model: matched by name"]


def _label_range(source: Source) -> tuple[int, int]:
    """Return the lowest and the highest label that an image bears."""
    labels = np.concatenate([table.labels for table in (source.train, source.test) if table is not None])
    return int(labels.min()), int(labels.max())


def _without_first(lowest: int, highest: int) -> list[str]:
    """Return what to say where labels that nothing names do not run from 0: outputs below them stay untrained."""
    if lowest == 0:
        return []
    absent = "class 0 has" if lowest == 1 else f"classes 0 to {lowest - 1} have"
    return [
        f"labels run from {lowest} to {highest} and are taken as they are, so that {absent} no image: number them from "
        "0, or name all classes with --class-names"
    ]


def _enlarged(native: tuple[int, int] | None, preprocessing: Preprocessing, spec: ModelSpec) -> list[str]:
    """Return what to say where a zoo's size makes many pixels of few, and so much work of little."""
    times = math.prod(preprocessing.size) / math.prod(native) if native is not None else 1.0
    if native is None or times < 4:
        return []
    (height, width), (own_height, own_width) = preprocessing.size, native
    return [
        f"images of {own_height} x {own_width} are enlarged to {height} x {width}, as {preprocessing.source} states "
        f"for {spec.name}: {times:.0f} times the pixels; --size {own_height}x{own_width} leaves them as they are"
    ]


def _preprocessing(
    data: DataOptions, metadata: Metadata, spec: ModelSpec, model: nn.Module, table: ImageTable, channels: int
) -> Preprocessing:
    """Size and statistics, each as the caller gave it, else as the weights or the zoo say, else measured."""
    stated = metadata.preprocessing or zoo_preprocessing(spec, model)
    if stated is not None and stated.channels != channels:
        stated = None
    size = data.size or (stated.size if stated else native_size(table))
    if size is None:
        raise InputError("the images differ in size: give the one the model expects with --size")
    if (data.mean is None) != (data.std is None):
        raise InputError("expected --mean and --std together, got one of them")
    if data.mean is not None and data.std is not None:
        if len(data.mean) != channels or len(data.std) != channels:
            raise InputError(
                f"expected {channels} values for --mean and --std, got {len(data.mean)} and {len(data.std)}"
            )
        return Preprocessing(size=size, mean=data.mean, std=data.std, source="given")
    if stated is not None:
        return replace(stated, size=size)
    return measure_statistics(table, size, channels)

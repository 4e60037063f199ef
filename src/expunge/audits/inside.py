"""What the features of a model still tell of a class, whatever its last layer answers.

A figure means nothing alone: a model that never saw a class also has features by which it can be told from others, so
each is to be read beside the same figure of a retrained model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from expunge.errors import InputError
from expunge.schema import Preprocessing
from expunge.training import evaluating, logits_of, predict

HEAD_INPUT = "head input"
FEWEST_BLOCKS = 3  # a model with fewer modules of several layers is taken apart further
ROUNDING = 1e-3  # of the gap between two images' answers, what may be left where one was exchanged for the other
SAME = 1e-5  # of the largest feature, by which class means that are the same may differ: rounding
LAYERS = (nn.Linear, nn.Conv2d)  # what a head may be


@dataclass(frozen=True)
class Features:
    """What a model makes of samples before its last layer: values (N, D) float32 and labels (N,) int64, on the CPU."""

    values: Tensor
    labels: Tensor


def features_of(
    model: nn.Module, dataset: Dataset[Any], *, preprocessing: Preprocessing | None = None, layer: str | None = None
) -> Features:
    """Return the input of the model's last layer on every sample, in eval mode; feature maps are averaged over space.

    Args:
        layer: name of the layer whose input is wanted; None: the last linear or convolution layer that runs.

    Raises:
        InputError: the data set is empty, or there is no such layer.
    """
    tapped = _Tapped(copy.deepcopy(model), layer)
    answers = predict(tapped, dataset, preprocessing=preprocessing, phase="features")
    return Features(answers.logits, answers.labels)


def blocks_of(
    model: nn.Module, dataset: Dataset[Any], *, preprocessing: Preprocessing | None = None, most: int = 6
) -> dict[str, Features]:
    """Return the features after each block of a model, in the order they run, and last its "head input", in eval mode.

    A block is a module that all information goes through: put in its output for another image, and the model answers
    as it does for that image. (So a branch that a shortcut passes by is none.) From the model down, each module is
    taken apart into the blocks it consists of, until there are three that have layers of their own inside; those are
    taken. Where it ends before that, all the smallest pieces are, and their features are read where the next piece
    takes them up, so after activation and pooling. The piece that holds the last layer is none.

    Feature maps are averaged over space, and sequences (N, tokens, D) over tokens, the class token among them. Maps are
    taken as (N, D, H, W), or as (N, H, W, D) where only so they have the shape of the image. "head input" is what
    `features_of` gives.

    Args:
        most: blocks returned at most, spread evenly over depth, the last among them; "head input" comes on top.

    Raises:
        InputError: the data set is empty, or the model runs no linear or convolution layer.
    """
    if most < 1:
        raise InputError(f"expected to look at one block at least, got most={most}")
    tapped = _Blocks(copy.deepcopy(model), most)
    answers = predict(tapped, dataset, preprocessing=preprocessing, phase="features after blocks")
    parts = torch.split(answers.logits, list(tapped.widths.values()), dim=1)
    return {name: Features(part, answers.labels) for name, part in zip(tapped.widths, parts, strict=True)}


def linear_probe(train: Features, test: Features, classes: Sequence[int], *, strength: float = 0.01) -> float:
    """Return the accuracy of a logistic regression on samples of `classes`, in [0, 1].

    It is trained on the features of all classes, standardized by the training features, with L2 regularization.

    Args:
        train: features of training samples, of all classes, those to look for among them.
        test: features of held-out samples of the same model.
        strength: inverse regularization, scikit-learn's C.

    Raises:
        InputError: `test` has no sample of `classes`, or `train` has fewer than two classes.
    """
    return float(linear_probe_hits(train, test, classes, strength=strength).double().mean())


def linear_probe_hits(train: Features, test: Features, classes: Sequence[int], *, strength: float = 0.01) -> Tensor:
    """Return whether `linear_probe` is right on each sample of `classes`, (N,) bool, in the order of `test`.

    Raises:
        InputError: as `linear_probe`.
    """
    chosen = _of(test, classes)
    if len(torch.unique(train.labels)) < 2:
        raise InputError("expected features of at least two classes to train a probe on")
    _check_finite(train, chosen)
    mean, deviation = train.values.mean(0), train.values.std(0).clamp_min(1e-6)
    from sklearn.linear_model import LogisticRegression  # a second that only an audit shall take

    probe = LogisticRegression(C=strength, max_iter=5000)  # 1,280 features need about 300
    probe.fit(((train.values - mean) / deviation).numpy(), train.labels.numpy())
    found = probe.predict(((chosen.values - mean) / deviation).numpy())
    predicted: Tensor = torch.from_numpy(found)
    return torch.eq(predicted, chosen.labels)


def nearest_class_mean(train: Features, test: Features, classes: Sequence[int]) -> float:
    """Return the accuracy, on samples of `classes`, of answering with the nearest mean feature, in [0, 1].

    Args:
        train: features of training samples, of all classes: their means are the prototypes.
        test: features of held-out samples of the same model.

    Raises:
        InputError: `test` has no sample of `classes`.
    """
    return float(nearest_class_mean_hits(train, test, classes).double().mean())


def nearest_class_mean_hits(train: Features, test: Features, classes: Sequence[int]) -> Tensor:
    """Return whether `nearest_class_mean` is right on each sample of `classes`, (N,) bool, in the order of `test`.

    Where all classes have the same mean, up to rounding, none is nearest and it is right on no sample.

    Raises:
        InputError: as `nearest_class_mean`.
    """
    chosen = _of(test, classes)
    _check_finite(train, chosen)
    labels = torch.unique(train.labels)
    means = torch.stack([train.values[train.labels == label].mean(0) for label in labels])
    if (means - means.mean(0)).abs().max() <= SAME * means.abs().max():
        return torch.zeros(len(chosen.labels), dtype=torch.bool)  # else rounding would choose a class
    nearest = labels[torch.cdist(chosen.values, means).argmin(1)]
    return torch.eq(nearest, chosen.labels)


def last_layer(model: nn.Module, images: Tensor) -> str:
    """Return the name of the last linear or convolution layer that runs when `model` answers images, in eval mode.

    Raises:
        InputError: none does.
    """
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise InputError("the model runs no linear or convolution layer: name the one to look at")
    return ran[-1]


def _of(features: Features, classes: Sequence[int]) -> Features:
    wanted = torch.isin(features.labels, torch.tensor(list(classes)))
    if not wanted.any():
        raise InputError("expected held-out samples of the forgotten classes, found none")
    return Features(features.values[wanted], features.labels[wanted])


def _check_finite(*features: Features) -> None:
    if not all(bool(torch.isfinite(part.values).all()) for part in features):
        raise InputError("expected finite features, got NaN or infinite ones: the model makes those")


class _Tapped(nn.Module):
    """Gives the input of one layer instead of the model's answer."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        if self.layer is None:
            self.layer = last_layer(self.model, images[:1])
        caught: list[Tensor] = []
        modules = dict(self.model.named_modules())
        if self.layer not in modules:
            raise InputError(f"the model has no layer {self.layer!r}")
        handle = modules[self.layer].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            self.model(images)
        finally:
            handle.remove()
        if not caught:
            raise InputError(f"the layer {self.layer!r} does not run when the model answers")
        return _flat(caught[-1])


class _Blocks(nn.Module):
    """Gives what `blocks_of` wants side by side, (N, sum of widths), instead of the model's answer."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model = model
        self.most = most
        self.head: str | None = None
        self.places: list[_Place] = []
        self.widths: dict[str, int] = {}

    def forward(self, images: Tensor) -> Tensor:
        if self.head is None:
            self.head = last_layer(self.model, images[:1])
            self.places = _spread(_places(self.model, images[:1], self.head), self.most)
        caught: dict[str, Tensor] = {}
        size = (images.shape[2], images.shape[3])
        modules = dict(self.model.named_modules())

        def read(place: _Place, value: Any) -> None:
            caught[place.block] = _pooled(_tensor_in(value), size, place.channels)  # now: a later layer may change it

        def read_head(inputs: tuple[Any, ...]) -> None:
            caught[HEAD_INPUT] = _flat(inputs[0])

        handles = [modules[self.head].register_forward_pre_hook(lambda _, inputs: read_head(inputs))]
        for place in self.places:
            module = modules[place.module]
            if place.output:
                hook = module.register_forward_hook(lambda *given, place=place: read(place, given[-1]))
            else:
                hook = module.register_forward_pre_hook(
                    lambda _, inputs, named, place=place: read(place, (*inputs, *named.values())), with_kwargs=True
                )
            handles.append(hook)
        try:
            self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        names = [*(place.block for place in self.places), HEAD_INPUT]
        self.widths = {name: caught[name].shape[1] for name in names}
        return torch.cat([caught[name] for name in names], dim=1)


def _flat(values: Tensor) -> Tensor:
    """Return a layer's input as (N, D): feature maps averaged over space, all else flattened."""
    return values.flatten(2).mean(2) if values.ndim > 3 else values.flatten(1)


def _pooled(values: Tensor, size: tuple[int, int], channels: int | None) -> Tensor:
    """Return what a block gave as (N, D), averaged over space or tokens.

    Args:
        size: the images' height and width.
        channels: of the block's maps, which may come flattened.
    """
    if values.ndim == 2 and channels is not None and values.shape[1] % channels == 0:
        return values.view(len(values), channels, -1).mean(2)
    if values.ndim == 3:
        return values.mean(1)
    if values.ndim == 4:
        (height, width), (_, first, second, third) = size, values.shape
        if first * width == second * height and second * width != third * height:
            return values.flatten(1, 2).mean(1)
    return _flat(values)


def _tensor_in(value: Any) -> Tensor:
    """Return the first tensor in what a module gives or takes; without one, an empty tensor."""
    if isinstance(value, Tensor):
        return value
    value = getattr(value, "last_hidden_state", value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else [value]
    return next((part for part in parts if isinstance(part, Tensor)), torch.empty(0))


# Finding the blocks of a model


@dataclass(frozen=True)
class _Place:
    """Where the features of a block are read."""

    block: str
    module: str  # whose output is read, or whose input
    output: bool
    channels: int | None  # of the block's feature maps; None: it gives none


def _places(model: nn.Module, image: Tensor, head: str) -> list[_Place]:
    """Return where the features of each block are read, in the order they run; the rule is that of `blocks_of`."""
    trace = _Trace(model, image)
    pieces = [""]
    while True:
        blocks = [piece for piece in pieces if not _holds(piece, head) and trace.has_layers_inside(piece)]
        if len(blocks) >= FEWEST_BLOCKS:
            return [_Place(block, block, True, None) for block in blocks]
        finer = [part for piece in pieces for part in trace.parts(piece, head)]
        if finer == pieces:
            break
        pieces = finer
    pieces = [piece for piece in pieces if not _holds(piece, head)]
    return [
        _Place(piece, following, False, trace.channels(piece))
        for piece, following in zip(pieces, [*pieces, head][1:], strict=True)
    ]


def _spread(places: Sequence[_Place], most: int) -> list[_Place]:
    """Return at most `most` places, evenly spread, the last among them."""
    count = min(most, len(places))
    return [places[(number + 1) * len(places) // count - 1] for number in range(count)]


def _holds(name: str, other: str) -> bool:
    return name in ("", other) or other.startswith(f"{name}.")


class _Trace:
    """What ran when a model answered noise images, and which of its modules all information goes through."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((4, *image.shape[1:]), generator=generator).to(image.device)
        self.model = model
        self.modules = dict(model.named_modules())
        self.one, self.other = noise[:2], noise[2:]
        self.shapes: dict[str, torch.Size] = {}  # of what each module gave last, in the order they ended
        self.answer = self._run(self.one, {name: self._note(name) for name in self.modules})
        self.wanted = self._run(self.other, {})
        self._known: dict[str, bool] = {}

    def has_layers_inside(self, name: str) -> bool:
        """Return whether a module consists of others with weights."""
        return any(map(_has_weights, self.modules[name].children()))

    def parts(self, name: str, head: str) -> list[str]:
        """Return the blocks that a module consists of, in the order they ended, or itself where it is of one piece."""
        order = list(self.shapes)
        found = [
            part
            for part in self._ran_inside(name)
            if _has_weights(self.modules[part]) and (_holds(part, head) or self._carries_all(part))
        ]
        return sorted(found, key=order.index) or [name]

    def channels(self, name: str) -> int | None:
        shape = self.shapes[name]
        return shape[1] if len(shape) == 4 else None

    def _ran_inside(self, name: str) -> list[str]:
        """Return the children of a module; in the place of those that do not run themselves (lists), theirs."""
        names = [f"{name}.{child}".lstrip(".") for child, _ in self.modules[name].named_children()]
        return [part for n in names for part in ([n] if n in self.shapes else self._ran_inside(n))]

    def _carries_all(self, name: str) -> bool:
        """Return whether exchanging what a module gives exchanges the model's answer."""
        if name not in self._known:
            given: list[Any] = []
            self._run(self.other, {name: lambda *seen: given.append(copy.deepcopy(seen[-1]))})
            parts = [_tensor_in(output) for output in given]
            self._known[name] = all(part.ndim > 1 and len(part) == len(self.other) for part in parts) and bool(
                (self._run(self.one, {name: lambda *_: given.pop(0)}) - self.wanted).abs().max()
                <= ROUNDING * (self.answer - self.wanted).abs().max()
            )
        return self._known[name]

    def _note(self, name: str) -> Callable[..., None]:
        def note(*seen: Any) -> None:
            self.shapes.pop(name, None)  # a module that runs again ends later
            self.shapes[name] = _tensor_in(seen[-1]).shape

        return note

    @torch.no_grad()
    def _run(self, images: Tensor, hooks: Mapping[str, Callable[..., Any]]) -> Tensor:
        handles = [self.modules[name].register_forward_hook(hook) for name, hook in hooks.items()]
        try:
            with evaluating(self.model):
                return logits_of(self.model(images)).clone()
        finally:
            for handle in handles:
                handle.remove()


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())

"""Signals: what a changed model still knows of a class, read without a single image of that class.

What is at hand instead are class impressions, inputs that the original model calls the class, made from nothing but the
model and retained images. One kind could fool a reader, so there are several, and what is read is not what was trained
on. How well they track the truth: docs/research/calibration.md.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, IterableDataset

from expunge.batches import Share, as_tensor, together
from expunge.data import TensorImages, normalize
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal, Meter
from expunge.memory import images_that_fit
from expunge.processes import Ranks, ranks
from expunge.randomness import seeded
from expunge.schema import Precision, Preprocessing, Signals, Split
from expunge.training import (
    PREDICT_BATCH,
    Parts,
    answer,
    device_of,
    evaluating,
    fastest_layout,
    has_running_statistics,
    is_out_of_memory,
    precision_for,
)

Kind = Literal["retained", "blend", "noise"]
KINDS: tuple[Kind, ...] = ("retained", "blend", "noise")
"""What an impression is made from: a retained image, the mean of two, or Gaussian noise."""

IMPRESSION_STEPS = 40  # Adam steps; enough for a probability of the class above 0.99 on every model tried
IMPRESSION_LR = 0.05  # four times it left 3 % of the class in the digits network of the tests
REFRESH_IMAGES = 256  # retained images that normalization statistics are measured on
LEAST_COMPARED = 32  # retained images that answers are compared on, at least, where there are so many
USUAL_DEVIATION = (0.1, 3.0)  # of the pixels of model input: of images scaled to [0, 1] it is .2 to .3


@dataclass(frozen=True)
class Impressions:
    """Images that a model calls a class: model input, float (N, channels, H, W), on the CPU."""

    images: Tensor
    labels: Tensor  # (N,) int64, the class each was made for
    starts: Tensor  # what they were made from, of the same shape as the images
    start_labels: Tensor  # (N,) int64, its class: of the first where two were blended, -1 for noise


@dataclass(frozen=True)
class Units:
    """What the pixels of a model's input are measured in, by channel: learned images move by so much.

    Rates and penalties of learned images are of input with a deviation near 1, as normalization leaves it.
    """

    mean: Tensor  # (channels, 1, 1)
    deviation: Tensor  # (channels, 1, 1), positive

    @classmethod
    def of(cls, images: Tensor) -> Units | None:
        """Return those of model input (N, channels, H, W), None where its pixels vary as usual."""
        pixels = images.transpose(0, 1).flatten(1)
        deviation = pixels.std(1)
        if USUAL_DEVIATION[0] <= pixels.std().item() <= USUAL_DEVIATION[1]:
            return None
        deviation = torch.where(deviation > 0, deviation, pixels.std().clamp(min=torch.finfo(pixels.dtype).tiny))
        return cls(pixels.mean(1).view(-1, 1, 1), deviation.view(-1, 1, 1))

    def input(self, images: Tensor) -> Tensor:
        """Return images in these units as model input."""
        return images * self.deviation.to(images) + self.mean.to(images)

    def measured(self, images: Tensor) -> Tensor:
        """Return model input in these units."""
        return (images - self.mean.to(images)) / self.deviation.to(images)


@dataclass(frozen=True)
class Evidence:
    """What signals are read on. Tensors are on the CPU, images are model input."""

    retained: Tensor  # (N, channels, H, W) retained images: held-out ones first
    held: int  # of them that accuracy is read on: held-out ones, where there are any
    labels: Tensor  # (N,) int64
    answers: Tensor  # (N, C) the original's probabilities over retained classes
    impressions: Mapping[str, Impressions]  # by kind
    forget_classes: tuple[int, ...]
    gone: tuple[int, ...]  # those and the ones forgotten before
    refresh: TensorImages  # retained images for normalization statistics
    units: Units | None = None  # of the input, where its pixels do not vary as usual

    def count(self, meter: Meter, *, refresh: bool) -> None:
        """Count what one reading of signals goes through."""
        read = Counter(self.labels.tolist()) + Counter(self.refresh.labels.tolist() if refresh else ())
        learned = sum(len(impressions.images) for impressions in self.impressions.values())
        meter.step(samples=read.total() + learned)
        meter.read(read)


def learn_impressions(
    model: nn.Module,
    split: Split,
    per_class: int,
    *,
    kind: Kind = "retained",
    seed: int,
    precision: Precision = "auto",
    units: Units | None = None,
    journal: Journal | None = None,
) -> Impressions:
    """Learn images that `model` calls each forget class, all classes in one batch.

    The model is in eval mode with frozen parameters: nothing of it moves.

    Args:
        per_class: impressions of each forget class.
        kind: what they start from, see KINDS.
        units: of the input, where its pixels do not vary as usual.

    Raises:
        DivergedError: the loss became NaN or infinite.
        InputError: there is no retained image, or no gradient reaches the input.
    """
    made = _learn_kinds(model, split, per_class, (kind,), seed=seed, precision=precision, units=units, journal=journal)
    return made[kind]


def _learn_kinds(
    model: nn.Module,
    split: Split,
    per_class: int,
    kinds: Sequence[Kind],
    *,
    seed: int,
    precision: Precision,
    units: Units | None,
    journal: Journal | None,
) -> dict[str, Impressions]:
    """Learn impressions of several kinds, all in one batch, the first from `seed`, the next from the one after it."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    labels = torch.tensor(split.forget_classes).repeat_interleave(per_class)
    with (journal or Journal()).phase("impressions", steps=IMPRESSION_STEPS) as meter, seeded(seed):
        begun = [_begin(split, kind, len(labels), seed + number, meter, units) for number, kind in enumerate(kinds)]
        images = descend(
            frozen,
            torch.cat([starts for starts, _ in begun]),
            labels.repeat(len(kinds)),
            lambda logits, targets, _: F.cross_entropy(logits, targets),
            lr=IMPRESSION_LR,
            steps=IMPRESSION_STEPS,
            precision=precision,
            units=units,
            meter=meter,
        )
    return {
        kind: Impressions(learned, labels, starts, start_labels)
        for kind, learned, (starts, start_labels) in zip(kinds, torch.split(images, len(labels)), begun, strict=True)
    }


def _begin(split: Split, kind: Kind, count: int, seed: int, meter: Meter, units: Units | None) -> tuple[Tensor, Tensor]:
    """Return what so many impressions of a kind start from, and its class as `Impressions` has it."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        shape = retained_sample(split.retain, 1, split.preprocessing, generator).images.shape[1:]
        starts = torch.randn((count, *shape), generator=generator)
        return units.input(starts) if units is not None else starts, torch.full((count,), -1)
    size = count + (kind == "blend")  # each is blended with the next, another one even where they are few
    drawn = retained_sample(split.retain, size, split.preprocessing, generator)
    meter.read(Counter(drawn.labels.tolist()))
    starts = drawn.images[:count]
    return (starts + drawn.images[1:]) / 2 if kind == "blend" else starts, drawn.labels[:count]


def gather_evidence(
    model: nn.Module,
    split: Split,
    held_out: Dataset[Any],
    *,
    per_class: int = 8,
    compared: int = LEAST_COMPARED,
    seed: int,
    precision: Precision = "auto",
    journal: Journal | None = None,
) -> Evidence:
    """Return what to read signals on: held-out retained images and impressions of every kind, of the original `model`.

    Impressions start from held-out images too, so that none is one of those of `learn_impressions`.

    Args:
        held_out: retained samples that the changed model will not be trained on; `split.retain` are those it will.
        per_class: impressions of each kind for each forget class.
        compared: retained images that answers are compared on, at least: where so many are not held out, some of
            `split.retain` are taken beside them.

    Raises:
        InputError: there is no held-out image. DivergedError: the loss of impressions became NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = [held_out[index] for index in range(len(held_out))]  # type: ignore[arg-type]
    if not samples:
        raise InputError("expected held-out retained images to read signals on, got none")
    retained = normalize(torch.stack([as_tensor(sample[0]) for sample in samples]), split.preprocessing)
    labels = torch.tensor([int(sample[1]) for sample in samples])
    known = replace(split, retain=TensorImages(retained, labels), preprocessing=None)
    units = Units.of(retained)
    impressions = _learn_kinds(
        model, known, per_class, KINDS, seed=seed, precision=precision, units=units, journal=journal
    )
    held = len(labels)
    if held < compared:
        own = torch.Generator().manual_seed(seed)
        more = retained_sample(split.retain, compared - held, split.preprocessing, own, repeat=False)
        retained, labels = torch.cat([retained, more.images]), torch.cat([labels, more.labels])
    with (journal or Journal()).phase("signals", steps=None, shown=False) as meter:
        answers = retained_answers(logits_on(model, retained), split.gone)
        meter.step(samples=len(labels))
        meter.read(Counter(labels.tolist()))
    return Evidence(
        retained=retained,
        held=held,
        labels=labels,
        answers=answers,
        impressions=impressions,
        forget_classes=split.forget_classes,
        gone=split.gone,
        refresh=retained_sample(split.retain, REFRESH_IMAGES, split.preprocessing, generator, repeat=False),
        units=units,
    )


def read_signals(
    model: nn.Module, evidence: Evidence, *, phase: str = "", step: int = 0, refresh: bool = False
) -> Signals:
    """Return what `model`, in eval mode, shows on the evidence; it is not changed.

    Args:
        phase: and `step`, noted in the result: when it was read.
        refresh: read on a copy whose running statistics are measured anew on retained images. While weights move and
            statistics are kept, the model as it is looks more damaged than it is.
    """
    if refresh:
        model = refreshed(model, evidence.refresh.images)
    logits = logits_on(model, evidence.retained)
    masked = logits.clone()
    masked[:, list(evidence.gone)] = -torch.inf
    forget = list(evidence.forget_classes)
    called: dict[str, float] = {}
    highest = logits.softmax(1)[:, forget].sum(1).mean().item()
    for kind, impressions in evidence.impressions.items():
        answers = logits_on(model, impressions.images)
        called[kind] = torch.isin(answers.argmax(1), torch.tensor(forget)).double().mean().item()
        highest = max(highest, answers.softmax(1)[:, forget].sum(1).mean().item())
    return Signals(
        phase=phase,
        step=step,
        impressions_called=called,
        class_probability=highest,
        retain_accuracy=(logits.argmax(1) == evidence.labels)[: evidence.held].double().mean().item(),
        retain_agreement=(masked.argmax(1) == evidence.answers.argmax(1)).double().mean().item(),
        retain_divergence=F.kl_div(logits.log_softmax(1), evidence.answers, reduction="batchmean").item(),
    )


def retained_answers(logits: Tensor, gone: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """Return the probabilities (N, C) that logits (N, C) give the retained classes; 0 for the classes `gone`."""
    kept = logits / temperature
    kept[:, list(gone)] = -torch.inf
    return kept.softmax(1)


def are_probabilities(logits: Tensor) -> bool:
    """Return whether every row of (N, classes) is of numbers that are not negative and sum to 1."""
    return bool((logits >= 0).all()) and bool(((logits.double().sum(1) - 1).abs() < 1e-3).all())


@torch.no_grad()
def refreshed(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of `model`, in eval mode, whose running statistics are those of `images` alone.

    A model without BatchNorm is returned itself; of a single image nothing is measured. Where memory runs short,
    batches are halved, and statistics are the means of theirs.
    """
    copied = copy.deepcopy(model).eval()
    layers = [m for m in copied.modules() if isinstance(m, _BatchNorm) and has_running_statistics(m)]
    if not layers:
        return model
    if len(images) < 2:
        return copied
    device, size = device_of(model), PREDICT_BATCH
    while True:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
            layer.training = True
        try:
            for batch in torch.split(images, size):
                if len(batch) > 1:  # one image has no variance
                    copied(batch.to(device))
            return copied.eval()
        except RuntimeError as error:
            if size <= 2 or not is_out_of_memory(error):
                raise
        size //= 2
        clear_device_cache(garbage_collection=True)


def descend(
    model: nn.Module,
    start: Tensor,
    labels: Tensor,
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    lr: float,
    steps: int,
    precision: Precision,
    meter: Meter,
    units: Units | None = None,
) -> Tensor:
    """Return images after `steps` Adam steps down `objective(logits, labels, images)`.

    The weights of `model`, which is a copy of the caller's own, do not change; their memory layout may.

    Args:
        start: model input, (N, channels, H, W).
        units: in which images are changed, by `lr`, and handed to `objective`; None: as the model takes them.

    Raises:
        DivergedError: the objective became NaN or infinite. InputError: no gradient reaches the images.
    """
    device = device_of(model)
    if units is not None:
        start = units.measured(start)
    # in train mode an image changes what becomes of the others, so every process learns all of them
    share = Share(len(start), Ranks() if model.training else ranks())
    images = start[share.rows].to(device).clone()
    images = images.contiguous(memory_format=fastest_layout(model, images)).requires_grad_()
    meter.precision = precision_for(precision, model, images)
    targets = labels[share.rows].to(device)
    optimizer = torch.optim.Adam([images], lr)
    parts = Parts(meter, 0 if model.training else 1)
    if parts.least:
        # asked before, since a machine that runs out of memory ends the process instead of raising an error
        # a tensor of its own: what is kept of a view is the whole batch
        one = partial(answer, model, images[:1].detach().clone().requires_grad_(), meter.precision)
        parts.limit(len(images), images_that_fit(model, device, one))

    def learn(rows: slice) -> tuple[float, int]:
        mine = (images, targets) if rows == slice(0, len(images)) else (images[rows], targets[rows])
        weight = len(mine[1]) / len(images)
        shown = mine[0] if units is None else units.input(mine[0])
        logits = answer(model, shown, meter.precision)
        if not logits.requires_grad:
            raise InputError(
                "expected a model through which gradients reach its input, got one that answers without any: images "
                "are learned from it (is there a torch.no_grad() or detach() in its forward?)"
            )
        loss = objective(logits, mine[1], mine[0])
        scale = weight * share.count / share.size  # of the mean over all images
        torch.autograd.backward(loss if scale == 1 else scale * loss, inputs=[images])
        return weight * loss.item(), 0

    with torch.enable_grad():
        for _ in range(steps):
            value, _ = share.summed(*parts.add_up(len(images), learn, optimizer.zero_grad))
            if not math.isfinite(value):
                raise DivergedError(
                    f"the objective of learned images became {value} at step {meter.steps + 1}; nothing kept: "
                    f"the model gives NaN, or the rate of the images is too high (now {lr:g})"
                )
            optimizer.step()
            meter.step(loss=value, samples=len(start))
    learned = images.detach().cpu() if units is None else units.input(images.detach()).cpu()
    return learned if model.training else together([learned[: share.count]], [len(start)])


def retained_sample(
    dataset: Dataset[Any],
    count: int,
    preprocessing: Preprocessing | None,
    generator: torch.Generator,
    *,
    repeat: bool = True,
) -> TensorImages:
    """Return `count` samples as float model input, drawn at random (the first ones, of a stream).

    Where there are fewer, they are repeated, or with `repeat=False` each is returned once.
    """
    retain: Any = dataset
    if isinstance(retain, IterableDataset):
        samples = list(itertools.islice(retain, count))
    else:
        order = torch.randperm(len(retain), generator=generator)[:count]
        samples = [retain[int(index)] for index in order]
    if not samples:
        raise InputError("expected a retain sample, got an empty one")
    images = normalize(torch.stack([as_tensor(sample[0]) for sample in samples]), preprocessing)
    labels = torch.tensor([int(sample[1]) for sample in samples])
    index = torch.arange(count if repeat else len(samples)) % len(samples)
    return TensorImages(images[index], labels[index])


@torch.no_grad()
def logits_on(model: nn.Module, images: Tensor) -> Tensor:
    """Return (N, C) logits; each process answers its share, so that all read the same bits."""
    device, share, parts = device_of(model), Share(len(images), ranks()), Parts(Meter())
    with evaluating(model):
        answers = [
            parts.answers(model, batch.to(device)).float().cpu()
            for batch in torch.split(images[share.rows], PREDICT_BATCH)
        ]
    return together([torch.cat(answers)[: share.count]], [len(images)])

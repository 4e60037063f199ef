"""What several methods share: forget samples, both kinds mixed, distances, fresh weights, the loss of noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

from expunge.batches import Batch, as_tensor, drops_last
from expunge.data import normalize, size_of
from expunge.errors import InputError
from expunge.models import reinitialized
from expunge.randomness import seed_of
from expunge.schema import Preprocessing, Sample, Split, TrainConfig
from expunge.training import PREDICT_BATCH, has_running_statistics

BATCH = 64
"""Images a batch where the authors take 256 of a whole training set: of the fifth or so that a retain sample is, an
epoch then has about as many steps as theirs."""


def sgd(**changes: Any) -> TrainConfig:
    """Return the training that most published baselines share, with `changes`: SGD, 10 epochs at 0.01.

    Source: README and arg_parser.py of https://github.com/OPTML-Group/Unlearn-Sparse, but for the batch (theirs is 256)
    and for Nesterov's momentum (theirs is the plain one).
    """
    settings: dict[str, Any] = {
        "epochs": 10,
        "lr": 0.01,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size": BATCH,
    }
    return TrainConfig(**(settings | changes))


# Samples


def forget_samples(split: Split) -> Dataset[Sample]:
    """Return the samples of the classes to forget.

    Raises:
        InputError: there are none.
    """
    if split.forget is None:
        raise InputError("this method reads samples of the classes to forget, none were given: set split.forget")
    return split.forget


def both_samples(split: Split, *, seed: int) -> Dataset[Sample]:
    """Return retained and forget samples as one data set, each sample once.

    Where both were drawn alike, as from one training set they are, a batch has both in the shares that the set had, so
    normalization statistics stay near what they were.

    Args:
        seed: of the order, where one of the two is a stream.
    """
    parts = [split.retain, forget_samples(split)]
    if any(isinstance(part, IterableDataset) for part in parts):
        return _Interleaved(parts, seed)
    return ConcatDataset(parts)


def bears(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return (N,) bool: whether each label is one of `classes`."""
    return torch.isin(labels, torch.tensor(classes, device=labels.device))


def batches(
    dataset: Dataset[Any], preprocessing: Preprocessing | None, device: torch.device, *, size: int = PREDICT_BATCH
) -> Iterator[Batch]:
    """Yield the samples of `dataset` in its order, as model input on `device`, `size` at a time."""
    samples = _in_order(dataset)
    while chunk := list(itertools.islice(samples, size)):
        images = normalize(torch.stack([as_tensor(sample[0]) for sample in chunk]).to(device), preprocessing)
        yield Batch(images, torch.tensor([int(sample[1]) for sample in chunk], device=device), None)


def num_steps(dataset: Dataset[Any], config: TrainConfig) -> int:
    """Return how many optimizer steps `train` takes with `config` on `dataset`."""
    if config.steps is not None:
        return config.steps
    size = size_of(dataset)
    batches = math.ceil(size / config.batch_size) - drops_last(size, config.batch_size)
    return max(1, batches) * config.epochs


class _Interleaved(IterableDataset[Sample]):
    """The samples of several data sets, streams among them, spread evenly at random over an epoch."""

    def __init__(self, parts: Sequence[Dataset[Sample]], seed: int) -> None:
        self.parts = parts
        self.sizes = [size_of(part) for part in parts]
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return sum(self.sizes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(np.repeat(np.arange(len(self.parts)), self.sizes))
        streams = [_in_order(part, rng) for part in self.parts]
        for number in order:
            sample = next(streams[number], None)
            if sample is not None:  # a stream may leave out images that cannot be decoded
                yield sample


def _in_order(dataset: Any, rng: np.random.Generator | None = None) -> Iterator[Any]:
    """Yield the samples of a data set: in its own order, or with `rng` at random where it is no stream."""
    if isinstance(dataset, IterableDataset):
        yield from dataset
        return
    order = range(len(dataset)) if rng is None else rng.permutation(len(dataset))
    for index in order:
        yield dataset[int(index)]


# Models


def divergence(answers: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (N,) KL(softmax(answers / T) || softmax(logits / T)) times T squared, in nats, at least 0.

    The factor keeps gradients alike at any temperature. Source: Hinton et al., arXiv:1503.02531, section 2.

    Args:
        answers: (N, C) logits of a teacher.
        logits: (N, C) of the model that is compared with it.
    """
    taught = (answers / temperature).softmax(1)
    return F.kl_div((logits / temperature).log_softmax(1), taught, reduction="none").sum(1) * temperature**2


@contextmanager
def evaluating_norms(model: nn.Module) -> Iterator[None]:
    """Have normalization layers use and keep their running statistics while the rest of `model` trains.

    A batch of forget samples alone has statistics that no batch in use has.
    """

    def evaluate(layer: nn.Module, _: object) -> None:  # before each use: training puts the whole model into train mode
        layer.eval()

    layers = [module for module in model.modules() if has_running_statistics(module)]
    handles = [layer.register_forward_pre_hook(evaluate) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fresh_copy(model: nn.Module, *, seed: int) -> nn.Module:
    """Return a copy of `model`, in eval mode, with fresh weights in every layer; frozen parameters stay.

    A layer all of whose parameters are frozen keeps its statistics too: it is no part of what is trained.
    """
    fresh = reinitialized(model, seed=seed)
    for new, old in zip(fresh.modules(), model.modules(), strict=True):
        own = list(old.parameters(recurse=False))
        for parameter, kept in zip(new.parameters(recurse=False), own, strict=True):
            if not kept.requires_grad:
                parameter.copy_(kept)
        if own and not any(parameter.requires_grad for parameter in own):
            for buffer, statistic in zip(new.buffers(recurse=False), old.buffers(recurse=False), strict=True):
                buffer.copy_(statistic)
    return fresh


def derived_seed(seed: int, *parts: int) -> int:
    """Return a seed for one part of a run, unlike those of its other parts."""
    return seed_of(seed, *(part + 1 for part in parts))  # to a seed sequence, zeros at the end are nothing


# Noise


def noise_objective(sign: float, penalty: float, *, summed: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the loss (logits, labels, images) that noise minimizes: `sign` times cross-entropy, plus `penalty` times
    the mean squared pixel.

    Source: arXiv:2111.08947, equation 1, and arXiv:2201.05629. Averaged over images. The paper weighs the sum of
    squares of an image; the mean (times channels * H * W for the same value) keeps its strength at any resolution.

    Args:
        sign: -1: the model shall err most about the class that an image is labelled with; 1: least.
        summed: weigh the sum over pixels instead.
    """

    def objective(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        size = images.square().flatten(1)
        return sign * F.cross_entropy(logits, labels) + penalty * (size.sum(1) if summed else size.mean(1)).mean()

    return objective

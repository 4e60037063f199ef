"""From data sets to what a step trains on: samples put together, each process's share of them, augmentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from expunge.data import normalize, size_of, to_8_bits
from expunge.errors import InputError
from expunge.processes import Ranks, gathered, ranks, shared_statistics, summed
from expunge.randomness import seed_of, seeded
from expunge.schema import Preprocessing, TrainConfig


@dataclass(frozen=True)
class Batch:
    """What one step trains on, on the model's device."""

    images: Tensor  # (N, channels, H, W) float model input
    labels: Tensor  # (N,) int64
    targets: Tensor | None  # (N, C) probabilities that samples carry as a third item; NaN where one does not

    def part(self, rows: slice) -> Batch:
        return Batch(self.images[rows], self.labels[rows], None if self.targets is None else self.targets[rows])


@dataclass(frozen=True)
class Share:
    """What of a batch is this process's: every size-th sample from that of its rank on; of one process, all.

    A process without any runs on the first sample, so that it is there when the others speak, and counts for nothing.
    """

    size: int  # samples in the batch, of all processes
    place: Ranks

    @property
    def count(self) -> int:
        """How many samples are this process's own."""
        return len(range(self.place.rank, self.size, self.place.size))

    @property
    def rows(self) -> slice:
        return slice(self.place.rank, None, self.place.size) if self.count else slice(0, 1)

    def weighed(self, loss: Tensor) -> Tensor:
        """Return a mean over own samples so weighed that the mean over processes is that over all samples."""
        return loss if self.place.size == 1 else loss * (self.count * self.place.size / self.size)

    def summed(self, loss: float, correct: int) -> tuple[float, int]:
        """Return the loss and the number of right answers of the whole batch, the same in every process.

        The loss is NaN or infinite where that of any process is, also of one without a sample of its own.
        """
        if self.place.size == 1:
            return loss, correct
        loss, right = summed(loss * self.count / self.size, correct if self.count else 0)
        return loss, int(right)

    def statistics(self) -> AbstractContextManager[None]:
        """Normalize by the statistics of the whole batch."""
        return nullcontext() if self.place.size == 1 else shared_statistics(self.count > 0)

    @contextmanager
    def drawing(self, *number: int) -> Iterator[None]:
        """Let a model draw (for dropout) from a state of each process's own, so that the order of samples and
        augmentation go on as in one process."""
        if self.place.size == 1:
            yield
            return
        with seeded(seed_of(*number, self.place.rank)):
            yield


def augment(images: Tensor, config: TrainConfig, share: Share | None = None) -> Tensor:
    """Return images (N, channels, H, W) mirrored and shifted at random, as `config` says, from torch's random state.

    Args:
        share: which of a larger batch they are; None: all. What is drawn for an image does not depend on it.
    """
    height, width = images.shape[2:]
    share = share or Share(len(images), Ranks())
    count = share.size
    if config.flip:
        mirrored = (torch.rand(count) < 0.5)[share.rows]
        images = torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)
    if config.crop:
        if config.crop >= min(height, width):
            raise InputError(f"expected a crop below the image size {height}x{width}, got {config.crop}")
        offsets = torch.randint(0, 2 * config.crop + 1, (2, count, 1))[:, share.rows]
        rows = (offsets[0] + torch.arange(height)).to(images.device)
        columns = (offsets[1] + torch.arange(width)).to(images.device)
        padded = F.pad(images, [config.crop] * 4, mode="reflect")
        index = torch.arange(len(images), device=images.device).view(-1, 1, 1)
        images = padded.permute(0, 2, 3, 1)[index, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
    return images


Piece = tuple[Tensor, Tensor, Tensor | None]
"""Images, labels and targets of one origin: uint8 samples and float noise share no tensor before normalization."""

Pieces = tuple[Piece | None, Piece | None]
"""What of a batch is real, and what is synthetic."""

Tagged = tuple[tuple[Any, ...], bool]
"""A sample, and whether it is real."""


class _Places(Dataset[int]):
    """The places of a data set, or of two after one another; `pieces` reads what is at them."""

    def __init__(self, real: Dataset[Any], synthetic: Dataset[Any] | None = None) -> None:
        self.real = real
        self.synthetic = synthetic
        self.split = len(cast(Any, real))

    def __len__(self) -> int:
        return self.split + (len(cast(Any, self.synthetic)) if self.synthetic is not None else 0)

    def __getitem__(self, index: int) -> int:
        return index

    def is_real(self, index: int) -> bool:
        return index < self.split

    def pieces(self, places: Sequence[int]) -> Pieces:
        index = torch.tensor(places)
        real, synthetic = index[index < self.split], index[index >= self.split] - self.split
        return (
            take(self.real, real) if len(real) else None,
            take(self.synthetic, synthetic) if len(synthetic) else None,
        )


class _TaggedStream(IterableDataset[Tagged]):
    """The same for an iterable data set: synthetic samples are spread evenly at random over its length."""

    def __init__(self, real: Any, synthetic: Any | None, seed: int) -> None:
        self.real = real
        self.size = size_of(real)
        self.synthetic = synthetic
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.size + (len(self.synthetic) if self.synthetic is not None else 0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.real, "set_epoch"):
            self.real.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tagged]:
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        waiting = rng.permutation(len(self.synthetic) if self.synthetic is not None else 0).tolist()
        to_come = self.size
        for sample in self.real:
            while waiting and rng.random() < len(waiting) / (len(waiting) + max(1, to_come)):
                yield tuple(cast(Any, self.synthetic)[waiting.pop()]), False
            yield tuple(sample), True
            to_come -= 1
        for index in waiting:
            yield tuple(cast(Any, self.synthetic)[index]), False

    @staticmethod
    def is_real(item: Tagged) -> bool:
        return item[1]

    @staticmethod
    def pieces(items: Sequence[Tagged]) -> Pieces:
        real, synthetic = ([sample for sample, tag in items if tag is wanted] for wanted in (True, False))
        return _piece(real) if real else None, _piece(synthetic) if synthetic else None


def mix(real: Dataset[Any], synthetic: Dataset[Any] | None, seed: int) -> Any:
    if isinstance(real, IterableDataset):
        return _TaggedStream(real, synthetic, seed)
    return _Places(real, synthetic)


def loader_of(dataset: Any, batch_size: int, place: Ranks, *, shuffle: bool) -> DataLoader[Any]:
    """Return a loader of (pieces, share): all processes go through the same batches, and read their part of each."""
    streaming = isinstance(dataset, IterableDataset)
    size = len(dataset)
    if size == 0:
        raise InputError("expected a data set with samples, got an empty one")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle and not streaming,
        collate_fn=partial(_collate, dataset, place),
        drop_last=shuffle and drops_last(size, batch_size),
    )


def drops_last(size: int, batch_size: int) -> bool:
    """Return whether training leaves out the last batch of an epoch: BatchNorm cannot train on one sample alone."""
    return size > batch_size and size % batch_size == 1


def _collate(dataset: Any, place: Ranks, items: list[Any]) -> tuple[Pieces, Share]:
    """Return the real and the synthetic piece of this process's share of a batch."""
    items = sorted(items, key=dataset.is_real, reverse=True)  # as `inputs` joins them
    share = Share(len(items), place)
    return dataset.pieces(items[share.rows]), share


def take(dataset: Any, index: Tensor) -> Piece:
    """Return the samples at `index`, (N,) int64: at once where a data set says how (`samples_at`), else one by one."""
    reads = _owner(dataset, "__getitem__")
    if reads is Subset:
        return take(dataset.dataset, torch.tensor([dataset.indices[place] for place in index.tolist()]))
    if reads is not None and reads is _owner(dataset, "samples_at"):
        taken: Piece = dataset.samples_at(index)
        return taken
    return _piece([tuple(dataset[place]) for place in index.tolist()])


def _owner(value: object, method: str) -> type | None:
    """Return the class that defines a method of `value`: one that reads samples in its own way is asked for each."""
    return next((kind for kind in type(value).__mro__ if method in vars(kind)), None)


def _piece(samples: list[tuple[Any, ...]]) -> Piece:
    images = [as_tensor(sample[0]) for sample in samples]
    if len({image.shape for image in images}) > 1:
        shapes = ", ".join(sorted({str(tuple(image.shape)) for image in images})[:3])
        raise InputError(f"expected images of one shape, got {shapes}; resize them first")
    given = next((sample[2] for sample in samples if len(sample) > 2), None)
    targets = None
    if given is not None:
        unknown = torch.full_like(given, torch.nan)
        targets = torch.stack([sample[2] if len(sample) > 2 else unknown for sample in samples])
    return torch.stack(images), torch.tensor([int(sample[1]) for sample in samples]), targets


def as_tensor(image: Any) -> Tensor:
    """Return one image, a tensor or PIL image, as a tensor (channels, H, W)."""
    if isinstance(image, Image.Image):
        image = to_8_bits(image)
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        pixels = torch.from_numpy(np.array(image))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim != 3:
        came = f"a tensor {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"expected images as tensors (channels, height, width) or PIL images, got {came}")
    return image


def inputs(both: Pieces, preprocessing: Preprocessing | None, device: torch.device) -> Batch:
    pieces = [piece for piece in both if piece is not None]
    images = [normalize(images.to(device, non_blocking=True), preprocessing) for images, _, _ in pieces]
    return Batch(torch.cat(images), torch.cat([labels for _, labels, _ in pieces]).to(device), _targets(pieces, device))


def _targets(pieces: list[Piece], device: torch.device) -> Tensor | None:
    width = next((targets.shape[1] for _, _, targets in pieces if targets is not None), None)
    if width is None:
        return None
    rows = [t if t is not None else torch.full((len(labels), width), torch.nan) for _, labels, t in pieces]
    return torch.cat(rows).to(device)


def real_labels(pieces: Pieces, share: Share) -> Counter[int]:
    return Counter(pieces[0][1].tolist()) if pieces[0] is not None and share.count else Counter()


def together(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the rows of batches of `sizes`, in order, of which this process has its share in `parts`."""
    mine = torch.cat(list(parts))
    place = ranks()
    if place.size == 1:
        return mine
    whole = mine.new_empty((sum(sizes), *mine.shape[1:]))
    for rank, rows in enumerate(gathered(mine)):
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        index = [np.arange(start + rank, start + size, place.size) for start, size in zip(starts, sizes, strict=True)]
        whole[torch.from_numpy(np.concatenate(index))] = rows
    return whole

"""Batches that are put together at once hold what their samples hold one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from expunge.batches import as_tensor, take
from expunge.data import TensorImages, hold_out
from expunge.methods.unsir import Mirrored, Taught


def coloured(count: int = 12) -> TensorImages:
    draw = torch.Generator().manual_seed(0)
    return TensorImages(
        torch.randint(0, 256, (count, 3, 5, 4), dtype=torch.uint8, generator=draw), torch.arange(count) % 3
    )


class Pictures(Dataset[Any]):
    """A data set of somebody else's, of PIL images, that says nothing but its samples."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(coloured().images[index].permute(1, 2, 0).numpy()), index % 3


class Darker(TensorImages):
    """Images in memory that are changed as they are read."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image // 2, label


def kept(dataset: Dataset[Any]) -> Dataset[Any]:
    return hold_out(dataset, share=0.3, most=100, seed=0)[0]


@pytest.mark.parametrize(
    "dataset",
    [
        coloured(),
        Pictures(),
        Darker(coloured().images, coloured().labels),
        Subset(coloured(), [7, 3, 3, 0, 5, 9]),
        ConcatDataset([coloured(4), coloured(5)]),
        kept(coloured()),
        Mirrored(kept(coloured())),
        Mirrored(Pictures()),
        Taught(coloured(), torch.rand(12, 3)),
        Subset(Taught(Mirrored(kept(Darker(coloured().images, coloured().labels))), torch.rand(18, 3)), range(4, 18)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_batch_holds_its_samples(dataset: Any) -> None:
    index = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1))[:6]
    samples = [dataset[place] for place in index.tolist()]
    images, labels, targets = take(dataset, index)
    assert torch.equal(images, torch.stack([as_tensor(sample[0]) for sample in samples]))
    assert labels.tolist() == [int(sample[1]) for sample in samples]
    if len(samples[0]) == 2:
        assert targets is None
    else:
        assert targets is not None
        assert torch.equal(targets, torch.stack([sample[2] for sample in samples]))


def test_a_batch_is_a_copy() -> None:
    dataset = coloured()
    before = dataset.images.clone()
    take(Mirrored(dataset), torch.arange(24))[0].zero_()
    assert torch.equal(dataset.images, before)


def test_mirrored_images_follow_the_others() -> None:
    dataset = Mirrored(coloured())
    images, labels, _ = take(dataset, torch.arange(24))
    assert torch.equal(images[12:], images[:12].flip(-1))
    assert labels.tolist() == dataset.labels.tolist() == [*coloured().labels.tolist()] * 2

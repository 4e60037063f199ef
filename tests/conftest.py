"""Shared fixtures: a tiny trained model on real digits, made once."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_num_threads(1)  # small tensors: a second thread costs more than it helps, and machines are shared
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "expunge-tests-hub")  # not the user's own cache
os.environ["HF_HUB_OFFLINE"] = "1"

from expunge.data import TensorImages, draw, open_source, stage, with_test_split, without  # noqa: E402
from expunge.journal import Journal  # noqa: E402
from expunge.methods.unsir import unsir  # noqa: E402
from expunge.schema import Preprocessing, Split, TrainConfig  # noqa: E402
from expunge.training import predict, train  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Tiny:
    """A small network trained on 8 x 8 digits, and the split for forgetting the threes."""

    model: nn.Module
    split: Split

    def accuracy(self, model: nn.Module, *, forget: bool) -> float:
        """Accuracy on held-out digits, of the forget class or of the others."""
        assert self.split.test is not None
        answers = predict(model, self.split.test, preprocessing=self.split.preprocessing)
        chosen = torch.isin(answers.labels, torch.tensor(self.split.forget_classes)) == forget
        return (answers.logits.argmax(1) == answers.labels)[chosen].double().mean().item()


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm and dropout, a linear head that is not called fc."""

    def __init__(self, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1),
        )  # fmt: skip
        self.answer = nn.Linear(128, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.answer(self.body(images))
        return answers


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return make_tiny()


@pytest.fixture(autouse=True)
def _tiny_evaluates(request: pytest.FixtureRequest) -> None:
    """Begin each test with `tiny` in eval mode: left in train mode, it would have its statistics moved by the next."""
    if "tiny" in request.fixturenames:
        request.getfixturevalue("tiny").model.eval()


def make_tiny() -> Tiny:
    source, test = with_test_split(open_source("digits"))
    preprocessing = Preprocessing(size=(8, 8), mean=(0.3,), std=(0.38,))
    images = stage(source.train, preprocessing).dataset
    torch.manual_seed(0)
    model = TinyNet()
    config = TrainConfig(epochs=12, lr=0.01, batch_size=64, schedule="one_cycle", precision="fp32")
    train(model, images, config, seed=0, preprocessing=preprocessing)
    retain = stage(draw(without(source.train, (3,)), per_class=100, seed=0), preprocessing).dataset
    split = Split(
        forget_classes=(3,),
        retain=retain,
        test=stage(test, preprocessing).dataset,
        class_names=source.class_names,
        preprocessing=preprocessing,
    )
    return Tiny(model, split)


@pytest.fixture(scope="session")
def forgotten(tiny: Tiny) -> tuple[nn.Module, Journal]:
    """The tiny model after the default method, the threes forgotten, and the journal of that run."""
    journal = Journal()
    return unsir(tiny.model, tiny.split.zero_glance(), seed=0, journal=journal), journal


def random_images(count: int, num_classes: int = 3, shape: tuple[int, ...] = (1, 8, 8)) -> TensorImages:
    """Float images whose mean tells their class: easy to learn."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % num_classes
    images = torch.randn((count, *shape), generator=generator) * 0.3 + labels.view(-1, 1, 1, 1)
    return TensorImages(images, labels)

"""The formulas of docs/complexity.md, against the floating-point operations that torch counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import Tiny
from expunge.bench.cost import FlopCount
from expunge.data import TensorImages, draw, open_source, stage, with_test_split
from expunge.methods import METHODS
from expunge.schema import Split
from expunge.training import answer

RETAINED, FORGOTTEN, CLASSES = 900, 100, 10


@dataclass(frozen=True)
class Image:
    """Operations on one image: forward, training step (T), and forward with the gradient of the image (X)."""

    forward: float
    step: float
    gradient: float


Formula = Callable[[Image], float]
BOTH = RETAINED + FORGOTTEN
FORMULAS: dict[str, tuple[str, Formula]] = {  # preset, and operations as docs/complexity.md has them
    "retrain": ("default", lambda o: 12 * RETAINED * o.step),
    "fine_tune": ("default", lambda o: 10 * RETAINED * o.step),
    "l1_sparse": ("default", lambda o: 10 * RETAINED * o.step),
    "neg_grad": ("default", lambda o: 4500 * o.step),  # 90 steps: batches of 64 and 36
    "neg_grad_plus": ("default", lambda o: 10 * BOTH * o.step),  # 320 steps of 32
    "random_labels": ("default", lambda o: 10 * BOTH * o.step),
    "salun": ("default", lambda o: (10 * BOTH + FORGOTTEN) * o.step),
    "bad_teacher": ("default", lambda o: BOTH * (o.step + o.forward)),
    "scrub": ("default", lambda o: (2 * 500 + 3 * RETAINED) * (o.step + o.forward)),  # 10 steps are 5 epochs of 100
    "fisher": ("small", lambda o: 128 * (o.forward + CLASSES * (o.step - o.forward))),
    "ssd": ("default", lambda o: (BOTH + FORGOTTEN) * o.step),
    "boundary_shrink": ("small", lambda o: 8000 * (o.step + o.gradient + o.forward)),  # 160 steps of 64 and 36
    "boundary_expand": ("small", lambda o: 8000 * o.step),
    "jit": ("small", lambda o: FORGOTTEN * (o.step + 25 * o.forward)),
    "delete": ("default", lambda o: 20 * FORGOTTEN * (o.step + o.forward)),
    "error_min_max": (
        "small",
        lambda o: 64 * CLASSES * 40 * o.gradient + 5 * 64 * (CLASSES + CLASSES - 1) * o.step,
    ),
    "none": ("default", lambda _: 0.0),
    "random_init": ("default", lambda _: 0.0),
}
WITHOUT = {"unsir", "svd_class", "zero_shot_gkt", "head_mask"}
"""What has no closed form here: it depends on what is found, on layers' widths, on a generator, or it is one image."""


def counted(run: Callable[[], object]) -> float:
    with FlopCount() as counter:
        run()
    return float(counter.total)


def image_of(model: nn.Module, size: int) -> Image:
    images = torch.zeros((size, 1, 8, 8))
    frozen = torch.zeros((size, 1, 8, 8), requires_grad=True)
    parameters = list(model.parameters())

    def step() -> None:
        answer(model, images).sum().backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    def gradient() -> None:
        for parameter in parameters:
            parameter.requires_grad_(False)
        torch.autograd.grad(answer(model, frozen).sum(), frozen)
        for parameter in parameters:
            parameter.requires_grad_(True)

    return Image(*(counted(run) / size for run in (lambda: answer(model, images), step, gradient)))


@pytest.fixture(scope="module")
def split(tiny: Tiny) -> Split:
    source, _ = with_test_split(open_source("digits"))
    threes = draw(source.train.select(np.flatnonzero(source.train.labels == 3)), per_class=FORGOTTEN, seed=0)
    assert tiny.split.preprocessing is not None
    dataset = stage(threes, tiny.split.preprocessing).dataset
    assert isinstance(dataset, TensorImages)
    return replace(tiny.split, forget=dataset)


def tiny_maps() -> nn.Module:
    """Return a network whose last convolution sees a map smaller than its window: see expunge.convolutions."""
    torch.manual_seed(0)
    narrowing = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()]
    last = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*narrowing, *last).eval()


@pytest.mark.parametrize("maps", ["ordinary", "tiny"])
@pytest.mark.parametrize("name", FORMULAS)
def test_operations_are_those_of_the_formula(name: str, maps: str, tiny: Tiny, split: Split) -> None:
    preset, formula = FORMULAS[name]
    method, model = METHODS[name], tiny_maps() if maps == "tiny" else tiny.model
    image = image_of(model, size=1 if name == "fisher" else 8)  # which goes through them one by one
    found = counted(lambda: method(model, method.view(split), method.presets[preset](), seed=0))
    assert found == pytest.approx(formula(image), rel=0.01, abs=5 * image.forward)  # a few images to look at the model


def test_every_method_has_a_line() -> None:
    assert set(FORMULAS) | WITHOUT == set(METHODS)
    docs = Path(__file__).parents[1] / "docs"
    for page in ("complexity.md", "methods.md"):
        text = (docs / page).read_text(encoding="utf-8")
        for name in METHODS:
            assert f"`{name}`" in text, f"{name} is not in {page}"

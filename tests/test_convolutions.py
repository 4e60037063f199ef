"""Convolutions over tiny maps against torch's own, and the precision that a model is trained in."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import Tiny
from expunge import TrainConfig
from expunge.convolutions import TinyMaps
from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.models import build_model, parse_model
from expunge.training import answer, precision_for, predict, train

SHAPES = [(1, 1), (2, 2), (2, 3), (1, 4), (3, 3)]
SETTINGS: list[Any] = list(itertools.product(((1, 1), (3, 3), (1, 3)), (1, 2, (2, 1)), (0, 1, 2, (1, 0)), (1, 2)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_is_torchs_own(shape: tuple[int, int], layout: torch.memory_format) -> None:
    done = 0
    for window, stride, padding, dilation in SETTINGS:
        generator = torch.Generator().manual_seed(0)
        parts = [
            torch.randn(*dims, generator=generator, dtype=torch.double)
            for dims in ((5, 7, *shape), (6, 7, *window), (6,))
        ]
        parts[:2] = [part.contiguous(memory_format=layout) for part in parts[:2]]
        image, weight, bias = (part.requires_grad_() for part in parts)
        try:
            meant = F.conv2d(image, weight, bias, stride, padding, dilation)
        except RuntimeError:
            with TinyMaps(), pytest.raises(RuntimeError):
                F.conv2d(image, weight, bias, stride, padding, dilation)
            continue
        with TinyMaps():
            found = F.conv2d(image, weight, bias, stride, padding, dilation)
        given = torch.randn(found.shape, generator=generator, dtype=torch.double)
        torch.testing.assert_close(found, meant)
        for mine, theirs in zip(
            torch.autograd.grad(found, (image, weight, bias), given),
            torch.autograd.grad(meant, (image, weight, bias), given),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)
        done += 1
    assert done > 20


@pytest.mark.parametrize("groups", [1, 2])
def test_other_convolutions_are_left_alone(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 3, padding="same", groups=groups)
    image = torch.rand(2, 4, 5, 5)
    with TinyMaps():
        assert torch.equal(layer(image), F.conv2d(image, layer.weight, layer.bias, padding="same", groups=groups))


def test_resnet_gives_the_same_with_a_fifth_less_work() -> None:
    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(num_classes=10).eval(), torch.rand(3, 3, 32, 32)
    with FlopCounterMode(display=False) as plain:
        meant = model(images)
    with FlopCounterMode(display=False) as fewer:
        found = answer(model, images)
    torch.testing.assert_close(found, meant, atol=1e-5, rtol=1e-4)
    assert fewer.get_total_flops() < 0.8 * plain.get_total_flops()


def test_bf16_trains_to_the_same_answers_within_tolerance(tiny: Tiny) -> None:
    """Three passes at a small rate: answers move apart by rounding, no more, and the phase says what it ran in."""
    found = {}
    for precision in ("fp32", "bf16"):
        model, journal = copy.deepcopy(tiny.model), Journal()
        config = TrainConfig(epochs=3, lr=1e-3, batch_size=64, precision=precision)
        train(model, tiny.split.retain, config, seed=0, preprocessing=tiny.split.preprocessing, journal=journal)
        assert [phase.precision for phase in journal.phases] == [precision]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert tiny.split.test is not None
        found[precision] = predict(model, tiny.split.test, preprocessing=tiny.split.preprocessing).logits.softmax(1)
    assert not torch.equal(found["fp32"], found["bf16"])
    assert (found["fp32"] - found["bf16"]).abs().mean() < 0.02
    assert (found["fp32"].argmax(1) == found["bf16"].argmax(1)).double().mean() > 0.97


@pytest.mark.parametrize(
    ("spec", "dense"),
    [
        ("torchvision:resnet18", True),
        ("allcnn", True),
        ("torchvision:mobilenet_v2", False),
        ("timm:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=1&embed_dim=64&num_heads=2", False),
    ],
)
def test_precision_follows_model_and_device(spec: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = build_model(parse_model(spec), num_classes=10, channels=3), torch.rand(4, 3, 32, 32)

    def units(**found: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)

    for unit in ("amx_bf16", "avx512_bf16"):
        units(**{unit: True})
        assert precision_for("auto", model, images) == ("bf16" if dense else "fp32")
        assert precision_for("fp32", model, images) == "fp32"
    units(amx_bf16=False, avx512_bf16=False)
    assert precision_for("auto", model, images) == "fp32"
    assert precision_for("bf16", model, images) == "bf16"


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="expected precision auto, fp32 or bf16, got 'fp16'"):
        TrainConfig(precision="fp16")  # type: ignore[arg-type]


def test_a_batch_of_tiny_maps_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    before = copy.deepcopy(model.state_dict())
    labels = torch.arange(8) % 2
    train(model, TensorImages(torch.rand(8, 3, 2, 2), labels), TrainConfig(steps=2, batch_size=4, lr=0.1), seed=0)
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])

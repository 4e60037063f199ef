"""Gradient checkpointing: the same weights, with less kept in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.memory import kept_bytes
from expunge.models import AllCNN
from expunge.recompute import blocks, recomputed, segments
from expunge.schema import LayerMode, TrainConfig
from expunge.training import predict, to_train, train

# small: BatchNorm over the eight values that a map of one place has makes much of a rounding
CONFIG = TrainConfig(steps=2, lr=0.002, batch_size=8, optimizer="sgd", precision="fp32")


def vit() -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=32, num_heads=2, num_classes=5,
        drop_path_rate=0.2,
    )  # fmt: skip


def transformer() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm ViT, with dropped paths": vit,
    "timm ResNet": lambda: timm.create_model("resnet10t", num_classes=5),
    "timm VGG, for which timm has none": lambda: timm.models.vgg.VGG(
        [8, 8, "M", 8, 8, "M"], 5, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01
    ),
    "transformers": transformer,
    "torchvision ResNet": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision MobileNet, with dropout": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "All-CNN, in place": lambda: AllCNN(5, width=8),
}


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]()


def images(count: int = 20) -> TensorImages:
    generator = torch.Generator().manual_seed(1)
    return TensorImages(torch.randn((count, 3, 32, 32), generator=generator), torch.arange(count) % 5)


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_the_same(name: str) -> None:
    plain, anew = build(name), build(name)
    before = copy.deepcopy(plain.state_dict())
    train(plain, images(), CONFIG, seed=3)
    train(anew, images(), replace(CONFIG, gradient_checkpointing=True), seed=3)
    assert type(anew) is type(plain)
    assert [type(part) for part in anew.modules()] == [type(part) for part in plain.modules()]
    moved = 0.0
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(anew.state_dict()[key], value, atol=3e-6, rtol=1e-5)  # statistics moved once too
        moved = max(moved, (value - before[key]).abs().max().item())
    assert moved > 1e-4
    assert torch.equal(predict(anew, images()).logits, predict(copy.deepcopy(anew), images()).logits)


@pytest.mark.parametrize("mode", ["train", "batch", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept(name: str, mode: LayerMode) -> None:
    model, batch = build(name), images(4).images
    to_train(model, mode)
    whole = kept_bytes(model, lambda: model(batch))
    with recomputed(model):
        to_train(model, mode)
        parts = kept_bytes(model, lambda: model(batch))
    assert parts < 0.8 * whole
    assert kept_bytes(model, lambda: model(batch)) == pytest.approx(whole, rel=0.01)  # and as before afterwards


def test_a_model_without_a_way_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 32 * 32, 5)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.layer(batch.flatten(1))
            return answer

    config = replace(CONFIG, gradient_checkpointing=True)
    with pytest.raises(InputError, match=r"gradient checkpointing needs a timm .* Plain has neither"):
        train(Plain(), images(), config, seed=0)


def test_no_segment_begins_in_place() -> None:
    layers = [nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True), nn.Conv2d(1, 1, 1), nn.SiLU(inplace=True), nn.Conv2d(1, 1, 1)]
    assert [len(part) for part in segments(layers)] == [4, 1]
    assert [len(part) for part in segments([nn.Linear(1, 1)] * 9)] == [3, 3, 3]
    assert [len(part) for part in segments([nn.Linear(1, 1)] * 2)] == [2]


def test_blocks_of_models() -> None:
    assert len(blocks(torchvision.models.resnet50())) == 3 + 4 + 6 + 3
    assert len(blocks(vit())) == 4
    assert len(blocks(transformer())) == 3
    branches = nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ReLU()})])
    parallel = nn.Sequential(nn.Linear(2, 2), branches)  # nobody calls a list
    assert [type(block) for block in blocks(parallel)] == [nn.Linear] * 3

"""The main job on a slice of the real CIFAR-10, through the public commands; skipped where it is not at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import SHARED
from expunge.commands import RetainOptions, forget_command, train_command
from expunge.schema import TrainConfig
from expunge.weights import load_weights
from expunge.workspace import DataOptions

CIFAR10 = SHARED / "cifar10"
pytestmark = pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not beside the checkout (shared/data)")

MODEL = """
from torch import nn

def small(num_classes, channels):
    def block(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
    body = block(channels, 24), block(24, 48), block(48, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(64, num_classes))
"""


def test_forget_two_classes_of_cifar10(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    data = DataOptions(spec=str(CIFAR10))
    weights = tmp_path / "original.safetensors"
    config = TrainConfig(epochs=2, lr=0.01, batch_size=128, optimizer="adamw", schedule="one_cycle")
    metadata = train_command(data, f"{tmp_path / 'model.py'}:small", weights, config=config, augment=False)
    assert metadata.training is not None
    assert metadata.training["test_accuracy"] > 0.5
    assert metadata.training["train_samples"] == 50_000

    out = tmp_path / "out"
    model = f"{tmp_path / 'model.py'}:small"
    outcome = forget_command(
        data, model, weights, ["airplane,bird"], out, retain=RetainOptions(per_class=200), settings=["noise_steps=20"]
    )
    record = json.loads((out / "record.json").read_text())
    assert record["classes"]["forget"] == ["airplane", "bird"]
    assert record["data"]["retain_samples"] == 1600
    assert record["samples_read"]["method"]["airplane"] == record["samples_read"]["method"]["bird"] == 0
    assert record["samples_read"]["retain_sample"]["cat"] == 200
    assert record["data"]["test_forget_samples"] == 2000
    before, after = record["metrics"]["before"], record["metrics"]["after"]
    assert before["forget_accuracy"] > 0.3
    assert after["forget_accuracy"] <= 0.01
    assert after["retain_accuracy"] > before["retain_accuracy"] - 0.06
    state, said = load_weights(outcome.files[0])
    assert said.forgotten == ("airplane", "bird")
    assert state.keys() == load_weights(weights)[0].keys()

"""The commands where model and images lie on different devices; the GPU is pretended. The methods: test_methods.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretended_gpu import OnGpu, pretended_gpu
from test_cli import FAST, Trained, invoke, record_of


def test_the_pretence_refuses_what_a_gpu_refuses() -> None:
    with pretended_gpu() as gpu:
        there, here = torch.ones(3, device=gpu), torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            here[torch.tensor([0])] = there[:1]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert isinstance(there + 1, OnGpu)
        assert torch.equal(there.cpu() + here, torch.full((3,), 2.0))
        assert there[torch.tensor([0, 1])].sum().item() == 2


def test_train_forget_and_audit(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    original, retrained, out = tmp_path / "original.safetensors", tmp_path / "without.safetensors", tmp_path / "out"
    given = ["--data", "digits", "--model", trained.model, "--device", "cuda"]
    recipe = [*given, "--epochs", "8", "--batch-size", "64", "--lr", "0.01"]
    against = ["--retrained", str(retrained)]
    models = ["--original", str(original), "--unlearned", str(out / "unlearned.safetensors"), *against]
    with pretended_gpu():
        for words in (
            ["train", *recipe, "--out", str(original)],
            ["train", *recipe, "--out", str(retrained), "--without", "3"],
            ["forget", *given, *against, "--weights", str(original), "--classes", "3", "--out", str(out), *FAST],
            ["audit", *given, *models, "--out", str(tmp_path / "audit")],
        ):
            result = invoke(*words)
            assert result.exit_code < 2, result.output  # 1: few steps leave something of the class
    assert record_of(out)["environment"]["device"] == "a pretended GPU"
    assert "cannot run" not in result.output, result.output
    assert {value.device.type for value in load_file(out / "unlearned.safetensors").values()} == {"cpu"}

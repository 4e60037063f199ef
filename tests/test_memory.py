"""Peak memory does not grow with the retain sample, and what is learned at once is as much as memory is free for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import memory, signals
from expunge.journal import Journal
from expunge.signals import descend
from test_training import plain_network

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_ten_times_as_many_images_take_as_much_memory(kind: str) -> None:
    words = ["--images", "3000", "--side", "64", "--memory", "16M", "--kind", kind, "--json"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    assert (small["images"], large["images"]) == (2_700, 27_000)  # without the class to forget
    assert (small["dropped"], large["dropped"]) == (300, 3_000)
    # held at once, the larger sample alone would break this
    assert large["decoded_bytes"] - small["decoded_bytes"] > 0.1 * small["peak_bytes"]
    assert large["peak_bytes"] < 1.1 * small["peak_bytes"]


def test_learned_images_are_sized_to_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_network().eval().requires_grad_(False)
    start = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    image = start[:1].clone().requires_grad_()
    one = memory.kept_bytes(model, lambda: model(image))
    found, journal, seen = [], Journal(), set()
    model.register_forward_hook(lambda _, given, __: seen.add(len(given[0])))
    for free in (10**12, 5 * one, 0):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        with journal.phase("noise", steps=None) as meter:
            found.append(descend(
                model, start, torch.arange(7) % 3, lambda logits, labels, _: F.cross_entropy(logits, labels),
                lr=0.1, steps=4, precision="fp32", meter=meter,
            ))  # fmt: skip
    assert seen == {7, 2, 1}  # of seven: whole, in four parts of two or one, one by one
    told = [f"memory is free for {count} images at once, of batches of 7" for count in (2, 1)]
    assert [phase.note for phase in journal.phases] == ["", *told]
    for parts in found[1:]:
        torch.testing.assert_close(parts, found[0], atol=1e-5, rtol=1e-5)


def test_an_image_of_a_batch_keeps_no_more_than_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def fit(model: nn.Module, _: torch.device, run: Callable[[], object]) -> int:
        found.append(memory.kept_bytes(model, run))
        return 100

    monkeypatch.setattr(signals, "images_that_fit", fit)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(2 * 64 * 64, 3))
    for count in (1, 96):
        with Journal().phase("noise", steps=None) as meter:
            descend(
                model.eval(), torch.rand(count, 1, 64, 64), torch.zeros(count, dtype=torch.int64),
                lambda logits, labels, _: F.cross_entropy(logits, labels), lr=0.1, steps=1, precision="fp32",
                meter=meter,
            )  # fmt: skip
    assert found[0] == found[1] > 4 * 64 * 64


def test_kept_bytes() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Sigmoid(), nn.Linear(20, 5))
    images = torch.rand(3, 10)
    # the images (for the first weights) and the sigmoid's answer (for itself and the second): float32
    assert memory.kept_bytes(model, lambda: model(images)) == 4 * (3 * 10 + 3 * 20)
    assert memory.kept_bytes(model.requires_grad_(False), lambda: model(images)) == 0


@pytest.mark.parametrize(("limit", "left"), [("max", math.inf), ("1000", 600), ("300", 0), (None, math.inf)])
def test_the_memory_of_a_container(limit: str | None, left: float, tmp_path: Path) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("500\n")
        (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 100\n")
    assert memory._left_in_group(tmp_path) == left
    assert 0 < memory.free_bytes(torch.device("cpu")) < 2**50

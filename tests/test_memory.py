"""Peak memory does not grow with the retain sample, and what is learned at once is as much as memory is free for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
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


def write_group(folder: Path, limit: str, version: int) -> None:
    """A group that holds 500 bytes and can give 100 back, 10 of them not held by the groups in it."""
    names = memory.LIMITS_V1 if version == 1 else memory.LIMITS_V2
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text("500\n")
    (folder / "memory.stat").write_text(f"inactive_file {10 if version == 1 else 100}\ntotal_inactive_file 100\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({}, math.inf),
        ({"": "1000"}, 600),  # a container that sees only its own group, under the path that the host knows
        ({"job/step": "1000"}, 600),
        ({"": "5000", "job": "900", "job/step": "1000"}, 500),
        ({"job": "2000", "job/step": "300"}, 0),
        ({"job/step/below": "300", "other": "300"}, math.inf),
    ],
)
def test_the_memory_of_a_control_group(limits: dict[str, str], left: float, version: int, tmp_path: Path) -> None:
    for path, limit in limits.items():
        write_group(tmp_path / ("memory" if version == 1 else "") / path, limit, version)
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/job\n4:hugetlb,memory:/job/step\n0::/\n" if version == 1 else "0::/job/step\n")
    assert memory._left_in_groups(tmp_path, own) == left


def test_the_memory_of_no_control_group(tmp_path: Path) -> None:
    assert memory._left_in_groups(tmp_path, tmp_path / "missing") == math.inf
    write_group(tmp_path, "max", 2)
    (tmp_path / "own").write_text("0::/\n")
    assert memory._left_in_groups(tmp_path, tmp_path / "own") == math.inf


def test_processes_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1200))
    monkeypatch.setattr(memory, "_left_in_groups", lambda *_: math.inf)
    for name in ("mem_get_info", "memory_reserved", "memory_allocated"):
        found = {"mem_get_info": (1200, 5000), "memory_reserved": 70, "memory_allocated": 50}[name]
        monkeypatch.setattr(torch.cuda, name, lambda _, found=found: found)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (memory.free_bytes(cpu), memory.free_bytes(gpu)) == (1200, 1220)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each rank has a GPU of its own
    assert (memory.free_bytes(cpu), memory.free_bytes(gpu)) == (600, 1220)
    monkeypatch.setenv(memory.SHARERS, "3")
    assert (memory.free_bytes(cpu), memory.free_bytes(gpu)) == (200, 420)


def test_the_memory_of_this_machine() -> None:
    assert 0 < memory.free_bytes(torch.device("cpu")) < 2**50

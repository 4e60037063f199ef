"""Several processes do one run: as one process would, or not at all."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist

from expunge.batches import Share, augment
from expunge.commands import RetainOptions, forget_command, train_command
from expunge.data import open_source, stage, with_test_split
from expunge.errors import InputError
from expunge.processes import (
    Ranks,
    _meeting_place,
    agreed,
    gathered,
    ranks,
    refuse_several,
    shared_statistics,
    summed,
)
from expunge.schema import Preprocessing, TrainConfig
from expunge.sharding import shards_of
from expunge.training import predict
from expunge.workspace import DataOptions, pick_device

HERE = Path(__file__).parent
NET = """
from torch import nn
def build(num_classes, channels=1):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, num_classes))
"""
LOST = 75


def start(words: Sequence[str], size: int, **more: str) -> list[subprocess.Popen[str]]:
    """Start `python WORDS` as so many processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | common | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str, str]]:
    """Return (exit code, output, errors) of each; one that does not end in time fails the test."""
    try:
        ended = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


class Case:
    """A small network on digits, and the command that forgets the threes."""

    def __init__(self, folder: Path) -> None:
        self.model = f"{folder / 'net.py'}:build"
        (folder / "net.py").write_text(NET)
        self.weights = folder / "w.safetensors"
        config = TrainConfig(epochs=8, lr=0.01, batch_size=64, optimizer="adamw", schedule="one_cycle")
        train_command(DataOptions(spec="digits"), self.model, self.weights, config=config)

    def words(self, out: Path, *more: str) -> list[str]:
        words = ["-m", "expunge", "forget", "--weights", str(self.weights), "--model", self.model]
        words += ["--data", "digits", "--classes", "3", "--retain-per-class", "60", "--out", str(out), *more]
        return words if "--preset" in more else [*words, "--preset", "fast"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("processes"))


def probabilities(case: Case, weights: Path) -> Tensor:
    from expunge.models import build_model, parse_model

    model = build_model(parse_model(case.model), num_classes=10, channels=1)
    model.load_state_dict(load_file(weights))
    _, test = with_test_split(open_source("digits"))
    stated = json.loads((weights.parent / "record.json").read_text())["data"]["preprocessing"]
    preprocessing = Preprocessing(size=tuple(stated["size"]), mean=tuple(stated["mean"]), std=tuple(stated["std"]))
    return predict(model, stage(test, preprocessing).dataset, preprocessing=preprocessing).logits.softmax(1)


def test_forget_by_two_processes(case: Case, tmp_path: Path) -> None:
    ended = finish(start(case.words(tmp_path / "two"), 2))
    assert [code for code, _, _ in ended] in ([0, 0], [1, 0]), ended
    assert ended[1][1:] == ("", "")  # only the first prints
    assert "done by 2 processes together" in ended[0][1]
    forget_command(
        DataOptions(spec="digits"), case.model, case.weights, ["3"], tmp_path / "one",
        retain=RetainOptions(per_class=60), preset="fast",
    )  # fmt: skip
    one, two = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("one", "two"))
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names  # no temporary file of a second writer
    assert two["samples_read"] == one["samples_read"]
    assert [trial["outcome"] for trial in two["calibration"]["trials"]] == [
        trial["outcome"] for trial in one["calibration"]["trials"]
    ]
    apart = probabilities(case, tmp_path / "one/unlearned.safetensors") - probabilities(
        case, tmp_path / "two/unlearned.safetensors"
    )
    assert apart.abs().max() < 0.05
    assert apart.abs().mean() < 2e-3


@pytest.mark.slow
def test_processes_refuse_together_what_is_there_already(tmp_path: Path) -> None:
    """Both by what the first one found, before either reads the weights, which are not there."""
    out = tmp_path / "w.safetensors"
    out.write_text("old")
    forget = ["forget", "--weights", "none.pt", "--classes", "3", "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "record.json").write_text("old")
    for words, there in ((["train", "--out", str(out)], out), (forget, tmp_path / "out" / "record.json")):
        ended = finish(start(["-m", "expunge", *words, "--data", "digits", "--model", "allcnn", "--quiet"], 2))
        assert sorted(code for code, _, _ in ended) == [2, LOST], ended
        told = "".join(errors for _, _, errors in ended)
        assert told.startswith(f"error: {there} is there already"), ended
        assert told.count("\n") == 1, ended
        assert there.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "out"}


def test_one_process_needs_no_other() -> None:
    assert ranks() == Ranks(0, 1)
    assert gathered("x") == ["x"]
    assert agreed("x") == "x"
    assert summed(1.5, 2) == [1.5, 2]
    refuse_several("nothing")


def test_shares_make_up_the_batch() -> None:
    batch, config = torch.rand(7, 1, 6, 6), TrainConfig(flip=True, crop=1)
    torch.manual_seed(3)
    whole = augment(batch, config)
    for size in (2, 4, 9):
        rebuilt, counts = torch.full_like(whole, torch.nan), 0
        for rank in range(size):
            share = Share(7, Ranks(rank, size))
            torch.manual_seed(3)
            mine = augment(batch[share.rows], config, share)
            counts += share.count
            if share.count:
                rebuilt[share.rows] = mine
        assert counts == 7
        assert torch.equal(rebuilt, whole)


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="the audit runs in one process"):
        refuse_several("the audit")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="DeepSpeed is not supported: leave it out of accelerate's options"):
        ranks()


def together(names: str, size: int, file: Path, **more: str) -> dict[str, Any]:
    """Return what cases of together.py give, done by so many processes."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    ended = finish(start([str(HERE / "together.py"), names, str(file)], size, PYTHONPATH=paths, **more))
    assert [code for code, _, _ in ended] == [0] * size, ended
    found: dict[str, Any] = torch.load(file, weights_only=False)
    return found


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_loss_of_nan_in_one_process_stops_all_alike(sharded: bool, tmp_path: Path) -> None:
    asked = {"ACCELERATE_USE_FSDP": "true"} if sharded else {}
    one, two = (together("diverged", size, tmp_path / f"{size}.pt", **asked)["diverged"] for size in (1, 2))
    assert one["said"][0].startswith("the loss became nan at step 3 of train; nothing was kept")
    assert two["said"] == one["said"] * 2
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, atol=1e-5, rtol=1e-5)


def test_a_loss_of_nan_counts_from_a_process_without_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.batches.summed", lambda *mine: list(mine))
    assert math.isnan(Share(1, Ranks(1, 2)).summed(math.nan, 1)[0])
    assert Share(1, Ranks(1, 2)).summed(0.5, 1) == (0.0, 0)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, whose collectives work as those of many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_normalization_is_torchs_own(affine: bool, dtype: torch.dtype) -> None:
    """In bf16, too, sums are float32, and what comes out and is kept is bf16."""
    torch.manual_seed(0)
    images = (3 + torch.randn(50, 4, 7, 7)).to(dtype)
    found = []
    for shared in (True, False):
        layer, given = nn.BatchNorm2d(4, affine=affine), images.clone().requires_grad_()
        for parameter in layer.parameters():
            torch.nn.init.uniform_(parameter, 0.5, 2.0, generator=torch.Generator().manual_seed(1))
        with shared_statistics(True) if shared else nullcontext():
            answer = F.relu(layer(given), inplace=True)
        assert answer.dtype == dtype
        torch.autograd.backward((answer.float() ** 2).sum())
        assert given.grad is not None
        assert given.grad.dtype == dtype
        grads = [parameter.grad for parameter in layer.parameters()]
        found.append([answer, given.grad, layer.running_mean, layer.running_var, *grads])
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-3, 2**-6)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)
    for one, other in zip(found[0][2:4], found[1][2:4], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


def masked() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.register_hook(torch.zeros(2, 2).mul)  # type: ignore[operator]
    return model


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("model", "why"),
    [
        (tied(), "a parameter is shared by several of its blocks"),
        (nn.Sequential(nn.Linear(2, 2), nn.ParameterList([torch.zeros(())])), "scalar"),
        (masked(), "a method's mask"),
    ],
)
def test_models_that_cannot_be_sharded_are_refused(model: nn.Module, why: str) -> None:
    with pytest.raises(InputError, match=rf"cannot shard Sequential among processes \(.*{why}.*\): leave out --fsdp"):
        shards_of(model)


def test_several_processes_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.workspace.ranks", lambda: Ranks(0, 2))
    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda", 0)))
    with pytest.raises(InputError, match="for the CPU, start them by accelerate launch --cpu"):
        pick_device("cpu")


@pytest.mark.parametrize(("groups", "kind"), [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda")])
def test_sums_go_where_the_callers_group_can_send(monkeypatch: pytest.MonkeyPatch, groups: str, kind: str) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: groups)
    assert _meeting_place().type == kind


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sharded"), [(2, False), (4, False), (2, True)])
def test_each_part_gives_what_one_process_gives(size: int, sharded: bool, tmp_path: Path) -> None:
    """Sharded, as `accelerate launch --use_fsdp` asks for it."""
    names = "in_memory,streamed,stopped,answered,learned,resumed,drifted"
    asked = {"ACCELERATE_USE_FSDP": "true"} if sharded else {}
    one, many = (together(names, count, tmp_path / f"{count}.pt", **asked) for count in (1, size))
    for name in ("in_memory", "streamed", "stopped"):
        alone: dict[str, Any] = one[name]
        shared: dict[str, Any] = many[name]
        for key, value in alone["model"].items():
            torch.testing.assert_close(shared["model"][key], value, atol=1e-5, rtol=1e-5)
        assert all(state == shared["same"][0] for state in shared["same"])  # bit for bit in all processes
        assert shared["phase"][:3] == alone["phase"][:3]
        assert shared["sharded"] is sharded
        assert shared["phase"][3] == pytest.approx(alone["phase"][3], abs=1e-5)
        assert set(shared["seen"]) == set(alone["seen"])  # the same images, mirrored and shifted alike
    for key, value in one["resumed"]["model"].items():
        torch.testing.assert_close(many["resumed"]["model"][key], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(many["answered"]["logits"], one["answered"]["logits"], atol=1e-5, rtol=1e-5)
    for key in ("labels", "streamed"):
        assert torch.equal(many["answered"][key], one["answered"][key])
    torch.testing.assert_close(many["learned"]["images"], one["learned"]["images"], atol=1e-4, rtol=1e-4)
    assert many["drifted"]["same"] == [one["drifted"]["same"][0]] * size
    assert many["stopped"]["phase"][0] == 3  # though the second process would have stopped at 4


@pytest.mark.slow
def test_an_error_of_one_process_is_one_line(case: Case, tmp_path: Path) -> None:
    broken = tmp_path / "net.py"
    broken.write_text(
        NET.replace("nn.AdaptiveAvgPool2d", "Fails(), nn.AdaptiveAvgPool2d").replace(
            "def build",
            "import os, torch\n"
            "class Fails(nn.Module):\n"
            "    def forward(self, x):\n"
            "        if os.environ['RANK'] == '1' and x.requires_grad:\n"
            "            from expunge.errors import InputError\n"
            "            raise InputError('this one fails')\n"
            "        return x\n"
            "def build",
        )
    )
    moved = {name.replace("8.", "9."): value for name, value in load_file(case.weights).items()}  # for one layer more
    save_file(moved, tmp_path / "w.safetensors")
    words = case.words(tmp_path / "out")
    words[words.index("--model") + 1] = f"{broken}:build"
    words[words.index("--weights") + 1] = str(tmp_path / "w.safetensors")
    ended = finish(start([*words, "--quiet"], 2))
    assert [code for code, _, _ in ended] == [LOST, 2], ended
    assert ended[1][2] == "error: this one fails\n"
    assert ended[0][1:] == ("", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_process_ends_the_run(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Twenty runs, in each of which a random process is killed at a random time."""
    rng = random.Random(0)
    began = time.monotonic()
    finish(start(case.words(tmp_path / "whole", "--quiet", "--no-ledger"), 2), 600)
    whole = time.monotonic() - began  # as long as it takes on a machine as busy as this one
    runs, lasted, waited = int(os.environ.get("EXPUNGE_KILLS", "20")), [], []
    for run in range(runs):
        out = tmp_path / f"out{run}"
        processes = start(case.words(out, "--quiet", "--no-ledger"), 2)
        time.sleep(rng.uniform(0.3, 1) * whole)  # before, they may not have met, and wait long for each other
        victim = rng.choice(processes)
        alive = victim.poll() is None
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        ended = finish(processes, 120)
        waited.append(time.monotonic() - killed)
        written = {path.name for path in out.iterdir()} if out.exists() else set()
        assert not written or {"record.json", "report.html", "unlearned.safetensors", "retain_sample.json"} <= written
        lasted.append((alive, [code for code, _, _ in ended], sorted(written)))
        for process, (code, _, errors) in zip(processes, ended, strict=True):
            assert process is victim or code in (0, 1, LOST), (code, errors)
            assert "Traceback" not in errors
    figures = {
        "runs": runs,
        "whole_run_seconds": round(whole, 1),
        "killed_while_running": sum(alive for alive, *_ in lasted),
        "longest_wait_seconds": round(max(waited), 1),
        "had_written_everything": sum(bool(written) for *_, written in lasted),
    }
    record_property("figures", json.dumps(figures))
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    assert any(alive for alive, *_ in lasted)


@pytest.mark.slow
def test_training_goes_on_after_a_kill(case: Case, tmp_path: Path) -> None:
    words = ["-m", "expunge", "train", "--data", "digits", "--model", case.model, "--epochs", "20", "--quiet"]
    words += ["--batch-size", "64", "--out"]
    assert [code for code, *_ in finish(start([*words, str(tmp_path / "whole.safetensors")], 2))] == [0, 0]
    out = tmp_path / "w.safetensors"
    processes = start([*words, str(out)], 2)
    deadline = time.monotonic() + 200
    while not (tmp_path / "w.safetensors.resume").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].kill()
    finish(processes, 120)
    assert not out.exists()
    assert [code for code, *_ in finish(start([*words, str(out)], 2))] == [0, 0]
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)

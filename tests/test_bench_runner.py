"""The benchmark's runner: each cell once, whoever asks, however often it is killed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import SoftFileLease
from torch import nn

from expunge.bench import lab as lab_module
from expunge.bench import runner as runner_module
from expunge.bench import stale as stale_module
from expunge.bench.cells import Cell, Item, Original, Tuning, folder_of, with_needs
from expunge.bench.lab import WEIGHTS, Done, Lab
from expunge.bench.records import attempts_of, read
from expunge.bench.runner import (
    LEASE_SECONDS,
    Work,
    _cores,
    _do,
    _leased,
    _share_device,
    _work_here,
    run_cells,
    submit_cells,
)
from expunge.bench.stale import stale_items
from expunge.bench.tables import Row, tidy_rows
from expunge.data import StreamedImages
from expunge.errors import DivergedError
from expunge.files import bytes_writer
from expunge.methods import METHODS, PRESETS
from expunge.methods.ssd import SsdConfig
from expunge.schema import TrainConfig
from expunge.workspace import DataOptions

NET = """
from torch import nn

def net(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(128, num_classes),
    )
"""
MEASURED = ("seconds", "cpu_seconds", "reference_seconds", "tuning_seconds", "peak_memory_bytes")
"""Columns that no two runs agree in."""


def tiny_cells(root: Path, methods: Sequence[str] = ("none", "head_mask", "ssd"), seeds: int = 1) -> list[Cell]:
    """Cells on digits and a network that trains in half a second."""
    file = root / "net.py"
    file.write_text(NET)
    originals = [
        Original(
            data="digits",
            options=DataOptions(spec="digits"),
            model=f"{file}:net",
            recipe=TrainConfig(epochs=3, lr=0.01, batch_size=64),
            per_class=40,
            seed=seed,
        )
        for seed in range(seeds)
    ]
    return [
        Cell(original=original, forget=forget, method=method, retain_per_class=20, test_per_class=10)
        for original in originals
        for forget in (("3",), ("1", "8"))
        for method in methods
    ]


def told_apart(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def server() -> Any:
    """Processes that start in a moment: forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["expunge.bench.runner", "sklearn.datasets", "sklearn.linear_model"])
    return context


def test_killed_twenty_times_it_ends_with_the_same_table(tmp_path: Path, server: Any) -> None:
    cells = tiny_cells(tmp_path, seeds=3)
    tuning = Tuning(
        original=cells[0].original, forget=("3",), method="ssd", preset="default", trials=3, retain_per_class=20
    )
    cells.append(replace(cells[2], tuning=tuning))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_cells(cells, undisturbed)

    waits, kills = random.Random(0), 0
    while kills < 20:
        process = server.Process(target=run_cells, args=(cells, killed))
        process.start()
        time.sleep(waits.uniform(0.05, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the grid was done before it was killed often enough"
        kills += 1
    result = run_cells(cells, killed)

    assert (result.failed, result.missing) == ((), ())
    assert told_apart(tidy_rows(cells, killed)) == told_apart(tidy_rows(cells, undisturbed))
    kept = {path.relative_to(killed) for path in killed.rglob("*") if path.is_file()}
    assert kept == {path.relative_to(undisturbed) for path in undisturbed.rglob("*") if path.is_file()}


def logged(cells: Sequence[Cell], out: Path, log: Path) -> None:
    """Run cells, and write down each item that is really done."""
    do = Lab.do

    def noted(self: Lab, item: Item) -> Done:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{item.id}\n")
        return do(self, item)

    lab_module.Lab.do = noted  # type: ignore[method-assign]
    run_cells(cells, out)


def test_two_processes_on_one_folder_do_each_item_once(tmp_path: Path, server: Any) -> None:
    cells, log = tiny_cells(tmp_path), tmp_path / "log"
    processes = [server.Process(target=logged, args=(cells, tmp_path / "out", log)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(log.read_text().split()) == sorted(item.id for item in with_needs(cells))
    assert all(row["status"] == "done" for row in tidy_rows(cells, tmp_path / "out"))


def test_workers_of_its_own(tmp_path: Path) -> None:
    cells, told = tiny_cells(tmp_path, methods=("none",)), list[str]()
    result = run_cells(cells, tmp_path / "out", jobs=2, told=lambda item, _: told.append(item.id))
    assert (result.cells, result.failed, result.missing) == (2, (), ())
    assert sorted(told) == sorted(item.id for item in with_needs(cells))


def test_records_that_came_without_weights_go_on(tmp_path: Path) -> None:
    """What was passed on without its models is not done again, and what is new beside it gets them trained."""
    first = tmp_path / "first"
    cells = tiny_cells(tmp_path, methods=("none", "head_mask"))
    run_cells(cells[:1], first)
    weights = list(first.rglob("weights.safetensors"))
    assert len(weights) == 2  # the original, and the model retrained without 3
    for path in weights:
        path.unlink()
    assert not run_cells(cells[:1], first).missing
    assert not list(first.rglob("weights.safetensors"))
    run_cells(cells[:2], first)
    assert sorted(first.rglob("weights.safetensors")) == sorted(weights)
    run_cells(cells[:2], tmp_path / "second")
    rows, same = (told_apart(tidy_rows(cells[:2], out)) for out in (first, tmp_path / "second"))
    assert rows == same


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, out = tiny_cells(tmp_path), tmp_path / "out"
    calls = 0

    def fail(*_: Any, **__: Any) -> nn.Module:
        nonlocal calls
        calls += 1
        raise ArithmeticError("no such number\nsecond line")

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ssd", replace(METHODS["ssd"], run=fail))
        result = run_cells(cells, out)
        assert len(result.failed) == calls == 2
        run_cells(cells, out)
        assert calls == 2, "a failed cell was done again unasked"
        run_cells(cells, out, retry_failed=True)
        assert calls == 4
    rows = tidy_rows(cells, out)
    assert [row["status"] for row in rows] == ["done", "done", "failed"] * 2
    assert rows[2]["error"] == "ArithmeticError: no such number"
    record = read(folder_of(cells[2], out))
    assert record is not None
    assert record["item"]["attempts"] == 2
    assert "in fail" in record["item"]["error"]["traceback"]

    assert run_cells(cells, out, retry_failed=True).failed == ()
    assert [row["status"] for row in tidy_rows(cells, out)] == ["done"] * 6


def test_what_needs_something_that_failed_fails_too(tmp_path: Path) -> None:
    cells = tiny_cells(tmp_path, methods=("none",))
    (tmp_path / "net.py").write_text("def net(num_classes, channels): raise RuntimeError('no network')")
    rows = (run_cells(cells, tmp_path / "out"), tidy_rows(cells, tmp_path / "out"))[1]
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert rows[0]["error"] == f"NeedError: needs {cells[0].original.id}, which failed"


def test_a_cell_says_what_was_asked_and_what_it_cost(tmp_path: Path) -> None:
    cell = replace(tiny_cells(tmp_path, methods=("ssd",))[0], count_flops=True)
    run_cells([cell], tmp_path / "out")
    record = read(folder_of(cell, tmp_path / "out"))
    assert record is not None
    assert str(tmp_path) not in str(record["item"]["asked"]).replace(cell.original.model, "")
    assert record["item"]["asked"]["forget"] == ["3"]
    cost = record["bench"]["cost"]
    assert cost["flops"] > 0
    assert cost["samples_retain"] > 0
    assert cost["samples_forget"] > 0
    assert cost["samples_synthetic"] == 0
    assert record["bench"]["sizes"] == {"retain": 180, "forget": 20, "test": 100, "classes": 10}
    assert set(record["bench"]["probes"]) == {"before", "after", "retrained"}


def test_what_was_done_with_other_values_of_a_preset_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    none, ssd = (replace(cell, reference=False) for cell in tiny_cells(tmp_path, methods=("none", "ssd"))[:2])
    tuning = Tuning(original=ssd.original, forget=("3",), method="ssd", preset="default", trials=2, retain_per_class=20)
    first = replace(ssd, keep=True)
    cells = [none, ssd, replace(ssd, tuning=tuning), first, replace(none, forget=("5",), after=first)]
    items = with_needs(cells)
    run_cells(cells, out)
    assert not stale_items(items, out)

    def attempts() -> list[int]:
        return [attempts_of(read(folder_of(item, out))) for item in items]

    assert attempts() == [1] * len(items)
    monkeypatch.setitem(PRESETS, "ssd", {"default": lambda: SsdConfig(selection=7.0)})
    fresh = [not isinstance(item, Original) and item != none for item in items]  # stale, or made of what is
    assert stale_items(items, out) == {item.id for item, stale in zip(items, fresh, strict=True) if stale}

    run_cells([first], out)  # and then killed: what was made of it is still to be done again
    assert items[-1].id in stale_items([item for item in items if item.id not in (ssd.id, tuning.id)], out)
    run_cells(cells, out)
    assert attempts() == [1 + stale for stale in fresh]
    assert not stale_items(items, out)
    record = read(folder_of(ssd, out))
    assert record is not None
    assert record["config"]["selection"] == 7.0
    monkeypatch.setattr(stale_module, "METHODS", {"ssd": replace(METHODS["ssd"], space={"selection": (5.0,)})})
    assert stale_items(items, out) == {tuning.id, cells[2].id}  # the search, and what took what it found


def test_streams_are_shuffled_and_every_run_starts_at_their_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []

    def run(model: nn.Module, split: Any, *_: Any, **__: Any) -> nn.Module:
        parts = (split.retain, split.forget)
        assert all(isinstance(part, StreamedImages) for part in parts)
        seen.append([[label for _, label in part] for part in parts])
        for part in parts:
            part.set_epoch(7)
        return copy.deepcopy(model)

    cell = replace(tiny_cells(tmp_path, methods=("ssd",))[1], reference=False, count_flops=True)
    original = replace(cell.original, options=DataOptions(spec="digits", memory=1024))
    cells = [replace(cell, original=original, method=method) for method in ("ssd", "scrub")]
    for method in ("ssd", "scrub"):
        monkeypatch.setitem(METHODS, method, replace(METHODS[method], run=run))
    assert run_cells(cells, tmp_path / "out").failed == ()
    assert len(seen) == 4
    assert seen == [seen[0]] * 4
    for labels in seen[0]:
        assert labels != sorted(labels)


def test_a_training_that_diverged_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Path] = []

    def diverge(_options: Any, _model: str, path: Path, **_: Any) -> None:
        trained.append(path)
        path.with_name(path.name + ".resume").touch()
        raise DivergedError("the loss became nan")

    monkeypatch.setattr(lab_module, "train_command", diverge)
    with pytest.raises(DivergedError):
        Lab(tmp_path / "out").do(tiny_cells(tmp_path)[0].original)
    assert len(trained) == 1


@pytest.mark.slow
def test_jobs_of_a_cluster(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    cells, out = tiny_cells(tmp_path, methods=("none",)), tmp_path / "out"
    for job in submit_cells(cells, out, jobs=2, cluster="local", parameters={"timeout_min": 5}):
        assert job.result().failed == ()
    assert [row["status"] for row in tidy_rows(cells, out)] == ["done", "done"]


@pytest.mark.parametrize("taken", [True, False])
def test_who_lost_the_lease_meanwhile_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    original, out = tiny_cells(tmp_path)[0].original, tmp_path / "out"
    lock, folder = out / "locks" / f"{original.id}.lock", folder_of(original, out)

    def slow(*_: Any) -> Done:
        held = lock.read_text(encoding="utf-8")
        lock.unlink()
        if taken:
            lock.write_text(held.replace(token, "0" * 32), encoding="utf-8")
        return Done({}, {folder / WEIGHTS: bytes_writer(b"")})

    with _leased(original, out, {}) as lease:
        assert lease is not None
        token = str(lease.token)
        monkeypatch.setattr(Lab, "do", slow)
        _do(original, Work([original], out, {}), Lab(out), lease)
        assert lease.compromise is None  # its heartbeat did not see it yet
    assert not folder.exists()


def test_files_are_there_before_the_record_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, out = tiny_cells(tmp_path)[0].original, tmp_path / "out"
    folder, replaced = folder_of(original, out), list[str]()
    rename = Path.replace

    def noted(self: Path, target: Path) -> Path:
        replaced.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Lab, "do", lambda *_: Done({}, {folder / WEIGHTS: bytes_writer(b"weights")}))
    monkeypatch.setattr(Path, "replace", noted)
    _work_here(Work([original], out, {}), None)
    assert replaced == [WEIGHTS, "record.json"]
    assert (folder / WEIGHTS).read_bytes() == b"weights"


@pytest.mark.parametrize("living", [True, False])
def test_a_lease_of_another_machine_is_taken_over_once_it_gives_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, living: bool
) -> None:
    original, out = tiny_cells(tmp_path)[0].original, tmp_path / "out"
    lock = out / "locks" / f"{original.id}.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(
        f"filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken={'0' * 32}\nduration=0.4\n", encoding="utf-8"
    )
    monkeypatch.setattr(runner_module, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(runner_module, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(Lab, "do", lambda *_: Done({}))
    began = time.monotonic()

    def alive() -> bool:
        if living:
            os.utime(lock)
        return time.monotonic() - began < (1.5 if living else 30)

    _work_here(Work([original], out, {}), None, alive)
    took = time.monotonic() - began
    assert (read(folder_of(original, out)) is None) == lock.exists() == living
    assert 0.4 < took < 30


def test_a_lease_is_dropped_when_it_is_released(tmp_path: Path) -> None:
    original, leases = tiny_cells(tmp_path)[0].original, dict[str, SoftFileLease]()
    for _ in range(2):
        with _leased(original, tmp_path, leases) as lease:
            assert lease is leases[original.id]
            other = dict[str, SoftFileLease]()
            with _leased(original, tmp_path, other) as second:
                assert second is None
            assert list(other) == [original.id]
        assert not leases
    with _leased(original, tmp_path, other) as lease:  # who was refused before gets it now
        assert lease is not None


def test_workers_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(runner_module, "pick_device", lambda _: torch.device("cuda"))
    assert [_share_device(None, number, 3) for number in range(3)] == [2, 1, 2]
    assert taken == [0, 1, 0]
    assert _share_device("cuda:1", 0, 3) == 3
    monkeypatch.setattr(runner_module, "pick_device", lambda _: torch.device("cpu"))
    assert _share_device(None, 0, 3) == 3
    assert len(taken) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cores_are_those_that_may_be_used() -> None:
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(own)})
        assert _cores() == 1
    finally:
        os.sched_setaffinity(0, own)


def test_a_lease_outlives_a_slow_step() -> None:
    assert LEASE_SECONDS >= 30  # a step that holds the interpreter's lock for a third of it is not taken for dead

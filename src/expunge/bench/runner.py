"""Do each item once, whoever asks: processes and machines that share the folder, killed and started again as they like.

An item is done when its folder has a `record.json`, which is written whole or not at all. Who works on it holds a
lease, a lock file that is refreshed as long as the process lives; a dead owner's lease is taken over, on the same
machine at once, on another after `LEASE_SECONDS`. A process that was stopped for longer than that, and lost its lease
meanwhile, throws away what it made.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import SoftFileLease, Timeout

from expunge.bench.cells import Cell, Item, folder_of, with_needs
from expunge.bench.lab import Done, Lab
from expunge.bench.records import attempts_of, finite, read, status_of
from expunge.bench.stale import stale_items
from expunge.config import as_json
from expunge.errors import first_line
from expunge.files import json_writer, write_atomically
from expunge.memory import SHARERS
from expunge.workspace import pick_device

LEASE_SECONDS = 60.0  # without a sign of life from another machine until its work is taken over
PAUSE_SECONDS = 0.5  # between looks at the folder, while others work on all that is left
WATCH_SECONDS = 2.0  # between looks of a process that only tells what its workers finish

Told = Callable[[Item, Mapping[str, Any]], None]
"""Called with each item and its record when it is first seen to be done or failed."""


@dataclass(frozen=True)
class Result:
    """What is in the folder after a run."""

    cells: int
    failed: tuple[str, ...]  # ids of cells
    missing: tuple[str, ...]  # ids of cells that nobody finished: a worker died


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    device: str | None = None,
    told: Told | None = None,
) -> Result:
    """Run cells, and before them what they need, in `jobs` processes; return when all are done or failed.

    What was done with other settings than its preset has now, and all that needs it, is done again: see stale.py.

    Args:
        retry_failed: do again what has failed, once.
    """
    items = with_needs(cells)
    work = Work(items, out, _to_do_again(items, out, retry_failed), device)
    if jobs == 1:
        _work_here(work, told)
    else:
        _work_in_processes(work, jobs, told)
    statuses = {cell.id: status_of(folder_of(cell, out)) for cell in cells}
    return Result(
        len(cells),
        tuple(name for name, status in statuses.items() if status == "failed"),
        tuple(name for name, status in statuses.items() if status is None),
    )


@dataclass
class Work:
    """What one process has in hand."""

    items: Sequence[Item]
    out: Path
    again: Mapping[str, int]  # items to do again, failed or stale, and how often each had been tried
    device: str | None = None
    _settled: dict[str, str] = field(default_factory=dict)  # id: done or failed

    def settled(self, item: Item) -> str | None:
        """Return whether an item is done, or has failed and is not to be done again; None while it is open."""
        if item.id not in self._settled:
            record = read(folder_of(item, self.out))
            if record is not None and attempts_of(record) > self.again.get(item.id, 0):
                self._settled[item.id] = record["item"]["status"]
        return self._settled.get(item.id)


def _to_do_again(items: Sequence[Item], out: Path, retry_failed: bool) -> dict[str, int]:
    """Return how often each item was tried that is there and is to be done again."""
    stale = stale_items(items, out)
    records = {item.id: read(folder_of(item, out)) for item in items}
    failed = {key for key, record in records.items() if record and record["item"]["status"] == "failed"}
    return {key: attempts_of(records[key]) for key in stale | (failed if retry_failed else set())}


def _work_here(work: Work, told: Told | None, alive: Callable[[], bool] = lambda: True) -> None:
    """Do what is open and nobody else does, until nothing is open."""
    lab = Lab(work.out, work.device)
    leases: dict[str, SoftFileLease] = {}
    told_of: set[str] = set()
    while open_items := [item for item in work.items if work.settled(item) is None]:
        _tell(work, told, told_of)
        did_one = False
        for item in open_items:
            if not alive():
                return
            if any(work.settled(need) is None for need in item.needs) or work.settled(item) is not None:
                continue
            with _leased(item, work.out, leases) as lease:
                if lease is not None and work.settled(item) is None:
                    _do(item, work, lab, lease)
                    did_one = True
            _tell(work, told, told_of)
        if not did_one:
            time.sleep(PAUSE_SECONDS)
    _tell(work, told, told_of)


def _tell(work: Work, told: Told | None, told_of: set[str]) -> None:
    for item in work.items:
        if told is not None and item.id not in told_of and work.settled(item) is not None:
            told_of.add(item.id)
            record = read(folder_of(item, work.out))
            if record is not None:
                told(item, record)


def _do(item: Item, work: Work, lab: Lab, lease: SoftFileLease) -> None:
    """Do one item and write what came of it, its record last: that says that the rest is there. Or the error."""
    folder = folder_of(item, work.out)
    _clear_temporaries(folder)
    started, worked = time.perf_counter(), time.process_time()
    done = Done({})
    error: dict[str, Any] | None = None
    failed = [need.id for need in item.needs if work.settled(need) == "failed"]
    try:
        if failed:
            raise NeedError(f"needs {failed[0]}, which failed")
        done = lab.do(item)
    except Exception as caught:  # noqa: BLE001 (the rest goes on, and the record tells)
        error = {"type": type(caught).__name__, "message": first_line(caught), "traceback": traceback.format_exc()}
    about = {
        "id": item.id,
        "kind": type(item).__name__.lower(),
        "status": "failed" if error else "done",
        "error": error,
        "attempts": attempts_of(read(folder)) + 1,
        "made_of": {need.id: attempts_of(read(folder_of(need, work.out))) for need in item.needs},
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - worked,
        "asked": _asked(item),
    }
    if _lost(lease):  # stopped for too long: somebody else does it now, and this result is not wanted
        return
    write_atomically({**done.files, folder / "record.json": json_writer(finite(done.content) | {"item": about})})


def _lost(lease: SoftFileLease) -> bool:
    """Return whether a lease is another's by now; its heartbeat may be late to tell, the lock file is not."""
    if lease.compromise is not None or lease.token is None:
        return True
    try:
        return lease.token not in Path(lease.lock_file).read_text(encoding="utf-8")
    except FileNotFoundError:
        return True


class NeedError(RuntimeError):
    """What an item needs has failed."""


@contextmanager
def _leased(item: Item, out: Path, leases: dict[str, SoftFileLease]) -> Iterator[SoftFileLease | None]:
    """Hold the lease of an item, or give None where somebody else does.

    Args:
        leases: of this process by item, kept from one try to the next: each knows since when another's was unchanged.
    """
    path = out / "locks" / f"{item.id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = leases.setdefault(item.id, SoftFileLease(path, lease_duration=LEASE_SECONDS))
    try:
        lease.acquire(blocking=False)
    except Timeout:
        yield None
        return
    try:
        yield lease
    finally:
        lease.release()
        del leases[item.id]


def leased(out: Path) -> set[str]:
    """Return the ids of the items that somebody works on, here or on another machine.

    A lease left behind by a killed process counts until its last sign of life is older than two that should have come.
    """
    found = set()
    for path in (out / "locks").glob("*.lock"):
        with suppress(FileNotFoundError):  # released meanwhile
            if time.time() - path.stat().st_mtime < LEASE_SECONDS * 2 / 3:
                found.add(path.stem)
    return found


def _clear_temporaries(folder: Path) -> None:
    """Remove what a killed process left half written: only who holds the lease writes here."""
    for path in folder.glob(".*"):
        path.unlink(missing_ok=True)


def _asked(item: Item) -> dict[str, Any]:
    """Return an item as JSON, without where things lie on this machine."""
    asked: dict[str, Any] = json.loads(json.dumps(as_json(item), default=lambda path: Path(path).name))
    asked.pop("tuning", None)
    if isinstance(item, Cell):
        asked |= {"after": item.after and item.after.id, "judged": item.judged and item.judged.id}
    original = asked.get("original", asked)
    original["options"].pop("spec")
    return asked


# Several processes


def _work_in_processes(work: Work, jobs: int, told: Told | None) -> None:
    """Start workers on the same items, and tell what they finish."""
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    workers = [
        context.Process(target=_worker, args=(work, number, jobs), name=f"expunge-bench-{number}")
        for number in range(jobs)
    ]
    told_of: set[str] = set()
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):
            _tell(work, told, told_of)
            time.sleep(WATCH_SECONDS)
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.join()
    _tell(work, told, told_of)


def _worker(work: Work, number: int, jobs: int) -> None:
    """Work, with a share of the machine, until nothing is left or the process that started this one is gone."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // jobs))
    os.environ[SHARERS] = str(_share_device(work.device, number, jobs))
    parent = multiprocessing.parent_process()
    _work_here(work, None, alive=lambda: parent is None or parent.is_alive())


def _cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_device(device: str | None, number: int, jobs: int) -> int:
    """Return how many workers share this one's device; where there are GPUs and none was named, take one in turn."""
    if device is not None or pick_device(None) != torch.device("cuda"):  # without a number: the current one
        return jobs
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(number % gpus)
    return len(range(number % gpus, jobs, gpus))


# A cluster


def submit_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int,
    cluster: str = "slurm",
    parameters: Mapping[str, Any],
    retry_failed: bool = False,
    device: str | None = None,
) -> list[Any]:
    """Submit `jobs` jobs that each run the same cells on the shared folder; return them, as submitit does.

    Args:
        cluster: of submitit: slurm, or local to try it on one machine.
        parameters: of submitit's `update_parameters`: timeout_min, slurm_partition, gpus_per_node...

    Raises:
        ImportError: submitit is not installed.
    """
    import submitit

    executor = submitit.AutoExecutor(folder=out / "jobs" / "%j", cluster=cluster)
    executor.update_parameters(name="expunge-bench", **parameters)
    with executor.batch():
        return [executor.submit(run_cells, cells, out, retry_failed=retry_failed, device=device) for _ in range(jobs)]

"""What a run of a method costs: seconds, steps, samples of each kind, FLOPs as torch counts them, peak memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from expunge.evaluation import optimizer_steps
from expunge.journal import Journal
from expunge.schema import Phase
from expunge.training import device_of


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations of everything that runs inside, forward and backward, by torch's own formulas.

    The sum is that of `torch.utils.flop_counter.FlopCounterMode`, whose formulas these are (a test compares the two).
    That class also follows which module it is in, by hooks that forbid `torch.autograd.grad`: methods that take
    gradients of images, or of single samples, cannot run in it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass(frozen=True)
class Cost:
    """The cost of one run of a method; judging it is no part of that."""

    seconds: float  # wall clock
    cpu_seconds: float  # of all threads: what a busy machine does not change
    steps: int  # optimizer steps
    samples_retain: int  # retained samples that went through training, repeats counted
    samples_forget: int  # samples of the classes to forget, likewise
    samples_synthetic: int  # noise, impressions and generated images, likewise
    flops: int | None  # floating-point operations (a multiply-add is two); None: not counted
    peak_memory_bytes: int | None  # above what was held before; None: this system does not tell
    memory_of: str | None  # "device" (allocated on the GPU) or "process" (resident)


def measured(
    run: Callable[[Journal], nn.Module], model: nn.Module, forget: Sequence[int], *, count_flops: bool
) -> tuple[nn.Module, Journal, Cost]:
    """Run a method, and measure.

    Counting makes small networks twice as slow, so FLOPs are counted in a second run, whose result must be the same.

    Args:
        run: the method, given a journal; it must give the same model each time.
        model: the one it starts from: tells the device.
        forget: labels of the classes to forget.

    Raises:
        RuntimeError: the second run gave another model than the first.
    """
    journal, memory = Journal(), _PeakMemory(device_of(model))
    memory.start()
    started, worked = time.perf_counter(), time.process_time()
    result = run(journal)
    if device_of(model).type == "cuda":
        torch.cuda.synchronize(device_of(model))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    peak = memory.stop()
    flops: int | None = None
    if count_flops:
        with FlopCount() as counter:
            again = run(Journal())
        flops = counter.total
        _check_same(result, again)
    retain, forgotten, synthetic = samples_of(journal.phases, forget)
    cost = Cost(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        steps=optimizer_steps(journal.phases),
        samples_retain=retain,
        samples_forget=forgotten,
        samples_synthetic=synthetic,
        flops=flops,
        peak_memory_bytes=peak,
        memory_of=memory.kind if peak is not None else None,
    )
    return result, journal, cost


def samples_of(phases: Sequence[Phase], forget: Sequence[int]) -> tuple[int, int, int]:
    """Return how many retained, forgotten and synthetic samples the phases of a run went through, repeats counted."""
    labels = [(label, count) for phase in phases for label, count in phase.label_counts.items()]
    forgotten = sum(count for label, count in labels if label in forget)
    real = sum(count for _, count in labels)
    return real - forgotten, forgotten, sum(max(0, p.samples - sum(p.label_counts.values())) for p in phases)


def _check_same(one: nn.Module, other: nn.Module) -> None:
    """Refuse two different results on the CPU, where a method is the same bit for bit."""
    if device_of(one).type != "cpu":
        return
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    if not all(torch.equal(first, second) for first, second in pairs):
        raise RuntimeError("the method gave two different models for one seed: it is not deterministic")


class _PeakMemory:
    """The highest memory between two moments, above what was held at the first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "device" if device.type == "cuda" else "process"
        self._before: int | None = None

    def start(self) -> None:
        if self.kind == "device":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        _give_back()
        self._before = _reset_peak()

    def stop(self) -> int | None:
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.kind == "device" else _resident("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _give_back() -> None:
    """Let the allocator give freed memory back, or what earlier work left behind would hide what this run takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc
        return


def _reset_peak() -> int | None:
    """Set the process's peak of resident memory to what it holds now, and return that in bytes; None if impossible.

    Source: proc_pid_clear_refs(5), value 5.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return int(found.split()[1]) * 1024 if found else None

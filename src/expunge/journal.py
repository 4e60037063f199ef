"""What a run did: phases with their seconds, steps and samples, measured where the work happens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from expunge.schema import CalibrationReport, LearnedImages, Phase, Precision, Signals


@dataclass
class Meter:
    """The running totals of one phase."""

    steps: int = 0
    samples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    note: str = ""  # what does not go as usual; a later one takes its place
    told: str = ""  # signals that were read last, in words
    precision: Precision = "fp32"
    _loss_sum: float = 0.0
    _loss_steps: int = 0
    _correct: int = 0
    _seen: int = 0
    _show: Callable[[Meter], None] | None = None
    _inner: float = 0.0  # seconds of phases within it

    def start_epoch(self) -> None:
        """Forget the running means: what is shown and kept is of the current epoch."""
        self._loss_sum, self._loss_steps, self._correct, self._seen = 0.0, 0, 0, 0

    def step(self, *, loss: float | None = None, samples: int, correct: int | None = None) -> None:
        """Count one optimizer step (or one batch read) over `samples` images."""
        self.steps += 1
        self.samples += samples
        if loss is not None:
            self._loss_sum += loss
            self._loss_steps += 1
        if correct is not None:
            self._correct += correct
            self._seen += samples
        if self._show is not None:
            self._show(self)

    def read(self, labels: Mapping[int, int]) -> None:
        """Count real samples that were read, by label."""
        self.labels.update(labels)

    @property
    def loss(self) -> float | None:
        return self._loss_sum / self._loss_steps if self._loss_steps else None

    def state(self) -> str:
        """Return the running means as a few words."""
        parts = [f"loss {self.loss:.3f}"] if self.loss is not None else []
        if self._seen:
            parts.append(f"accuracy {self._correct / self._seen:.1%}")
        return "  ".join(parts)


@dataclass(frozen=True)
class Part:
    """A phase's place among others."""

    of: str  # what those after each other are together
    number: int  # among all, the first being 1
    total: int


class Display(Protocol):
    """What shows a run while it goes on; see terminal/progress.py."""

    def begin(self, meter: Meter, name: str, steps: int | None, part: Part | None) -> None:
        """Show a phase that begins: its expected length, and what it is a part of, where that is known."""

    def step(self, meter: Meter) -> None:
        """Show what a phase has come to."""

    def end(self, meter: Meter, phase: Phase | None) -> None:
        """Show a phase that ended; None: it raised."""

    def signals(self, words: str) -> None:
        """Show signals that were read, in a phase or after one."""


class Journal:
    """Collects the phases of one run, and shows them where there is a display."""

    def __init__(self, display: Display | None = None) -> None:
        self.phases: list[Phase] = []
        self.signals: list[Signals] = []
        self.calibration: CalibrationReport | None = None
        self.learned: list[LearnedImages] = []
        self._meter: Meter | None = None
        self._display = display

    def signal(self, signals: Signals) -> None:
        """Keep signals that were read, and show them."""
        self.signals.append(signals)
        called = ", ".join(f"{kind} {share:.0%}" for kind, share in signals.impressions_called.items())
        words = f"impressions still called: {called}; accuracy {signals.retain_accuracy:.1%}"
        if self._meter is not None:
            self._meter.told = words
        if self._display is not None:
            self._display.signals(words)

    @property
    def notes(self) -> list[str]:
        """What did not go as usual, by phase, each once."""
        return list(dict.fromkeys(f"{phase.name}: {phase.note}" for phase in self.phases if phase.note))

    @contextmanager
    def phase(self, name: str, *, steps: int | None, part: Part | None = None, shown: bool = True) -> Iterator[Meter]:
        """Measure one phase; a phase that raises is not kept. What is spent in a phase within it is not its own.

        Args:
            steps: its expected length; None: not known.
            part: what it is a part of; only shown.
            shown: False for what is too short to be looked at.
        """
        meter = Meter()
        display = self._display if shown else None
        if display is not None:
            meter._show = display.step
            display.begin(meter, name, steps, part)
        start = time.perf_counter()
        outer, self._meter = self._meter, meter
        phase: Phase | None = None
        try:
            yield meter
            phase = _finished(name, time.perf_counter() - start - meter._inner, meter)
            self.phases.append(phase)
        finally:
            self._meter = outer
            if outer is not None:
                outer._inner += time.perf_counter() - start
            if display is not None:
                display.end(meter, phase)


def _finished(name: str, seconds: float, meter: Meter) -> Phase:
    return Phase(
        name=name,
        seconds=seconds,
        steps=meter.steps,
        samples=meter.samples,
        label_counts=dict(sorted(meter.labels.items())),
        final_loss=meter.loss,
        signals=meter.told,
        note=meter.note,
        precision=meter.precision,
    )

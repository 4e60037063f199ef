"""What a run did: phases with their seconds, steps and samples, measured where the work happens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expunge.schema import CalibrationReport, LearnedImages, Phase, Precision, Signals

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@dataclass
class Meter:
    """The running totals of one phase."""

    steps: int = 0
    samples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    note: str = ""  # what does not go as usual; a later one takes its place
    precision: Precision = "fp32"
    _loss_sum: float = 0.0
    _loss_steps: int = 0
    _correct: int = 0
    _seen: int = 0
    _told: str = ""
    _show: tuple[Progress, TaskID] | None = None

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
            progress, task = self._show
            progress.update(task, advance=1, state=self.state())

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
        return "  ".join([*parts, self._told] if self._told else parts)

    def tell(self, words: str) -> None:
        """Show `words` beside the running means from now on."""
        self._told = words


class Journal:
    """Collects the phases of one run; shows them on a rich progress display, or reports each, where asked to."""

    def __init__(self, progress: Progress | None = None, report: Callable[[Phase], None] | None = None) -> None:
        self.phases: list[Phase] = []
        self.signals: list[Signals] = []
        self.calibration: CalibrationReport | None = None
        self.learned: list[LearnedImages] = []
        self._meter: Meter | None = None
        self._progress = progress
        self._report = report

    def signal(self, signals: Signals) -> None:
        """Keep signals that were read, and show them beside the phase that runs."""
        self.signals.append(signals)
        if self._meter is not None:
            called = ", ".join(f"{kind} {share:.0%}" for kind, share in signals.impressions_called.items())
            self._meter.tell(f"still called: {called}; retained {signals.retain_accuracy:.1%}")

    @property
    def notes(self) -> list[str]:
        """What did not go as usual, by phase, each once."""
        return list(dict.fromkeys(f"{phase.name}: {phase.note}" for phase in self.phases if phase.note))

    @contextmanager
    def phase(self, name: str, *, steps: int | None) -> Iterator[Meter]:
        """Measure one phase; `steps` is its expected length. A phase that raises is not kept."""
        meter = Meter()
        if self._progress is not None:
            meter._show = (self._progress, self._progress.add_task(name, total=steps, state=""))
        start = time.perf_counter()
        outer, self._meter = self._meter, meter
        try:
            yield meter
        finally:
            self._meter = outer
        phase = Phase(
            name=name,
            seconds=time.perf_counter() - start,
            steps=meter.steps,
            samples=meter.samples,
            label_counts=dict(sorted(meter.labels.items())),
            final_loss=meter.loss,
            signals=meter._told,
            note=meter.note,
            precision=meter.precision,
        )
        self.phases.append(phase)
        if meter._show is not None:
            progress, task = meter._show
            progress.update(task, total=meter.steps or 1, completed=meter.steps or 1)
        if self._report is not None:
            self._report(phase)

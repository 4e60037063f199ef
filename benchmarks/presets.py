"""Every preset on one trained model, over several seeds: the tables of docs/results.md.

    python benchmarks/presets.py --weights W --retrained R --data SRC --classes airplane,bird --out DIR

Runs `expunge forget` once a preset and seed (a cell that is done is not redone) and prints a Markdown table: mean and
sample standard deviation over the seeds, seconds of each phase as their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "retrained", "data", "classes", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--model", help="where the weights do not name it, or name a file")
    parser.add_argument("--presets", default="notebook,paper,default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--retain-per-class", type=int, default=1000)
    options = parser.parse_args()
    rows = []
    for preset in options.presets.split(","):
        cells = [run_cell(options, preset, seed) for seed in range(options.seeds)]
        rows.append(row(preset, cells))
        reference = cells[0]
    print("| model | A_f % | A_r % | noise s | impair s | repair s | all s | steps |")
    print("|---|---|---|---|---|---|---|---|")
    for role, title in (("before", "original"), ("retrained", "retrained")):
        figures = reference["metrics"][role]
        print(f"| {title} | {percent(figures, 'forget_accuracy')} | {percent(figures, 'retain_accuracy')} | | | | | |")
    print("\n".join(rows))
    environment = reference["environment"]
    print(f"\n{environment['platform']}, {environment['device']}, {environment['threads']} threads", end=", ")
    print(f"torch {environment['torch']}, seeds 0 to {options.seeds - 1}")


def run_cell(options: argparse.Namespace, preset: str, seed: int) -> dict[str, Any]:
    """Return the record of one preset and seed, running it where it is not there yet."""
    folder = Path(options.out) / f"{preset}-{seed}"
    if not (folder / "record.json").exists():
        command = [sys.executable, "-m", "expunge", "forget", "--weights", options.weights]
        command += ["--retrained", options.retrained, "--data", options.data, "--classes", options.classes]
        command += ["--model", options.model] if options.model else []
        command += ["--retain-per-class", str(options.retain_per_class), "--preset", preset]
        command += ["--seed", str(seed), "--out", str(folder), "--quiet"]
        code = subprocess.run(command, check=False).returncode
        if code == 2:
            sys.exit(f"failed: {' '.join(command)}")
    record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return record


def row(preset: str, cells: list[dict[str, Any]]) -> str:
    accuracies = [spread([cell["metrics"]["after"][key] for cell in cells]) for key in FIGURES]
    phases = [
        f"{statistics.median(cell['cost']['phases'][phase]['seconds'] for cell in cells):.1f}"
        for phase in ("noise", "impair", "repair")
    ]
    total = f"{statistics.median(cell['cost']['seconds'] for cell in cells):.1f}"
    return "| " + " | ".join([preset, *accuracies, *phases, total, str(cells[0]["cost"]["steps"])]) + " |"


FIGURES = ("forget_accuracy", "retain_accuracy")


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f}"


def percent(figures: dict[str, Any], key: str) -> str:
    return f"{100 * figures[key]:.2f}"


if __name__ == "__main__":
    main()

"""How well each signal tracks the true forget accuracy: the table and the picture of docs/research/calibration.md.

    python benchmarks/signals.py --weights W --data SRC --classes 3 [--model SPEC] --out points.json
    python benchmarks/signals.py --plot signals.svg points.json ...

Impairs and repairs at several rates, mild ones among them, and reads signals and the truth of the same model side by
side: during impair every few steps, and after repairs of several lengths. Prints Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from expunge.data import draw, hold_out, stage, without
from expunge.files import json_writer, write_atomically
from expunge.methods.unsir import UnsirConfig, impair, learn_noise, repair
from expunge.schema import Split
from expunge.signals import Evidence, gather_evidence, learn_impressions, read_signals, refreshed
from expunge.training import predict
from expunge.workspace import DataOptions, open_workspace

IMPAIR_RATES = (0.0003, 0.001, 0.003, 0.006)
REPAIRS = ((10, 0.0003), (40, 0.0005), (80, 0.0015))  # steps, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "data", "model", "name"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--classes", help="each is forgotten alone")
    parser.add_argument("--retain-per-class", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("points", nargs="*", type=Path)
    options = parser.parse_args()
    if options.plot is None:
        points = [point for label in options.classes.split(",") for point in collect(options, label)]
        write_atomically({options.out: json_writer(points)})
    else:
        points = [point for path in options.points for point in json.loads(path.read_text(encoding="utf-8"))]
        plot(points, options.plot)
    print("| model | read | points | retained | blend | noise | class probability |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(point["name"] for point in points):
        for phase in ("impair", "repair"):
            print(correlations(name, phase, [p for p in points if (p["name"], p["phase"]) == (name, phase)]))


def collect(options: argparse.Namespace, label: str) -> list[dict[str, Any]]:
    """Return one point a reading: the signals, and the truth on held-out images of the class."""
    workspace = open_workspace(
        DataOptions(spec=options.data), options.model, Path(options.weights), leave_out=[label], seed=0
    )
    (forget,) = workspace.left_out
    preprocessing = workspace.preprocessing
    table = draw(without(workspace.source.train, [forget]), per_class=options.retain_per_class, seed=0)
    training, held = hold_out(stage(table, preprocessing).dataset, share=0.1, most=512, seed=0)
    split = Split(forget_classes=(forget,), retain=training, preprocessing=preprocessing)
    others = set(range(len(workspace.class_names))) - {forget}
    truth = stage(without(workspace.test, others), preprocessing, shuffle=False).dataset
    model = workspace.model
    evidence = gather_evidence(model, split, held, per_class=48, seed=1)
    default = UnsirConfig()
    config = replace(
        default,
        calibration=None,
        impair=replace(default.impair, steps=24, batch_size=options.batch_size),
        repair=replace(default.repair, batch_size=options.batch_size),
    )
    noise = learn_noise(model, split, config, seed=0)
    impressions = learn_impressions(model, split, config.impressions, seed=0)
    points: list[dict[str, Any]] = []

    def read(changed: nn.Module, phase: str, rate: float, step: int) -> None:
        seen = refreshed(changed, evidence.refresh.images) if phase == "impair" else changed
        points.append({"name": options.name, "label": label, "phase": phase, "rate": rate, "step": step})
        points[-1] |= figures(seen, evidence, lambda: predict(seen, truth, preprocessing=preprocessing).logits, forget)

    for rate in IMPAIR_RATES:

        def watch(changed: nn.Module, step: int, rate: float = rate) -> bool:
            if step % 6 == 0:
                read(changed, "impair", rate, step)
            return False

        harder = replace(config, impair=replace(config.impair, lr=rate))
        impaired = impair(model, split, noise, harder, impressions=impressions, seed=0, until=watch)
        for steps, repair_rate in REPAIRS:
            shorter = replace(config, repair=replace(config.repair, steps=steps, lr=repair_rate))
            repaired = repair(impaired, split, shorter, original=model, impressions=impressions, seed=0)
            read(repaired, "repair", rate, steps)
    return points


def figures(model: nn.Module, evidence: Evidence, answer: Callable[[], torch.Tensor], forget: int) -> dict[str, Any]:
    signals = read_signals(model, evidence)
    logits = answer()
    return {
        **signals.impressions_called,
        "probability": signals.class_probability,
        "true_accuracy": (logits.argmax(1) == forget).double().mean().item(),
        "true_probability": logits.softmax(1)[:, forget].mean().item(),
    }


SIGNALS = ("retained", "blend", "noise", "probability")


def correlations(name: str, phase: str, points: list[dict[str, Any]]) -> str:
    truth = [point["true_probability"] for point in points]
    ranks = []
    for signal in SIGNALS:
        values = [point[signal] for point in points]
        constant = len(set(values)) < 2 or len(set(truth)) < 2
        ranks.append("constant" if constant else f"{spearmanr(values, truth).statistic:.2f}")
    return f"| {name} | {phase} | {len(points)} | " + " | ".join(ranks) + " |"


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "expunge"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(SIGNALS), figsize=(12, 6), sharey=True, layout="constrained")
    for row, phase in zip(axes, ("impair", "repair"), strict=True):
        for axis, signal in zip(row, SIGNALS, strict=True):
            for name in dict.fromkeys(point["name"] for point in points):
                chosen = [point for point in points if (point["name"], point["phase"]) == (name, phase)]
                axis.scatter(
                    [point[signal] for point in chosen], [point["true_accuracy"] for point in chosen], s=12, label=name,
                    alpha=0.6,
                )  # fmt: skip
            words = "highest mean probability" if signal == "probability" else f"{signal} impressions still called it"
            axis.set(xlabel=words, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        row[0].set_ylabel(f"{phase}: true forget accuracy")
    axes[0, -1].legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

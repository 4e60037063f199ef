"""Audits of models whose truth is known, side by side: the tables of docs/results.md.

    python benchmarks/audits.py --data SRC --weights W --retrained R [--again R2] --classes A,B --out DIR

Makes the unlearned models with `expunge forget` (kept in DIR, not made twice), audits each with `expunge audit` against
the same retrained model, and prints Markdown: the verdict in layers, the figures, and the seconds of each attack. The
second retrained model (--again) is audited as if it were unlearned: what it shows is the noise floor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from expunge.commands import RetainOptions, audit_command, forget_command
from expunge.workspace import DataOptions

MADE = {
    "default": ("unsir", "default"),
    "fast": ("unsir", "fast"),
    "notebook": ("unsir", "notebook"),
    "paper": ("unsir", "paper"),
    "fine-tuned": ("fine_tune", "default"),
    "head masked": ("head_mask", "default"),
}
LAYERS = ("gone_at_the_output", "gone_inside", "resists_relearning", "indistinguishable", "rest_intact")
FIGURES = (
    ("linear_probe", "head input"),
    ("nearest_class_mean", "head input"),
    ("prototype", "forget accuracy"),
    ("head_only", "forget accuracy"),
    ("few_shot", "20"),
    ("relearn", "steps to 95 %"),
    ("relearn", "steps to 80 %"),
    ("population_mia", "forget"),
    ("neighbour_leakage", "told apart"),
    ("inversion", "called by the original"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--retrained", type=Path, required=True)
    parser.add_argument("--again", type=Path, help="a second retrained model, of another seed")
    parser.add_argument("--classes", required=True)
    parser.add_argument("--retain-per-class", type=int)
    parser.add_argument("--only", default=",".join(("original", "retrained", "again", *MADE)))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data, classes = DataOptions(spec=options.data), [options.classes]
    given = {"original": options.weights, "retrained": options.retrained, "again": options.again}
    records: dict[str, dict[str, Any]] = {}
    for name in options.only.split(","):
        weights = given.get(name) if name in given else made(name, data, classes, options)
        if weights is None:
            continue
        folder = options.out / "audits" / name.replace(" ", "-")
        if not (folder / "record.json").exists():
            audit_command(
                data, options.model, options.weights, weights, folder, classes=classes, retrained=[options.retrained]
            )
        records[name] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        print(f"<!-- {name} audited -->", flush=True)
    show(records)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, seed 0")


def made(name: str, data: DataOptions, classes: list[str], options: argparse.Namespace) -> Path:
    """Return the weights of a model that was made to forget, making it where it is not there yet."""
    method, preset = MADE[name]
    folder: Path = options.out / "made" / name.replace(" ", "-")
    if not (folder / "unlearned.safetensors").exists():
        retain = RetainOptions(per_class=options.retain_per_class)
        forget_command(
            data, options.model, options.weights, classes, folder, retain=retain, method=method, preset=preset
        )
    return folder / "unlearned.safetensors"


def show(records: dict[str, dict[str, Any]]) -> None:
    print("\n| model | A_f % | A_r % | " + " | ".join(layer.replace("_", " ") for layer in LAYERS) + " |")
    print("|---" * (3 + len(LAYERS)) + "|")
    for name, record in records.items():
        after = record["metrics"]["after"]
        answers = [record["verdict"][layer]["answer"] for layer in LAYERS]
        print(
            f"| {name} | {100 * after['forget_accuracy']:.2f} | {100 * after['retain_accuracy']:.2f} | "
            + " | ".join(answers)
            + " |"
        )
    print("\n| figure (good: near the retrained model's) | " + " | ".join(records) + " |")
    print("|---" * (1 + len(records)) + "|")
    for audit, figure in FIGURES:
        cells = [cell(record["audits"].get(audit, {}), figure) for record in records.values()]
        print(f"| {audit.replace('_', ' ')}, {figure} | " + " | ".join(cells) + " |")
    print("\n| named as | said of it |\n|---|---|")
    for name, record in records.items():
        print(f"| {name} | {'; '.join(text.split(':')[0] for text in record['verdict']['diagnosis']) or '-'} |")
    first = next(iter(records.values()))
    print("\n| attack | seconds, three models |\n|---|---|")
    for audit, found in first["audits"].items():
        print(f"| {audit.replace('_', ' ')} | {found['seconds']:.1f} |")
    print(f"| all | {sum(found['seconds'] for found in first['audits'].values()):.1f} |")


def cell(found: dict[str, Any], figure: str) -> str:
    """Return a figure with its interval; bold where the gap to the retrained model counts as found."""
    measured = found.get("figures", {}).get(figure)
    if measured is None:
        return "-"
    value = measured["unlearned"]["value"]
    text = f"{value:.1f}" if "steps" in figure else f"{100 * value:.1f}"
    return f"**{text}**" if measured["gap"]["found"] else text


if __name__ == "__main__":
    main()

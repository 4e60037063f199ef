"""The default of UNSIR against true retrains: the tables of docs/results.md.

    python benchmarks/calibrated.py CASE... --out DIR [--presets default,fast] [--seeds 1]

Trains the original of each case and the retrained references it names (resumable, kept in DIR/weights), forgets each
set of classes with nothing set by hand, and measures forget and retain accuracy, linear probe, nearest class mean,
relearn time (where the case asks for it), steps and FLOPs. A cell that is done is not redone. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from expunge.audits import features_of, linear_probe, nearest_class_mean, relearn_steps
from expunge.bench.cost import FlopCount
from expunge.commands import TRAIN_DEFAULT, train_command
from expunge.config import as_json
from expunge.data import ImageTable, draw, stage, without
from expunge.evaluation import evaluate
from expunge.files import json_writer, write_atomically
from expunge.journal import Journal
from expunge.methods import PRESETS
from expunge.methods.unsir import unsir
from expunge.schema import Split
from expunge.training import train
from expunge.workspace import DataOptions, Workspace, open_workspace

SHARED = Path(__file__).parents[2] / "shared" / "data"
VIT = "timm:vit_tiny_patch16_224?img_size=32&patch_size=4&depth=4&embed_dim=64&num_heads=2"
RELEARN_SEEDS = 3  # one alone tells little: retrained models of one recipe took 30, 48 and 80 steps
SMALL_CNN = f"{Path(__file__).parents[1] / 'examples' / 'small_cnn.py'}:small_cnn"


@dataclass(frozen=True)
class Case:
    """One original model, and what it shall forget. Sets are of class indices."""

    data: str
    model: str
    sets: tuple[tuple[int, ...], ...]
    references: tuple[tuple[int, ...], ...] = ()  # what is gone in the end, where a reference is retrained for it
    epochs: int = 12
    batch_size: int = 256
    train_per_class: int | None = None  # images of each class the original and the references are trained on
    retain_per_class: int | None = 1000
    size: tuple[int, int] | None = None  # images are brought to, where not to what the model asks for
    rare: tuple[int, ...] = ()  # retained classes of which one image in fifty is kept
    sequence: bool = False  # forget the sets one after the other, each from the result of the one before
    relearn: bool = False


TEN = tuple((label,) for label in range(10))
HUNDRED = ((0,), tuple(range(20)), tuple(range(40)))
RESNET = Case("cifar10", "torchvision:resnet18", ())
SMALL = replace(RESNET, train_per_class=1000, retain_per_class=200, epochs=20, batch_size=128)
UNSEEN = {  # architectures that nothing was ever set by
    "squeezenet": "torchvision:squeezenet1_1",
    "shufflenet": "torchvision:shufflenet_v2_x0_5",
    "regnet": "timm:regnetx_002",
    "mobilenetv3": "timm:mobilenetv3_small_050",
    "edgenext": "timm:edgenext_xx_small",
    "convnext": "timm:convnext_atto",
    "resnet10t": "timm:resnet10t",
}
CASES = {
    "resnet18-one": replace(RESNET, sets=TEN, references=TEN),
    "resnet18-02": replace(RESNET, sets=((0, 2),), references=((0, 2),), relearn=True),
    "resnet18-many": replace(
        RESNET,
        sets=((1, 2), (3, 4, 5, 6), (3, 4, 5, 6, 7, 8, 9)),
        references=((1, 2), (3, 4, 5, 6), (3, 4, 5, 6, 7, 8, 9)),
    ),
    "resnet18-500": replace(RESNET, sets=((0, 2),), references=((0, 2),), retain_per_class=500),
    "resnet18-100": replace(RESNET, sets=((0, 2),), references=((0, 2),), retain_per_class=100),
    "resnet18-20": replace(RESNET, sets=((0, 2),), references=((0, 2),), retain_per_class=20),
    "resnet18-imbalanced": replace(RESNET, sets=((3,),), references=((3,),), rare=(1, 5, 7, 9)),
    "resnet18-sequence": replace(RESNET, sets=((0,), (2,), (5,), (7,)), references=((0, 2, 5, 7),), sequence=True),
    "vit-small": replace(SMALL, model=VIT, sets=((0,), (0, 2)), references=((0,), (0, 2))),
    "mobilenet-small": replace(SMALL, model="torchvision:mobilenet_v2", sets=((0,), (0, 2)), references=((0,), (0, 2))),
    "allcnn-small": replace(SMALL, model="allcnn", sets=((0,), (0, 2)), references=((0,), (0, 2)), train_per_class=500),
    **{
        f"{name}-unseen": replace(SMALL, model=model, size=(32, 32), sets=((3,), (1, 8)), references=((3,), (1, 8)))
        for name, model in UNSEEN.items()
    },
    "cifar100-small": Case(
        "cifar100", "torchvision:resnet18", HUNDRED, HUNDRED,
        train_per_class=200, retain_per_class=100,
    ),
    "yaleb": Case(
        "yaleb", SMALL_CNN, ((12,), tuple(range(0, 30, 3))), ((12,), tuple(range(0, 30, 3))), 25, 64,
        retain_per_class=40,
    ),
    "lfw": Case(
        "lfw", SMALL_CNN, ((12,), tuple(range(0, 30, 3))), ((12,), tuple(range(0, 30, 3))), 40, 64,
        retain_per_class=8,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the data sets")
    parser.add_argument("--presets", default="default")
    parser.add_argument("--seeds", type=int, default=1, help="unlearning seeds")
    parser.add_argument("--training-seed", type=int, default=0)
    parser.add_argument("--train-only", action="store_true", help="make the originals and references, forget nothing")
    options = parser.parse_args()
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        sys.exit(f"unknown case {unknown[0]!r}: expected some of {', '.join(CASES)}")
    if options.train_only:
        for name in options.cases:
            for left_out in ((), *CASES[name].references):
                trained(CASES[name], data_of(CASES[name], options), left_out, options)
        return
    print(
        "| case | forget | preset | A_f % | A_r % | retrained A_r % | probe | NCM | relearn 95 / 80 | steps | cost % |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.cases:
        for preset in options.presets.split(","):
            for cells in zip(
                *(run(name, CASES[name], preset, seed, options) for seed in range(options.seeds)), strict=True
            ):
                print(row(name, preset, cells), flush=True)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, seeds 0 to {options.seeds - 1}")


def run(name: str, case: Case, preset: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one cell a set of classes, running those that are not there yet."""
    data = data_of(case, options)
    original = trained(case, data, (), options)
    cells: list[dict[str, Any]] = []
    model, before = original.model, tuple[int, ...]()
    for forget in case.sets:
        label = "-".join(map(str, forget)) if len(forget) <= 7 else f"{len(forget)}classes"
        path = options.out / f"{name}-{label}-{preset}-{options.training_seed}-{seed}.json"
        if path.exists() and not case.sequence:
            cells.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        gone = (*before, *forget)
        reference = trained(case, data, gone, options) if gone in case.references else None
        cell, unlearned = erase(case, original, model, reference, forget, before, preset, seed)
        write_atomically({path: json_writer(cell | {"label": label, "training_seed": options.training_seed})})
        cells.append(cell | {"label": label})
        if case.sequence:
            model, before = unlearned, (*before, *forget)
    return cells


def data_of(case: Case, options: argparse.Namespace) -> DataOptions:
    return DataOptions(
        spec=str(options.data / case.data),
        label_column="fine_label" if case.data == "cifar100" else None,
        size=case.size,
    )


def trained(case: Case, data: DataOptions, left_out: Sequence[int], options: argparse.Namespace) -> Workspace:
    """Return the original, or a reference that never saw the classes `left_out`, training it where it is not there."""
    tag = "".join(c if c.isalnum() else "-" for c in f"{case.data} {case.model.rsplit('/', 1)[-1]}")
    without_these = "-".join(map(str, left_out)) or "none"
    path = options.out / "weights" / f"{tag}-without-{without_these}-{options.training_seed}.safetensors"
    names = [str(label) for label in left_out]
    config = replace(TRAIN_DEFAULT, epochs=case.epochs, batch_size=case.batch_size)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train_command(
            data, case.model, path, config=config, leave_out=names, per_class=case.train_per_class,
            seed=options.training_seed,
        )  # fmt: skip
    return open_workspace(data, case.model, path, leave_out=names, seed=0)


def erase(
    case: Case,
    original: Workspace,
    model: torch.nn.Module,
    reference: Workspace | None,
    forget: tuple[int, ...],
    before: tuple[int, ...],
    preset: str,
    seed: int,
) -> tuple[dict[str, Any], torch.nn.Module]:
    """Forget one set of classes and measure."""
    preprocessing = original.preprocessing
    train_set, test = original.source.train, stage(original.test, original.preprocessing, shuffle=False).dataset
    if case.train_per_class is not None:
        train_set = draw(train_set, per_class=case.train_per_class, seed=0)
    sample = draw(without(train_set, {*forget, *before}), per_class=case.retain_per_class, seed=seed)
    if case.rare:
        few = draw(without(sample, set(range(10)) - set(case.rare)), share=0.02, seed=seed)
        sample = joined(sample, without(sample, case.rare), few)
    split = Split(
        forget_classes=forget,
        retain=stage(sample, preprocessing).dataset,
        test=test,
        class_names=original.class_names,
        preprocessing=preprocessing,
        forgotten_before=before,
    )
    journal = Journal()
    with FlopCount() as counter:
        unlearned = unsir(model, split.zero_glance(), PRESETS["unsir"][preset](), seed=seed, journal=journal)
    record = evaluate(
        model,
        unlearned,
        split,
        reference.model if reference else None,
        retrained_preprocessing=reference.preprocessing if reference else None,
        phases=list(journal.phases),
        journal=journal,
    )
    per_class = record.metrics["after"]["per_class_accuracy"]
    cell: dict[str, Any] = {
        "forget": list(forget),
        "metrics": record.metrics,
        "calibration": record.calibration,
        "cost": dict(record.cost),
        "forgotten_before_accuracy": [per_class[original.class_names[label]] for label in before],
        "flops_share": counter.total / training_flops(original, len(train_set)),
        "inside": {},
    }
    probe = stage(draw(train_set, per_class=300, seed=1), preprocessing).dataset
    models = {"before": (original.model, preprocessing), "after": (unlearned, preprocessing)}
    if reference is not None:
        models["retrained"] = (reference.model, reference.preprocessing)
    for role, (network, own) in models.items():
        known, held = (features_of(network, images, preprocessing=own) for images in (probe, test))
        cell["inside"][role] = {
            "linear_probe": linear_probe(known, held, forget),
            "nearest_class_mean": nearest_class_mean(known, held, forget),
        }
        if case.relearn:
            images = Subset(test, torch.isin(held.labels, torch.tensor(forget)).nonzero().flatten().tolist()[:500])
            goal = record.metrics["before"]["forget_accuracy"]
            ordinary = stage(draw(train_set, per_class=2000, seed=1), own).dataset
            goals = (0.95 * goal, 0.8 * goal)
            steps = [
                relearn_steps(network, ordinary, images, goals, cap=100, seed=number, preprocessing=own)
                for number in range(RELEARN_SEEDS)
            ]
            cell["inside"][role]["relearn_steps"] = dict(zip(("0.95", "0.8"), zip(*steps, strict=True), strict=True))
    return json.loads(json.dumps(as_json(cell))), unlearned


def joined(whole: ImageTable, *parts: ImageTable) -> ImageTable:
    """Return the rows of `whole` that are in one of `parts`."""
    rows = {int(row) for part in parts for row in part.rows}
    return whole.select(torch.tensor([row in rows for row in whole.rows.tolist()]).nonzero().flatten().numpy())


def training_flops(workspace: Workspace, images: int) -> float:
    """Return the FLOPs of a 40-epoch training of the original, counted on one step."""
    batch = stage(draw(workspace.source.train, per_class=2, seed=0), workspace.preprocessing).dataset
    model = copy.deepcopy(workspace.model)
    with FlopCount() as counter:
        train(model, batch, replace(TRAIN_DEFAULT, epochs=1, steps=1), seed=0, preprocessing=workspace.preprocessing)
    shown = 2 * len(workspace.class_names)
    return float(counter.total / shown * 40 * images)


def row(name: str, preset: str, cells: Sequence[dict[str, Any]]) -> str:
    first = cells[0]
    retrained = first["metrics"].get("retrained")
    inside = {role: first["inside"].get(role, {}) for role in ("before", "after", "retrained")}

    def three(key: str) -> str:
        values = [inside[role].get(key) for role in ("before", "after", "retrained")]
        return " / ".join("-" if value is None else f"{100 * value:.1f}" for value in values)

    def median(steps: Sequence[int | None]) -> str:
        middle = statistics.median(101 if count is None else count for count in steps)
        return f"{middle:g}" if middle <= 100 else "> 100"

    relearn = " ; ".join(
        f"{median(steps['0.95'])} / {median(steps['0.8'])}"
        for role in ("before", "after", "retrained")
        if (steps := inside[role].get("relearn_steps"))
    )
    return "| " + " | ".join(
        [
            name, first["label"], preset,
            spread([cell["metrics"]["after"]["forget_accuracy"] for cell in cells]),
            spread([cell["metrics"]["after"]["retain_accuracy"] for cell in cells]),
            f"{100 * retrained['retain_accuracy']:.2f}" if retrained else "-",
            three("linear_probe"), three("nearest_class_mean"), relearn or "-",
            str(first["cost"]["steps"]),
            f"{100 * first['flops_share']:.2f}",
        ]
    ) + " |"  # fmt: skip


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()

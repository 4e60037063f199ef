"""How quickly a class comes back when the model is trained on it again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from expunge.audits.core import Audit, AuditData, Context, Found, Subject
from expunge.data import labels_of
from expunge.errors import InputError
from expunge.journal import Journal
from expunge.metrics.uncertainty import of_hits, of_seeds
from expunge.schema import Preprocessing, TrainConfig
from expunge.training import predict, train

BATCH = 128  # half the cost of the 256 that models are trained with: it is steps that are counted
CAP = 30  # steps: a retrained CIFAR-10 ResNet18 comes near 80 % in them; more would take most of three minutes
SEEDS = 3  # of the order of samples: of two, Student's interval is wider than any gap
HELD_OUT = 100  # held-out samples that are asked after each step, for a quarter of what the step costs
LOSSES = {"95 %": 0.05, "80 %": 0.2}  # alpha: goals are (1 - alpha) of the original's accuracy


def relearn_curve(
    model: nn.Module,
    samples: Dataset[Any],
    test: Dataset[Any],
    goal: float,
    *,
    cap: int = 60,
    seed: int,
    preprocessing: Preprocessing | None = None,
    journal: Journal | None = None,
) -> tuple[float, ...]:
    """Return the accuracy on `test` after each step of ordinary training, up to the first at `goal`, or `cap` steps.

    Training is cross-entropy with Adam at 1e-3, batches of 128, no augmentation; all parameters learn, also those that
    were frozen.

    Args:
        model: it is not changed.
        samples: training samples, of the forgotten classes and the retained ones.
        test: held-out samples of the forgotten classes alone.

    Raises:
        InputError: a data set is empty. DivergedError: the loss became NaN.
    """
    student = copy.deepcopy(model).requires_grad_(True)
    curve: list[float] = []

    def there(_: int) -> bool:
        answers = predict(student, test, preprocessing=preprocessing, phase="relearn test")
        curve.append((answers.logits.argmax(1) == answers.labels).double().mean().item())
        return curve[-1] >= goal

    train(
        student,
        samples,
        TrainConfig(steps=cap, lr=0.001, batch_size=BATCH),
        seed=seed,
        preprocessing=preprocessing,
        journal=journal,
        phase="relearn",
        until=there,
    )
    return tuple(curve)


def relearn_steps(
    model: nn.Module,
    samples: Dataset[Any],
    test: Dataset[Any],
    goals: Sequence[float],
    *,
    cap: int = 60,
    seed: int,
    preprocessing: Preprocessing | None = None,
    journal: Journal | None = None,
) -> tuple[int | None, ...]:
    """Return the steps of ordinary training after which accuracy on `test` first reaches each goal; None: not by `cap`.

    Training is that of `relearn_curve`. Read it beside the same figure of a retrained model (their ratio is AIN, ideal
    1); much slower than that is a trace of forgetting too.
    Source: relearn time of arXiv:2111.08947; AIN of arXiv:2201.05629.

    Args:
        model: it is not changed.
        samples: training samples, of the forgotten classes and the retained ones.
        test: held-out samples of the forgotten classes alone.
        goals: accuracies in [0, 1]: (1 - alpha) times the original model's, with alpha .05 and .2.

    Raises:
        InputError: a data set is empty. DivergedError: the loss became NaN.
    """
    curve = relearn_curve(
        model, samples, test, max(goals, default=0.0), cap=cap, seed=seed, preprocessing=preprocessing, journal=journal
    )
    return tuple(first_step(curve, goal) for goal in goals)


def first_step(curve: Sequence[float], goal: float) -> int | None:
    """Return the first step, from 1 on, at which a curve reaches `goal`; None: at none."""
    return next((step for step, accuracy in enumerate(curve, start=1) if accuracy >= goal), None)


def area_under(curve: Sequence[float], goal: float, cap: int) -> float:
    """Return the mean over `cap` steps of the best accuracy so far, as a share of `goal`, in [0, 1]; 1: back at once.

    The best so far cannot fall and does not count beyond the goal. So a training that ended where it reached the goal
    gives the same area as one that went on, and one that never reached it is told from a slower one.

    Args:
        curve: accuracy after each step, of `cap` steps or until it reached the goal.
    """
    best = torch.tensor(curve, dtype=torch.float64).cummax(0).values
    missing = cap - len(best)  # after the goal was reached, where the best stays
    whole = torch.cat([best, best[-1].expand(missing)])
    return float((whole / goal).clamp(max=1).mean())


def _relearn(subject: Subject, data: AuditData, context: Context) -> Found:
    held_out = data.part("test", forget=True, most=HELD_OUT, seed=context.seed)
    before = context.original.answers(held_out)
    known = of_hits(before.logits, before.labels).value
    if known == 0:
        raise InputError("the original gets no held-out sample of the forgotten classes right: nothing can come back")
    goals = {name: (1 - alpha) * known for name, alpha in LOSSES.items()}
    highest = max(goals.values())
    samples = _ordinary_sample(data, CAP * BATCH, seed=context.seed)
    curves = [
        relearn_curve(
            subject.model, samples, held_out, highest, cap=CAP, seed=context.seed + number,
            preprocessing=subject.preprocessing, journal=subject.journal,
        )
        for number in range(SEEDS)
    ]  # fmt: skip
    steps = {name: [first_step(curve, goal) for curve in curves] for name, goal in goals.items()}
    figures = {
        f"steps to {name}": of_seeds(_numbers([CAP if step is None else step for step in found]))
        for name, found in steps.items()
    }
    figures["area"] = of_seeds(_numbers([area_under(curve, highest, CAP) for curve in curves]))
    details = {
        "cap": CAP,
        "goals": goals,
        "curves": [list(curve) for curve in curves],
        "censored": {f"steps to {name}": [step is None for step in found] for name, found in steps.items()},
    }
    return Found(figures, details)


def _ordinary_sample(data: AuditData, count: int, *, seed: int) -> Subset[Any]:
    """Return at most `count` training samples at random, so each class has its share of the training data.

    Raises:
        InputError: there are none of the forgotten classes, or of the retained ones.
    """
    for forget in (True, False):
        data.part("train", forget=forget, most=1)  # says what is missing
    assert data.train is not None  # it has a part
    labels = torch.from_numpy(labels_of(data.train))
    rows = (~torch.isin(labels, torch.tensor(data.forgotten_before))).nonzero().flatten()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = rows[order].sort().values
    shown = int(torch.isin(labels[chosen], torch.tensor(data.forget_classes)).sum())
    if shown * BATCH < len(chosen):
        raise InputError(
            f"expected a training image of a forgotten class in each batch of {BATCH} on average, for them to be "
            f"relearned, got {shown} in {len(chosen):,} images"
        )
    return Subset(data.train, chosen.tolist())


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _anamnesis(found: Mapping[str, Found]) -> dict[str, float | None]:
    """Return AIN, the unlearned model's steps over the retrained one's; None where one of them did not get there."""
    told: dict[str, float | None] = {}
    if not {"unlearned", "retrained"} <= found.keys():
        return told
    for name in LOSSES:
        ours, theirs = (found[role] for role in ("unlearned", "retrained"))
        censored = [one.details["censored"][f"steps to {name}"] for one in (ours, theirs)]
        ratio = ours.figures[f"steps to {name}"].value / theirs.figures[f"steps to {name}"].value
        told[f"AIN to {name}"] = None if any(map(any, censored)) else ratio
    return told


RELEARN = Audit(
    name="relearn",
    says="how many steps of ordinary training, the forgotten classes among the data, bring their accuracy back",
    source="relearn time of arXiv:2111.08947; AIN, the ratio to the retrained model's, of arXiv:2201.05629",
    needs=("forget test", "forget train", "retain train"),
    targets={"steps to *": "retrained", "area": "retrained"},
    run=_relearn,
    compare=_anamnesis,
)

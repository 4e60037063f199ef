"""How quickly a class comes back when the model is trained on it again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from expunge.journal import Journal
from expunge.schema import Preprocessing, TrainConfig
from expunge.training import predict, train


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

    Training is cross-entropy with Adam at 1e-3, batches of 256, no augmentation. Read it beside the same figure of a
    retrained model (their ratio is AIN, ideal 1); much slower than that is a trace of forgetting too.
    Source: relearn time of arXiv:2111.08947; AIN of arXiv:2201.05629.

    Args:
        model: it is not changed.
        samples: training samples, of the forgotten classes and the retained ones.
        test: held-out samples of the forgotten classes alone.
        goals: accuracies in [0, 1]: (1 - alpha) times the original model's, with alpha .05 and .2.

    Raises:
        InputError: a data set is empty. DivergedError: the loss became NaN.
    """
    student = copy.deepcopy(model)
    reached: dict[float, int] = {}

    def there(step: int) -> bool:
        answers = predict(student, test, preprocessing=preprocessing, phase="relearn test")
        found = (answers.logits.argmax(1) == answers.labels).double().mean().item()
        for goal in goals:
            if found >= goal:
                reached.setdefault(goal, step)
        return len(reached) == len(set(goals))

    train(
        student,
        samples,
        TrainConfig(steps=cap, lr=0.001),
        seed=seed,
        preprocessing=preprocessing,
        journal=journal,
        phase="relearn",
        until=there,
    )
    return tuple(reached.get(goal) for goal in goals)

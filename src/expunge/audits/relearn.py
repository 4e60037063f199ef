"""How quickly a class comes back when the model is trained on it again."""

from __future__ import annotations

import copy
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
    goal: float,
    *,
    cap: int = 60,
    seed: int,
    preprocessing: Preprocessing | None = None,
    journal: Journal | None = None,
) -> int | None:
    """Return the steps of ordinary training after which accuracy on `test` first reaches `goal`; None: not by `cap`.

    Training is cross-entropy with Adam at 1e-3, batches of 256, no augmentation. Read it beside the same figure of a
    retrained model (their ratio is AIN, ideal 1); much slower than that is a trace of forgetting too.
    Source: relearn time of arXiv:2111.08947; AIN of arXiv:2201.05629.

    Args:
        model: it is not changed.
        samples: training samples, of the forgotten classes and the retained ones.
        test: held-out samples of the forgotten classes alone.
        goal: accuracy in [0, 1]: (1 - alpha) times the original model's, with alpha .05 or .2.

    Raises:
        InputError: a data set is empty. DivergedError: the loss became NaN.
    """
    student = copy.deepcopy(model)
    reached: list[int] = []

    def there(step: int) -> bool:
        answers = predict(student, test, preprocessing=preprocessing, phase="relearn test")
        if (answers.logits.argmax(1) == answers.labels).double().mean().item() >= goal:
            reached.append(step)
        return bool(reached)

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
    return reached[0] if reached else None

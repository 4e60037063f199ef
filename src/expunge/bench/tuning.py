"""The same search for every method: so many runs, each with other settings out of the method's own published range.

A trial may look at no test sample. All are judged by what is left of the classes and what is kept of the rest, on
samples that the method was not given:

- *kept*, for all: accuracy on a fifth of the retain sample that is held out.
- *left*, for a method that reads forget samples: accuracy on a fifth of the forget samples that is held out.
- *left*, for a zero-glance method: of held-out class impressions (signals.py) the share that is still called a class to
  forget. Its user has nothing else.

Both make one score, (1 - left) (1 - max(0, kept before - kept)): the tug of war of arXiv:2406.01257 with 0 and the
original's accuracy in place of the retrained model's, which nobody who needs unlearning has.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from expunge.bench.streams import own_streams
from expunge.config import override
from expunge.data import hold_out
from expunge.errors import DivergedError
from expunge.methods import Method
from expunge.metrics import accuracy
from expunge.schema import Preprocessing, Split
from expunge.signals import gather_evidence, read_signals
from expunge.training import predict

HELD_OUT = 0.2  # share of each class that selection looks at and that no trial is given
HELD_OUT_MOST = 512  # images, at most


@dataclass(frozen=True)
class Trial:
    """One run of the method."""

    settings: tuple[str, ...]  # changes of the preset, as `--set` takes them
    score: float  # higher is better, in [0, 1]; -1: it diverged
    left: float | None
    kept: float | None


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    settings: tuple[str, ...]  # of the best trial, the first of equals
    score: float
    trials: tuple[Trial, ...]
    budget: int  # trials that were allowed; a smaller range has fewer
    selected_by: str  # what selection looked at
    reads_forget: bool  # whether forget samples were among that


def tune(method: Method, base: Any, model: nn.Module, split: Split, *, trials: int, seed: int) -> Tuned:
    """Run a method up to `trials` times and return the settings that did best; `base` itself is the first trial.

    Args:
        base: configuration that the settings change.
        split: with forget samples where the method reads them; its test set is not looked at.
    """
    retain, retain_held = hold_out(split.retain, share=HELD_OUT, most=HELD_OUT_MOST, seed=seed)
    given = replace(split, retain=retain, test=None)
    forget_held: Dataset[Any] | None = None
    if not method.zero_glance and split.forget is not None:
        forget, forget_held = hold_out(split.forget, share=HELD_OUT, most=HELD_OUT_MOST, seed=seed)
        given = replace(given, forget=forget)
    evidence = gather_evidence(model, given, retain_held, seed=seed) if forget_held is None else None

    def kept_by(changed: nn.Module) -> float:
        return _accuracy(changed, retain_held, split.preprocessing)

    before = kept_by(model)

    def attempt(settings: tuple[str, ...]) -> Trial:
        try:
            changed = method(model, method.view(own_streams(given)), override(base, settings), seed=seed)
        except DivergedError:
            return Trial(settings, -1.0, None, None)
        if evidence is not None:
            left = read_signals(changed, evidence).still_called
        else:
            assert forget_held is not None  # there is one or the other
            left = _accuracy(changed, forget_held, split.preprocessing)
        kept = kept_by(changed)
        return Trial(settings, score(left, kept, before), left, kept)

    done = tuple(attempt(settings) for settings in drawn_settings(method.space, base, trials, seed=seed))
    best = max(done, key=lambda trial: trial.score)
    looked = "class impressions" if evidence is not None else "held-out forget samples"
    return Tuned(
        settings=best.settings,
        score=best.score,
        trials=done,
        budget=trials,
        selected_by=f"held-out retained samples and {looked}",
        reads_forget=evidence is None,
    )


def score(left: float, kept: float, before: float) -> float:
    """Return how well a trial did, in [0, 1]: 1 where nothing of the classes is left and nothing of the rest is lost.

    Args:
        left: share of the classes that is still there.
        kept: accuracy on retained samples, and `before` that of the original.
    """
    return (1 - left) * (1 - max(0.0, before - kept))


def drawn_settings(space: Mapping[str, Sequence[float]], base: Any, trials: int, *, seed: int) -> list[tuple[str, ...]]:
    """Return the settings of up to `trials` trials: none, then combinations of the space's values drawn at random.

    Combinations that are the base itself are left out. With trials enough, all are there.
    """
    combinations = [
        tuple(f"{name}={value}" for name, value in zip(space, values, strict=True))
        for values in itertools.product(*space.values())
    ]
    others = [settings for settings in combinations if settings and override(base, settings) != base]
    order = np.random.default_rng(seed).permutation(len(others))
    return [(), *(others[number] for number in order[: max(0, trials - 1)])]


def _accuracy(model: nn.Module, samples: Dataset[Any], preprocessing: Preprocessing | None) -> float:
    answers = predict(model, samples, preprocessing=preprocessing)
    return accuracy(answers.logits, answers.labels)

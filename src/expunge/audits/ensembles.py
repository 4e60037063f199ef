"""Judge an unlearning method by many models: could anyone tell the unlearned ones from the retrained ones?

One model may look right by luck. With T models unlearned and T retrained, by as many seeds, each sample has T answers
of either kind, and the question becomes whether the two clouds of answers are the same. It costs 3 T trainings, so
`train_ensembles` keeps the answers of each model as soon as it has them, and goes on where it was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from expunge.audits.core import Found, Subject
from expunge.audits.membership import LIMIT, true_positives
from expunge.errors import InputError, first_line
from expunge.files import write_atomically
from expunge.metrics.accuracy import accuracy
from expunge.metrics.uncertainty import Measurement, of_ranks, of_seeds, of_values
from expunge.schema import Predictions

DELTA = 1e-5
LEAST_DEVIATION = 1e-3  # of log odds over models: fewer than a handful may agree by chance
SHUFFLES = 20  # of which model is in which ensemble, to know what chance alone gives

Kind = str
"""`unlearned` or `retrained`."""


@dataclass(frozen=True)
class Ensembles:
    """What each model answers on each data set: by name of the data set, in the order of members."""

    unlearned: tuple[Mapping[str, Predictions], ...]
    retrained: tuple[Mapping[str, Predictions], ...]


# Mathematics


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the label's probability p, (N,) float64; high: the model is sure of the label.

    It is -log(exp(loss) - 1), so it falls with the cross-entropy and depends on nothing else; of near certain answers,
    whose losses all round to 0, it still tells which is surer. Infinite values become +-`LIMIT`.

    Source: phi in Carlini et al., Membership Inference Attacks From First Principles, arXiv:2112.03570.

    Args:
        logits: (N, C). labels: (N,) in [0, C).

    Raises:
        InputError: logits are NaN.
    """
    if bool(logits.isnan().any()):
        raise InputError("the model gives NaN: nothing can be told of its answers")
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels.view(-1, 1), True)
    others = logits.double().masked_fill(own, -torch.inf).logsumexp(1)
    odds = logits.double().gather(1, labels.view(-1, 1)).flatten() - others
    return torch.nan_to_num(odds, nan=0.0, posinf=LIMIT, neginf=-LIMIT)


def u_lira(unlearned_scores: Tensor, retrained_scores: Tensor) -> tuple[Measurement, Measurement]:
    """Return the area under the ROC curve, and the share of true positives at 1 % false ones, of U-LiRA.

    For each sample a Gaussian is fitted to the scores of the unlearned models and one to those of the retrained models,
    of all but one pair; the left-out pair is told apart by the ratio of the two densities, over all samples. The figure
    is the mean over the pairs left out, so its interval is over models. Area: .5 is ideal, in [0, 1]; true positives:
    .01 is ideal. Of few models the deviations are rough, and the attack is weaker than it could be.

    Source: Hayes et al., arXiv:2403.01218; Gaussians and left-out models as in LiRA, arXiv:2112.03570.

    Args:
        unlearned_scores: (T, N) log odds of the label, of T unlearned models on N forgotten training samples.
        retrained_scores: (T, N) of T retrained models.

    Raises:
        InputError: shapes differ, T is less than 3, N is 0, or a score is NaN or infinite.
    """
    unlearned, retrained = _checked(unlearned_scores, retrained_scores)
    areas, caught = [], []
    for out in range(len(unlearned)):
        kept = torch.arange(len(unlearned)) != out
        fits = [_gaussian(scores[kept]) for scores in (unlearned, retrained)]
        members, others = (_log_ratio(scores[out], *fits) for scores in (unlearned, retrained))
        areas.append(of_ranks(members, others).value)
        caught.append(true_positives(members, others))
    return of_seeds(torch.tensor(areas)), of_seeds(torch.tensor(caught))


def epsilons(unlearned_scores: Tensor, retrained_scores: Tensor, *, delta: float = DELTA) -> Tensor:
    """Return for each sample how well the best rule tells unlearned from retrained models by its score, (N,).

    A rule is one threshold or two: scores in an interval are called unlearned and all others retrained, or the other
    way round. epsilon = max(log(1 - delta - FPR) - log FNR, log(1 - delta - FNR) - log FPR) over rules, at least 0;
    infinite where a rule never errs. Rules that err on one side only say nothing with so few models, and are left out,
    as in the challenge. So it is 0 (no rule tells anything), at most log(T - 1), or infinite.

    Source: Triantafillou et al., arXiv:2406.09073, and the NeurIPS 2023 unlearning challenge.

    Args:
        unlearned_scores: (T, N), as for `u_lira`. retrained_scores: (T, N).

    Raises:
        InputError: as for `u_lira`.
    """
    unlearned, retrained = _checked(unlearned_scores, retrained_scores)
    count = len(unlearned)
    values, order = torch.cat([unlearned, retrained]).sort(0)
    start = torch.zeros(1, values.shape[1])
    below = torch.cat([start, (order < count).double().cumsum(0)])  # (2 T + 1, N): unlearned scores below each cut
    below_too = torch.cat([start, (order >= count).double().cumsum(0)])
    between = torch.ones_like(below, dtype=torch.bool)
    between[1:-1] = values[1:] > values[:-1]  # equal scores cannot be cut apart
    best = torch.zeros(values.shape[1], dtype=torch.float64)
    for low in range(2 * count):
        inside = (below[low + 1 :] - below[low]) / count
        inside_too = (below_too[low + 1 :] - below_too[low]) / count
        possible = between[low + 1 :] & between[low]
        for hits, false in ((inside, inside_too), (1 - inside, 1 - inside_too)):
            found = _epsilon(false, 1 - hits, delta).masked_fill(~possible, 0.0)
            best = torch.maximum(best, found.amax(0))
    return best


def forgetting_quality(epsilon: Tensor) -> Tensor:
    """Return H of each sample, 2^-k for epsilon in [k / 2, (k + 1) / 2), (N,) in [0, 1]; 1: not told apart.

    Source: as for `epsilons`.
    """
    return torch.where(epsilon.isfinite(), 2.0 ** -(2 * epsilon).floor(), 0.0)


def quality_by_chance(unlearned_scores: Tensor, retrained_scores: Tensor, *, seed: int) -> float:
    """Return the mean forgetting quality when models are dealt out to the two ensembles at random.

    It is what a perfect method would reach with as many models, and far less than 1, since the best of many rules
    always finds something: of Gaussian scores .24 with 5 models of either kind, .07 with 80.
    """
    both = torch.cat([unlearned_scores, retrained_scores])
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(SHUFFLES):
        dealt = both[torch.randperm(len(both), generator=generator)]
        found.append(forgetting_quality(epsilons(*dealt.chunk(2))).mean())
    return torch.stack(found).mean().item()


def _checked(unlearned: Tensor, retrained: Tensor) -> tuple[Tensor, Tensor]:
    if unlearned.ndim != 2 or unlearned.shape != retrained.shape or unlearned.shape[0] < 3 or unlearned.shape[1] < 1:
        raise InputError(
            "expected scores (T, N) of as many unlearned as retrained models, at least 3, on at least one sample, "
            f"got {tuple(unlearned.shape)} and {tuple(retrained.shape)}"
        )
    if not bool(torch.isfinite(unlearned).all() and torch.isfinite(retrained).all()):
        raise InputError("expected finite scores of all models, got NaN or infinite ones")
    return unlearned.double(), retrained.double()


def _gaussian(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.mean(0), scores.std(0).clamp_min(LEAST_DEVIATION)


def _log_ratio(scores: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Return the log density of scores (N,) under one Gaussian a sample minus that under another."""
    first, second = (-(((scores - mean) / deviation) ** 2) / 2 - deviation.log() for mean, deviation in (one, other))
    return first - second


def _epsilon(false_positives: Tensor, false_negatives: Tensor, delta: float) -> Tensor:
    """Return epsilon of rules by their two errors; 0 where they say nothing."""
    never = (false_positives < 1e-9) & (false_negatives < 1e-9)
    one_sided = (false_positives < 1e-9) ^ (false_negatives < 1e-9)
    # A rule that always errs is another one turned round; 1 - delta - 1 has no logarithm.
    positives = (1 - delta - false_positives).clamp_min(1e-300).log()
    negatives = (1 - delta - false_negatives).clamp_min(1e-300).log()
    found = torch.maximum(positives - false_negatives.log(), negatives - false_positives.log())
    return found.masked_fill(one_sided, 0.0).masked_fill(never, math.inf)


# Judging


def judge_ensembles(ensembles: Ensembles, *, seed: int) -> Found:
    """Return U-LiRA and the forgetting quality of the NeurIPS 2023 challenge, of ensembles on `forget`.

    The score of the challenge is in the details: the mean quality times the ratios of unlearned to retrained mean
    accuracy on `retain` (training samples) and on `test` (held-out retained ones), where those were answered.

    Raises:
        InputError: as for `u_lira`, or the models did not answer `forget`.
    """
    scores = [_scores(members) for members in (ensembles.unlearned, ensembles.retrained)]
    area, caught = u_lira(*scores)
    epsilon = epsilons(*scores)
    quality = of_values(forgetting_quality(epsilon))
    retain, test = (_accuracy_ratio(ensembles, name) for name in ("retain", "test"))
    details: dict[str, Any] = {
        "models": len(ensembles.unlearned),
        "quality_by_chance": quality_by_chance(*scores, seed=seed),
        "told_apart_without_error": epsilon.isinf().double().mean().item(),
        "retain_accuracy_ratio": retain,
        "test_accuracy_ratio": test,
        "score": None if retain is None or test is None else quality.value * retain * test,
    }
    figures = {"u_lira": area, "u_lira true positives": caught, "forgetting quality": quality}
    return Found(figures, details)


def _scores(members: Sequence[Mapping[str, Predictions]]) -> Tensor:
    if any("forget" not in member for member in members) or not members:
        raise InputError("expected the answers of each model on forgotten training samples, by the name forget")
    return torch.stack([log_odds(member["forget"].logits, member["forget"].labels) for member in members])


def _accuracy_ratio(ensembles: Ensembles, name: str) -> float | None:
    """Return unlearned over retrained mean accuracy; None where it was not measured, or the retrained have none."""
    both = (ensembles.unlearned, ensembles.retrained)
    if any(name not in member for members in both for member in members):
        return None
    ours, theirs = (
        sum(accuracy(member[name].logits, member[name].labels) for member in members) / len(members) for members in both
    )
    return ours / theirs if theirs > 0 else None


# Training


def train_ensembles(
    make_original: Callable[[int], Subject],
    make_unlearned: Callable[[Subject, int], Subject],
    make_retrained: Callable[[int], Subject],
    datasets: Mapping[str, Dataset[Any]],
    folder: Path,
    *,
    count: int,
    seed: int,
    identity: str,
) -> Ensembles:
    """Train `count` originals, unlearn each, retrain `count` others, and return what all of them answer.

    The answers of each model are written to `folder` as soon as it is there, and a model whose answers are there is not
    made again: interrupted, it goes on with the next. Models themselves are not kept. All seeds differ.

    Args:
        make_original: from a seed, a model trained on everything.
        make_unlearned: from an original and a seed, that model after unlearning.
        make_retrained: from a seed, a model that never saw the forgotten classes.
        datasets: `forget` (training samples of the forgotten classes), and for the score of the challenge `retain`
            (training samples of the others) and `test` (held-out ones of the others); in a fixed order.
        identity: what the answers depend on, in words: data, model, method, settings. Answers of another are refused.

    Raises:
        InputError: `count` is less than 3, or the folder holds the answers of other models.
    """
    if count < 3:
        raise InputError(f"expected at least 3 models of each kind, got {count}")
    found: dict[Kind, list[Mapping[str, Predictions]]] = {"unlearned": [], "retrained": []}
    for member in range(count):
        for kind, answers in found.items():
            path = folder / f"{kind}-{member}.safetensors"
            described = f"{identity} seed={seed}"
            if not path.exists():
                subject = _make(kind, member, seed, make_original, make_unlearned, make_retrained)
                _write(path, {name: subject.answers(dataset) for name, dataset in datasets.items()}, described)
            answers.append(_read(path, described, datasets))
    return Ensembles(tuple(found["unlearned"]), tuple(found["retrained"]))


def _make(
    kind: Kind,
    member: int,
    seed: int,
    make_original: Callable[[int], Subject],
    make_unlearned: Callable[[Subject, int], Subject],
    make_retrained: Callable[[int], Subject],
) -> Subject:
    seeds = [int(value) for value in np.random.SeedSequence((seed, member)).generate_state(3)]
    if kind == "retrained":
        return make_retrained(seeds[0])
    return make_unlearned(make_original(seeds[1]), seeds[2])


def _write(path: Path, answers: Mapping[str, Predictions], identity: str) -> None:
    tensors = {f"{name}.logits": one.logits.contiguous() for name, one in answers.items()}
    tensors |= {f"{name}.labels": one.labels.contiguous() for name, one in answers.items()}
    write_atomically({path: lambda beside: save_file(tensors, beside, metadata={"identity": identity})})


def _read(path: Path, identity: str, datasets: Mapping[str, Dataset[Any]]) -> Mapping[str, Predictions]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("identity") != identity:
                raise InputError(
                    f"{path} holds the answers of other models or settings: delete it, or take another folder"
                )
            return {
                name: Predictions(file.get_tensor(f"{name}.logits"), file.get_tensor(f"{name}.labels"))
                for name in datasets
            }
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot read the answers in {path} ({first_line(error)}): delete it to make them anew"
        ) from error

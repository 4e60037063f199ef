"""U-LiRA and forgetting quality on scores made by hand, and ensembles that go on where they were interrupted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from conftest import random_images
from expunge.audits.core import Subject
from expunge.audits.ensembles import (
    LEAST_DEVIATION,
    Ensembles,
    epsilons,
    forgetting_quality,
    judge_ensembles,
    log_odds,
    quality_by_chance,
    train_ensembles,
    u_lira,
)
from expunge.audits.membership import LIMIT
from expunge.data import TensorImages
from expunge.errors import InputError
from expunge.schema import Predictions


def normal(count: int, samples: int, *, seed: int, mean: float = 0.0) -> Tensor:
    return torch.randn((count, samples), generator=torch.Generator().manual_seed(seed)) + mean


# Scores


def test_log_odds_are_a_function_of_the_loss() -> None:
    logits = torch.randn((50, 4), generator=torch.Generator().manual_seed(0)).double() * 4
    labels = torch.arange(50) % 4
    loss = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(log_odds(logits, labels), -(loss.exp() - 1).log())
    p = logits.softmax(1)[torch.arange(50), labels]
    torch.testing.assert_close(log_odds(logits, labels), (p / (1 - p)).log())


def test_log_odds_tell_certain_answers_apart_and_stay_finite() -> None:
    sure = log_odds(torch.tensor([[100.0, 0.0], [200.0, 0.0], [0.0, 300.0]]), torch.tensor([0, 0, 0]))
    assert sure.tolist() == [100, 200, -300]
    masked = log_odds(torch.tensor([[-math.inf, 1.0], [1.0, -math.inf]]), torch.tensor([0, 0]))
    assert masked.tolist() == [-LIMIT, LIMIT]
    with pytest.raises(InputError, match="NaN"):
        log_odds(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))


# U-LiRA


def test_ensembles_of_one_distribution_are_not_told_apart() -> None:
    area, caught = u_lira(normal(8, 2000, seed=0), normal(8, 2000, seed=1))
    assert area.interval.low < 0.5 < area.interval.high
    assert area.interval.high - area.interval.low < 0.04
    assert caught.value == pytest.approx(0.01, abs=0.005)
    same = normal(4, 50, seed=2)
    area, caught = u_lira(same, same)
    assert area.value == 0.5
    assert caught.value <= 0.02


def test_ensembles_far_apart_are() -> None:
    area, caught = u_lira(normal(8, 200, seed=0, mean=30), normal(8, 200, seed=1))
    assert area.value == 1.0
    assert caught.value == 1.0
    assert area.count == 8
    few, _ = u_lira(normal(4, 200, seed=0, mean=30), normal(4, 200, seed=1))
    assert 0.99 < few.value < 1  # deviations of three models are rough


def test_an_ensemble_of_the_same_mean_and_another_width_is_told_apart() -> None:
    area, _ = u_lira(normal(12, 500, seed=0) * 0.05, normal(12, 500, seed=1))
    assert area.value > 0.9


def test_u_lira_is_what_scipy_and_sklearn_say() -> None:
    unlearned, retrained = normal(5, 40, seed=0, mean=0.7).double(), normal(5, 40, seed=1).double()
    areas, caught = [], []
    for out in range(5):
        ratios = []
        for scores in (unlearned, retrained):
            found = []
            for x in range(40):
                logs = []
                for ensemble in (unlearned, retrained):
                    rest = np.delete(ensemble[:, x].numpy(), out)
                    logs.append(stats.norm.logpdf(scores[out, x], rest.mean(), max(rest.std(ddof=1), LEAST_DEVIATION)))
                found.append(logs[0] - logs[1])
            ratios.append(np.array(found))
        areas.append(roc_auc_score([1] * 40 + [0] * 40, np.concatenate(ratios)))
        caught.append((ratios[0] > ratios[1].max()).mean())  # of 40, 1 % are none
    found_area, found_caught = u_lira(unlearned, retrained)
    assert found_area.groups[0].tolist() == pytest.approx(areas)
    assert found_caught.groups[0].tolist() == pytest.approx(caught)


# Forgetting quality


def by_rules(unlearned: list[float], retrained: list[float], delta: float) -> float:
    """Epsilon by trying every pair of thresholds, in words of its definition."""
    values = sorted({*unlearned, *retrained})
    cuts = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(values)), math.inf]
    best = 0.0
    for low, high in itertools.combinations(cuts, 2):
        for turned in (False, True):
            false_positive = sum((low < value < high) != turned for value in retrained) / len(retrained)
            false_negative = sum((low < value < high) == turned for value in unlearned) / len(unlearned)
            if false_positive == 0 and false_negative == 0:
                return math.inf
            if false_positive == 0 or false_negative == 0:
                continue
            for one, other in ((false_positive, false_negative), (false_negative, false_positive)):
                if 1 - delta - one > 0:
                    best = max(best, math.log(1 - delta - one) - math.log(other))
    return best


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.5, 4.0])
def test_epsilon_is_the_best_of_all_rules(mean: float) -> None:
    unlearned, retrained = normal(6, 25, seed=0, mean=mean), normal(6, 25, seed=1)
    retrained[:, 20:] = unlearned[:, 20:].roll(1, 0)  # the same scores: none can be cut apart
    retrained[0, 10:15] = unlearned[0, 10:15]  # one is the same
    expected = [by_rules(u, r, 1e-5) for u, r in zip(unlearned.T.tolist(), retrained.T.tolist(), strict=True)]
    found = epsilons(unlearned, retrained)
    assert found.tolist() == pytest.approx(expected)
    assert found[20:].tolist() == [0.0] * 5
    assert bool((found[found.isfinite()] <= math.log(5)).all())


def test_epsilon_of_known_cases() -> None:
    low, high = torch.arange(5.0).view(-1, 1), torch.arange(5.0).view(-1, 1) + 10
    assert epsilons(high, low).tolist() == [math.inf]
    assert epsilons(low, low).tolist() == [0.0]
    inner, outer = torch.tensor([-0.2, -0.1, 0.0, 0.1]).view(-1, 1), torch.tensor([-9.0, -8.0, 8.0, 9.0]).view(-1, 1)
    assert epsilons(inner, outer).tolist() == [math.inf]  # by two thresholds; none of one does
    swapped = low.clone()
    swapped[-1], high[0] = 14.5, 0.5  # one of five on the wrong side of either: log(.8 / .2) by one threshold
    assert epsilons(high, swapped, delta=0.0)[0] == pytest.approx(math.log(0.8 / 0.2))


def test_quality_halves_with_each_half_of_epsilon() -> None:
    given = torch.tensor([0.0, 0.49, 0.5, 0.99, 1.0, 2.6, math.inf], dtype=torch.float64)
    assert forgetting_quality(given).tolist() == [1, 1, 0.5, 0.5, 0.25, 2**-5, 0]


def test_ensembles_seem_apart_by_chance() -> None:
    unlearned, retrained = normal(5, 300, seed=0), normal(5, 300, seed=1)
    chance = quality_by_chance(unlearned, retrained, seed=0)
    assert chance == quality_by_chance(unlearned, retrained, seed=0)
    assert 0.1 < chance < 0.6
    assert forgetting_quality(epsilons(unlearned, retrained)).mean().item() == pytest.approx(chance, abs=0.06)
    more = quality_by_chance(normal(40, 100, seed=0), normal(40, 100, seed=1), seed=0)
    assert 0.03 < more < chance  # more models allow larger epsilons, of chance too
    apart = normal(5, 300, seed=0, mean=30)
    assert forgetting_quality(epsilons(apart, retrained)).mean().item() == 0
    assert quality_by_chance(apart, retrained, seed=0) > 0.05


@pytest.mark.parametrize("judge", [u_lira, epsilons])
def test_scores_that_say_nothing_are_refused(judge: Callable[[Tensor, Tensor], object]) -> None:
    scores = normal(4, 3, seed=0)
    for one, other in ((scores, scores[:3]), (scores[:2], scores[:2]), (scores[:, :0], scores[:, :0])):
        with pytest.raises(InputError, match="expected scores"):
            judge(one, other)
    with pytest.raises(InputError, match="expected finite scores"):
        judge(scores, scores.masked_fill(scores == scores[0, 0], math.nan))


def answers(logits: Tensor, label: int = 0) -> Predictions:
    return Predictions(logits, torch.full((len(logits),), label))


def test_the_score_is_quality_times_accuracies() -> None:
    right, wrong = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    same = answers(normal(6, 2, seed=0))
    ours = {"forget": same, "retain": answers(torch.cat([right, right, right, wrong])), "test": answers(right)}
    theirs = {"forget": same, "retain": answers(right), "test": answers(torch.cat([right, wrong]))}
    found = judge_ensembles(Ensembles((ours,) * 3, (theirs,) * 3), seed=0)
    assert found.figures["forgetting quality"].value == 1.0
    assert found.figures["forgetting quality"].count == 6
    assert found.figures["u_lira"].value == 0.5
    assert found.details["score"] == pytest.approx(1.0 * 0.75 * 2.0)
    assert found.details["models"] == 3
    assert found.details["told_apart_without_error"] == 0
    short = judge_ensembles(Ensembles(({"forget": same},) * 3, (theirs,) * 3), seed=0)
    assert short.details["score"] is None
    with pytest.raises(InputError, match="by the name forget"):
        judge_ensembles(Ensembles(({"test": same},) * 3, (theirs,) * 3), seed=0)


# Training


class Makers:
    """Makes models from seeds, counts them, and fails where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.made: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def make(self, kind: str, seed: int) -> Subject:
        if len(self.made) == self.fail_at:
            raise KeyboardInterrupt
        self.made.append((kind, seed))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Subject(kind, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), None)

    def original(self, seed: int) -> Subject:
        return self.make("original", seed)

    def unlearned(self, original: Subject, seed: int) -> Subject:
        assert original.role == "original"
        return self.make("unlearned", seed)

    def retrained(self, seed: int) -> Subject:
        return self.make("retrained", seed)

    def train(self, folder: Path, *, identity: str = "tiny", count: int = 3, seed: int = 0) -> Ensembles:
        images = random_images(9)
        data = {"forget": images, "test": TensorImages(images.images[:4], images.labels[:4])}
        return train_ensembles(
            self.original, self.unlearned, self.retrained, data, folder, count=count, seed=seed, identity=identity
        )


def test_ensembles_go_on_where_they_were_interrupted(tmp_path: Path) -> None:
    whole = Makers()
    expected = whole.train(tmp_path / "whole")
    assert [kind for kind, _ in whole.made] == ["original", "unlearned", "retrained"] * 3
    assert len({seed for _, seed in whole.made}) == 9
    first = Makers(fail_at=5)
    with pytest.raises(KeyboardInterrupt):
        first.train(tmp_path / "parts")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "retrained-0.safetensors",
        "unlearned-0.safetensors",
        "unlearned-1.safetensors",
    ]
    second = Makers()
    found = second.train(tmp_path / "parts")
    assert first.made + second.made == whole.made
    for one, other in zip(
        (*expected.unlearned, *expected.retrained), (*found.unlearned, *found.retrained), strict=True
    ):
        assert one.keys() == other.keys() == {"forget", "test"}
        for name in one:
            assert torch.equal(one[name].logits, other[name].logits)
            assert torch.equal(one[name].labels, other[name].labels)
    again = Makers()
    again.train(tmp_path / "whole")
    assert again.made == []
    judge_ensembles(found, seed=0)


def test_ensembles_of_other_settings_are_refused(tmp_path: Path) -> None:
    Makers().train(tmp_path)
    for other in ({"identity": "other"}, {"seed": 1}):
        with pytest.raises(InputError, match="answers of other models or settings"):
            Makers().train(tmp_path, **other)
    (tmp_path / "retrained-1.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match="cannot read"):
        Makers().train(tmp_path)
    with pytest.raises(InputError, match="at least 3 models"):
        Makers().train(tmp_path / "few", count=2)

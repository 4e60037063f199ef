"""The default UNSIR, calibrated from signals: it forgets and keeps on networks of many kinds, and it ends."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import Subset

from conftest import Tiny
from expunge.batches import take
from expunge.data import TensorImages, draw, labels_of, normalize, open_source, stage, with_test_split, without
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal
from expunge.methods import PRESETS
from expunge.methods.fine_tune import fine_tune
from expunge.methods.unsir import Calibration, UnsirConfig, _least, learn_noise, unsir
from expunge.schema import Signals, TrainConfig
from expunge.signals import IMPRESSION_STEPS, KINDS, LEAST_COMPARED, Units, gather_evidence, logits_on, refreshed
from expunge.training import train

UNREACHABLE = UnsirConfig(
    noise_steps=2,
    impressions=8,
    impair=TrainConfig(steps=5, lr=1e-7, batch_size=64, update_norm_statistics=False),
    repair=TrainConfig(steps=6, lr=1e-7, batch_size=64),
    calibration=Calibration(
        called=1e-9, probability=1e-9, evidence=6, plenty=1, trials=2, rounds=2, cycles=2, check_every=2
    ),
)
"""Rates so low that nothing moves: every bound of the search is met."""


class Tokens(nn.Module):
    """A vision transformer of one block: LayerNorm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 32, 2, stride=2)
        self.place = nn.Parameter(torch.randn(1, 16, 32) * 0.1)
        self.before = nn.LayerNorm(32)
        self.look = nn.MultiheadAttention(32, 4, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.classify = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.place
        seen = self.before(tokens)
        tokens = tokens + self.look(seen, seen, seen, need_weights=False)[0]
        answers: Tensor = self.classify((tokens + self.think(tokens)).mean(1))
        return answers


class Tied(nn.Module):
    """One convolution that is used twice, and another that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.shared.weight = self.again.weight
        self.norm = nn.BatchNorm2d(16)
        self.out = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.again(self.again(self.first(images).relu()).relu())
        maps = F.adaptive_avg_pool2d(self.shared(self.norm(maps).relu()).relu(), 2)
        answers: Tensor = self.out(maps.flatten(1))
        return answers


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def grouped() -> nn.Module:
    """Grouped and depthwise convolutions; its head is a convolution."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Conv2d(32, 10, 2), nn.Flatten(),
    )  # fmt: skip


def frozen() -> nn.Module:
    """LayerNorm, and a first layer that does not train."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)
    )


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    lr: float
    loss_allowed: float = 0.03  # of retained accuracy


NETS = {
    "norm-free": Net(plain, 0.005),
    "transformer": Net(Tokens, 0.005),
    "tied": Net(Tied, 0.01),
    "grouped": Net(grouped, 0.01),
    "frozen": Net(frozen, 0.005),
}


class Nets:
    """Small networks of the digits, each trained when first asked for."""

    def __init__(self, tiny: Tiny) -> None:
        source, _ = with_test_split(open_source("digits"))
        self.tiny, self.table = tiny, source.train
        preprocessing = tiny.split.preprocessing
        assert preprocessing is not None
        self.preprocessing = preprocessing
        self.images = stage(source.train, preprocessing).dataset
        self.made: dict[str, nn.Module] = {}

    def get(self, name: str, classes: tuple[int, ...] = (3,)) -> Tiny:
        net = NETS[name]
        if name not in self.made:
            torch.manual_seed(0)
            model = net.make()
            config = TrainConfig(epochs=10, lr=net.lr, batch_size=64, schedule="one_cycle")
            train(model, self.images, config, seed=0, preprocessing=self.preprocessing)
            if name == "frozen":
                model[1].requires_grad_(False)  # type: ignore[index]
            self.made[name] = model
        return self.forgetting(self.made[name], classes)

    def forgetting(self, model: nn.Module, classes: tuple[int, ...]) -> Tiny:
        retain = stage(draw(without(self.table, classes), per_class=100, seed=0), self.preprocessing).dataset
        return Tiny(model, replace(self.tiny.split, forget_classes=classes, retain=retain))


@pytest.fixture(scope="session")
def nets(tiny: Tiny) -> Nets:
    return Nets(tiny)


def steps_of(journal: Journal, *names: str) -> int:
    """Optimizer steps; `answers` are batches read, not steps."""
    return sum(phase.steps for phase in journal.phases if (phase.name in names if names else phase.name != "answers"))


def most_steps(config: UnsirConfig) -> int:
    plan = config.calibration
    assert plan is not None
    assert config.impair.steps is not None
    assert config.repair.steps is not None
    repair = config.repair.steps + (plan.cycles - 1) * (config.repair.steps // 4)
    round_of = plan.trials * config.impair.steps + repair
    return config.noise_steps + IMPRESSION_STEPS * (len(KINDS) + 1) + plan.rounds * round_of


# It forgets and keeps


def test_the_default_forgets_and_keeps(tiny: Tiny, forgotten: tuple[nn.Module, Journal]) -> None:
    unlearned, journal = forgotten
    assert tiny.accuracy(tiny.model, forget=True) > 0.9
    assert tiny.accuracy(unlearned, forget=True) <= 0.01
    assert tiny.accuracy(unlearned, forget=False) >= tiny.accuracy(tiny.model, forget=False) - 0.03
    assert not any(module.training for module in unlearned.modules())
    found = journal.calibration
    assert found is not None
    assert found.reached
    assert found.held_out == 9 * int(100 * Calibration().held_out + 0.5)  # of each of nine classes
    assert found.batch_size == 128  # though 64 would suit some 850 images: there is BatchNorm
    assert found.signals == tuple(journal.signals)
    assert found.signals[0].phase == "original"
    assert found.signals[0].retain_agreement == 1.0
    assert {signals.phase for signals in found.signals[1:]} == {"impair", "repair"}
    assert found.trials[-1]["outcome"] in ("gone", "left")  # by impair alone; repair is what empties it then
    assert [trial["steps"] for trial in found.trials] == [p.steps for p in journal.phases if p.name == "impair"]
    assert steps_of(journal) <= most_steps(UnsirConfig())
    assert all(3 not in phase.label_counts for phase in journal.phases)
    repaired = next(phase for phase in reversed(journal.phases) if phase.name == "repair")
    assert repaired.signals.startswith("still called: retained ") or repaired.signals == ""


@pytest.mark.parametrize("name", NETS)
def test_the_default_on_networks_of_many_kinds(nets: Nets, name: str) -> None:
    case = nets.get(name)
    before = copy.deepcopy(case.model.state_dict())
    journal = Journal()
    unlearned = unsir(case.model, case.split.zero_glance(), seed=0, journal=journal)
    kept = case.accuracy(case.model, forget=False)
    assert kept > 0.9
    assert case.accuracy(case.model, forget=True) > 0.8
    assert case.accuracy(unlearned, forget=True) <= 0.01
    assert case.accuracy(unlearned, forget=False) >= kept - NETS[name].loss_allowed
    assert steps_of(journal) <= most_steps(UnsirConfig())
    for key, value in case.model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the caller's model moved"
    after = dict(unlearned.named_parameters())
    for key, parameter in case.model.named_parameters():
        assert after[key].requires_grad == parameter.requires_grad
        assert torch.equal(after[key], before[key]) != parameter.requires_grad, key
    if isinstance(unlearned, Tied):
        assert unlearned.shared.weight is unlearned.again.weight


@pytest.mark.parametrize("preset", [UnsirConfig, UnsirConfig.fast], ids=["default", "fast"])
def test_a_model_that_is_surer_than_most_forgets_too(
    preset: Callable[[], UnsirConfig], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for part in (sure.get_parameter("answer.weight"), sure.get_parameter("answer.bias")):
            part.mul_(8)
    journal = Journal()
    unlearned = unsir(sure, tiny.split.zero_glance(), preset(), seed=0, journal=journal)
    assert tiny.accuracy(unlearned, forget=True) < 0.03  # one image of 37, by the fast preset
    assert tiny.accuracy(unlearned, forget=False) > 0.95
    assert journal.calibration is not None
    assert journal.calibration.scale > 2
    assert any("its first answer leads the second by" in note for note in journal.notes)
    assert not unlearned._forward_hooks
    assert not sure._forward_hooks
    images = normalize(torch.stack([tiny.split.retain[index][0] for index in range(32)]), tiny.split.preprocessing)
    leads = [model(images).topk(2).values.diff().abs().mean().item() for model in (unlearned, sure)]
    assert leads[0] > leads[1] / 3  # its own answers are whole again
    monkeypatch.setattr(sys.modules["expunge.methods.unsir"], "SURE", math.inf)
    left = unsir(sure, tiny.split.zero_glance(), preset(), seed=0)
    assert tiny.accuracy(left, forget=True) > 0.1  # what it is there for


class Odd(nn.Module):
    """A model between two functions of ours."""

    def __init__(
        self, model: Any, before: Callable[[Tensor], Any] | None = None, after: Callable[[Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before or nn.Identity(), after or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.after(self.model(self.before(images)))
        return answers


def cosines(logits: Tensor) -> Tensor:
    return F.normalize(logits)


def test_a_model_that_is_less_sure_than_right_forgets_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    unsure = Odd(copy.deepcopy(tiny.model), after=cosines)
    journal = Journal()
    unlearned = unsir(unsure, tiny.split.zero_glance(), seed=0, journal=journal)
    assert tiny.accuracy(unlearned, forget=True) <= 0.01
    assert tiny.accuracy(unlearned, forget=False) > 0.95
    assert journal.calibration is not None
    assert journal.calibration.scale < 0.5
    assert journal.calibration.reached
    assert any("its answers were multiplied by" in note for note in journal.notes)
    monkeypatch.setattr(sys.modules["expunge.methods.unsir"], "UNSURE", 1.0)
    left = Journal()
    unsir(unsure, tiny.split.zero_glance(), seed=0, journal=left)
    assert left.calibration is not None
    assert not left.calibration.reached  # what it is there for


def test_a_model_that_gives_probabilities_is_named(tiny: Tiny) -> None:
    journal = Journal()
    given = Odd(copy.deepcopy(tiny.model), after=nn.Softmax(1))
    unsir(given, tiny.split.zero_glance(), UnsirConfig.fast(), seed=0, journal=journal)
    assert any("hand" in note and "last softmax" in note for note in journal.notes)


def test_input_in_other_units_is_forgotten_in_them(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that scales pixels of 0 to 255 itself: steps of a twentieth of a grey level change nothing."""
    own = tiny.split.preprocessing
    assert own is not None
    mean, std = 255 * own.mean[0], 255 * own.std[0]
    raw = Odd(copy.deepcopy(tiny.model), before=lambda images: (images - mean) / std)
    grey = replace(own, mean=(0.0,), std=(1 / 255,))
    split = replace(tiny.split, preprocessing=grey)
    other = Tiny(raw, split)
    assert other.accuracy(raw, forget=True) == tiny.accuracy(tiny.model, forget=True)
    journal = Journal()
    unlearned = unsir(raw, split.zero_glance(), seed=0, journal=journal)
    assert other.accuracy(unlearned, forget=True) <= 0.01
    assert other.accuracy(unlearned, forget=False) > 0.95
    assert journal.calibration is not None
    assert journal.calibration.reached
    assert min(journal.signals[0].impressions_called.values()) > 0.9  # the original knows them
    noise = next(learned for learned in journal.learned if learned.kind == "noise")
    assert noise.images.std() > 50  # grey levels
    monkeypatch.setattr(sys.modules["expunge.signals"], "USUAL_DEVIATION", (0.0, math.inf))
    blind = Journal()
    unsir(raw, split.zero_glance(), seed=0, journal=blind)
    assert blind.calibration is not None
    assert blind.calibration.reached is None  # what it is there for: signals that say nothing, and that is said
    assert "so it says nothing that a changed model does not" in blind.calibration.why


@pytest.mark.parametrize("units", [None, Units(torch.full((1, 1, 1), 70.0), torch.full((1, 1, 1), 100.0))])
def test_noise_that_is_answered_too_wildly_is_turned_down(
    units: Units | None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["expunge.methods.unsir"]
    model, split = tiny.model, tiny.split.zero_glance()
    if units is not None:
        mean, std = units.mean, units.deviation
        model = Odd(copy.deepcopy(model), before=lambda images: (images - mean) / std)
    evidence = gather_evidence(tiny.model, split, tiny.split.retain, per_class=2, seed=0)
    shown = evidence.retained if units is None else units.input(evidence.retained)
    evidence = replace(evidence, retained=shown, units=units)
    noise = learn_noise(model, split, UnsirConfig(), seed=0, units=units)

    def apart(images: Tensor) -> float:
        return logits_on(model, images).std(1, correction=0).mean().item()

    ratio = apart(noise.images) / apart(shown)
    assert ratio > 1.5
    monkeypatch.setattr(module, "WILD", ratio + 0.01)
    same, kept = module._calmed(model, noise, evidence, Journal())
    assert same is noise
    assert kept == 1.0
    monkeypatch.setattr(module, "WILD", ratio / 2)
    journal = Journal()
    calm, kept = module._calmed(model, noise, evidence, journal)
    assert 0 < kept < 1
    assert apart(calm.images) / apart(shown) == pytest.approx(ratio / 2, rel=0.05)
    assert torch.equal(calm.labels, noise.labels)
    if units is None:
        torch.testing.assert_close(calm.images, kept * noise.images)
    assert sum(journal.phases[0].label_counts.values()) == len(evidence.labels)


def test_a_model_that_lets_no_gradient_through_is_one_line(tiny: Tiny) -> None:
    cut = Odd(copy.deepcopy(tiny.model), before=torch.Tensor.detach)
    with pytest.raises(InputError, match="gradients reach its input"):
        unsir(cut, tiny.split.zero_glance(), seed=0)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]


class Hoarder(Odd):
    """A model that keeps its last answer, in a list."""

    def forward(self, images: Tensor) -> Tensor:
        self.last = [super().forward(images)]
        return self.last[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "measured before"])
@pytest.mark.parametrize(
    ("given", "name"),
    [
        (nn.utils.weight_norm, "model.answer.weight"),
        (nn.utils.spectral_norm, "model.answer.weight"),
        (pruned, "model.answer.weight"),
        (None, "it.last"),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "cache"],
)
def test_a_model_that_cannot_be_copied_is_one_line(given: Any, name: str, seen: bool, tiny: Tiny) -> None:
    model = (Odd if given else Hoarder)(copy.deepcopy(tiny.model))
    if given:
        given(model.model.answer)
    if seen:
        with torch.no_grad():
            model.eval()(torch.zeros(2, 1, 8, 8))
    for config in (UnsirConfig.fast(), UnsirConfig.paper()):
        with pytest.raises(InputError, match=f"cannot be copied while it trains: {name} keeps what was computed"):
            unsir(model, tiny.split.zero_glance(), config, seed=0)


def test_a_model_that_keeps_its_last_answer_is_fine_tuned(tiny: Tiny) -> None:
    """Nothing copies it while it trains."""
    model = Hoarder(copy.deepcopy(tiny.model))
    model(torch.zeros(2, 1, 8, 8))  # with gradients
    config = replace(PRESETS["fine_tune"]["default"](), training=TrainConfig(steps=2))
    fine_tune(model, tiny.split.zero_glance(), config, seed=0)


def test_of_several_rounds_one_that_lost_too_much_is_kept_last(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its answers are nearer to the original's."""
    module: Any = sys.modules["expunge.methods.unsir"]
    shown = iter([(0.5, 0.1), (0.97, 0.9)])
    models: list[nn.Module] = []

    def round_of(_: Any, model: nn.Module, *__: Any) -> tuple[nn.Module, Signals]:
        accuracy, divergence = next(shown)
        models.append(copy.deepcopy(model))
        return models[-1], Signals(
            phase="repair", step=1, impressions_called={"retained": 0.0}, class_probability=0.0,
            retain_accuracy=accuracy, retain_agreement=accuracy, retain_divergence=divergence,
        )  # fmt: skip

    monkeypatch.setattr(module._Calibrated, "_repair", round_of)
    journal = Journal()
    kept = unsir(tiny.model, tiny.split.zero_glance(), UnsirConfig.fast(), seed=0, journal=journal)
    assert kept is models[1]
    found = journal.calibration
    assert found is not None
    assert found.reached
    assert (found.trials[0]["rate"], found.impair_rate) == (2 * found.impair_rate, found.trials[-1]["rate"])


def test_signals_that_say_nothing_of_the_class_still_see_what_is_lost(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["expunge.methods.unsir"]
    monkeypatch.setattr(module, "TELLING", 2.0)
    config = replace(
        UnsirConfig.fast(), impair=replace(UnsirConfig.fast().impair, lr=1.0), repair=TrainConfig(steps=1, lr=1e-9)
    )
    config = replace(config, calibration=replace(Calibration(), trials=1, rounds=1))
    journal = Journal()
    unsir(tiny.model, tiny.split.zero_glance(), config, seed=0, journal=journal)
    found = journal.calibration
    assert found is not None
    assert found.reached is False
    assert "says nothing" in found.why
    assert "accuracy on retained images is lost" in found.why


@pytest.mark.parametrize("each", [4, 10])
def test_few_held_out_images_are_not_all_that_answers_are_compared_on(tiny: Tiny, each: int) -> None:
    labels = labels_of(tiny.split.retain)
    few = [int(row) for label in np.unique(labels) for row in np.flatnonzero(labels == label)[:each]]
    split = replace(tiny.split.zero_glance(), retain=Subset(tiny.split.retain, few))
    journal = Journal()
    unsir(tiny.model, split, UnsirConfig.fast(), seed=0, journal=journal)
    found = journal.calibration
    assert found is not None
    # of four images a class none can be done without; of ten, one
    assert (found.held_out, found.trained_on) == ((0, 36) if each == 4 else (9, LEAST_COMPARED - 9))


def test_a_round_that_lost_too_much_is_not_gone_on_from(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = sys.modules["expunge.methods.unsir"]
    began: list[dict[str, Tensor]] = []
    real = module.impair

    def note(model: nn.Module, *given: Any, **more: Any) -> nn.Module:
        began.append(copy.deepcopy(model.state_dict()))
        changed: nn.Module = real(model, *given, **more)
        return changed

    monkeypatch.setattr(module, "impair", note)
    monkeypatch.setattr(module._Calibrated, "_gone", lambda *_: False)
    # twice the rate since the class is left, half of it since too much of the rest is lost
    config = replace(
        UnsirConfig(),
        impair=replace(UnsirConfig().impair, lr=0.2),
        repair=replace(UnsirConfig().repair, steps=1),
        calibration=Calibration(trials=1),
    )
    journal = Journal()
    unsir(tiny.model, tiny.split.zero_glance(), config, seed=0, journal=journal)
    found = journal.calibration
    assert found is not None
    assert not found.reached
    assert not found.back  # what is lost is not back
    assert len(began) == 2
    assert len({trial["rate"] for trial in found.trials}) == 1
    for key, value in tiny.model.state_dict().items():
        assert torch.equal(value, began[1][key]), key


def test_several_classes_at_once_cost_as_much_as_one(
    nets: Nets, tiny: Tiny, forgotten: tuple[nn.Module, Journal]
) -> None:
    several = nets.forgetting(tiny.model, (1, 4, 7))
    journal = Journal()
    unlearned = unsir(tiny.model, several.split.zero_glance(), seed=0, journal=journal)
    for label in (1, 4, 7):
        alone = Tiny(tiny.model, replace(several.split, forget_classes=(label,)))
        assert alone.accuracy(unlearned, forget=True) <= 0.01
    assert several.accuracy(unlearned, forget=False) >= several.accuracy(tiny.model, forget=False) - 0.03
    one = forgotten[1]
    assert steps_of(journal, "noise", "impressions") == steps_of(one, "noise", "impressions")
    assert steps_of(journal) <= 1.2 * steps_of(one)
    assert not {1, 4, 7} & {label for phase in journal.phases for label in phase.label_counts}


def test_a_second_request_keeps_the_first(nets: Nets, tiny: Tiny, forgotten: tuple[nn.Module, Journal]) -> None:
    both = nets.forgetting(forgotten[0], (3, 5))
    second = Tiny(forgotten[0], replace(both.split, forget_classes=(5,), forgotten_before=(3,)))
    unlearned = unsir(forgotten[0], second.split.zero_glance(), seed=0)
    assert second.accuracy(forgotten[0], forget=True) > 0.8
    assert second.accuracy(unlearned, forget=True) <= 0.01
    assert tiny.accuracy(unlearned, forget=True) <= 0.01
    assert both.accuracy(unlearned, forget=False) >= both.accuracy(tiny.model, forget=False) - 0.05
    with pytest.raises(InputError, match="samples of the forgotten class '3'"):
        unsir(forgotten[0], replace(second.split.zero_glance(), retain=nets.images), seed=0)


def test_a_calibrated_run_is_deterministic_and_leaves_modes_and_random_state_alone(nets: Nets) -> None:
    case = nets.get("grouped")
    config = replace(UnsirConfig(), repair=TrainConfig(steps=20, lr=0.0015, schedule="one_cycle"))
    config = replace(config, calibration=Calibration(evidence=6, rounds=1))
    case.model.train()
    case.model[1].eval()  # type: ignore[index]
    modes = [module.training for module in case.model.modules()]
    state = torch.get_rng_state()
    journals = Journal(), Journal()
    first = unsir(case.model, case.split.zero_glance(), config, seed=2, journal=journals[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in case.model.modules()] == modes
    torch.manual_seed(99)
    second = unsir(case.model, case.split.zero_glance(), config, seed=2, journal=journals[1])
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert journals[0].calibration == journals[1].calibration
    assert [p.steps for p in journals[0].phases] == [p.steps for p in journals[1].phases]


def test_held_out_images_are_never_trained_on(nets: Nets, monkeypatch: pytest.MonkeyPatch) -> None:
    case = nets.get("norm-free")
    module: Any = sys.modules["expunge.methods.unsir"]
    held: list[Any] = []
    real, cut = module.train, module.hold_out

    def note(*given: Any, **more: Any) -> Any:
        held.append(cut(*given, **more))
        return held[-1]

    def spy(model: nn.Module, dataset: Any, *given: Any, **more: Any) -> None:
        trained = {tuple(dataset[index][0].flatten().tolist()) for index in range(len(dataset))}
        kept_out = {tuple(image.flatten().tolist()) for image, _ in (held[0][1][i] for i in range(len(held[0][1])))}
        assert len(trained) >= 800
        assert len(kept_out) >= 40
        assert not trained & kept_out
        real(model, dataset, *given, **more)

    monkeypatch.setattr(module, "hold_out", note)
    monkeypatch.setattr(module, "train", spy)
    unsir(case.model, case.split.zero_glance(), UNREACHABLE, seed=0)
    assert len(held) == 1


# It ends


def test_a_goal_out_of_reach_ends_at_the_cap_and_says_so(nets: Nets) -> None:
    case = nets.get("norm-free")
    journal = Journal()
    unlearned = unsir(case.model, case.split.zero_glance(), UNREACHABLE, seed=0, journal=journal)
    found = journal.calibration
    assert found is not None
    assert not found.reached
    assert "after 2 rounds" in found.why
    assert "100% of the class impressions of one kind are still called" in found.why
    assert found.back  # nothing moved, so nothing was lost
    assert found.rounds == 2
    assert [(t["round"], t["outcome"], t["steps"]) for t in found.trials] == [(1, "left", 5), (2, "left", 5)]
    assert [t["rate"] for t in found.trials] == [1e-7, 2e-7]  # twice, where the class is left
    read = [(signals.phase, signals.step) for signals in found.signals]
    assert read[:4] == [("original", 0), ("impair", 2), ("impair", 4), ("impair", 5)]
    assert steps_of(journal) <= most_steps(UNREACHABLE)
    assert steps_of(journal, "impair") == 10
    assert all(bool(torch.isfinite(value).all()) for value in unlearned.state_dict().values())


def test_a_rate_that_does_too_much_is_halved_until_it_does_not(nets: Nets) -> None:
    case = nets.get("norm-free")
    config = replace(UnsirConfig(), impair=replace(UnsirConfig().impair, lr=1.6))
    plan = Calibration(trials=12, plenty=1)
    config = replace(config, calibration=plan)
    journal = Journal()
    unlearned = unsir(case.model, case.split.zero_glance(), config, seed=0, journal=journal)
    assert journal.calibration is not None
    trials = [trial for trial in journal.calibration.trials if trial["round"] == 1]
    assert trials[0]["outcome"] == "too much"
    assert trials[-1]["outcome"] != "too much"
    assert [t["rate"] for t in trials] == pytest.approx([1.6 / 2**number for number in range(len(trials))])
    assert case.accuracy(unlearned, forget=True) <= 0.01
    # 45 held-out images see no less than two of them, beside the loss that counts as back
    if case.accuracy(unlearned, forget=False) < case.accuracy(case.model, forget=False) - plan.back - 2 / 45:
        assert not journal.calibration.back  # lost, and said so


@pytest.mark.parametrize(
    ("accuracy", "held_out", "least"),
    [
        (0.9, 400, 0.9 - 0.08 - 0.015),  # the standard error of .9 on 400 images is .015
        (0.5, 25, 0.5 - 0.08 - 0.1),
        (1.0, 5, 0.8),  # no image is lost by chance, but less than one cannot be
    ],
)
def test_accuracy_is_back_within_what_held_out_images_can_show(accuracy: float, held_out: int, least: float) -> None:
    assert _least(accuracy, held_out, 0.08) == pytest.approx(least, abs=1e-6)


LARGE_BATCHES = replace(
    UNREACHABLE,
    impair=replace(UNREACHABLE.impair, mode="batch", batch_size=128),
    repair=replace(UNREACHABLE.repair, mode="batch", batch_size=128),
    calibration=replace(UNREACHABLE.calibration or Calibration(), rounds=1),
)


@pytest.mark.parametrize(("name", "batch", "rate"), [("tied", 128, 0.5e-7), ("norm-free", 64, 1e-7)])
def test_few_images_give_smaller_batches_or_where_batchnorm_needs_them_a_slower_repair(
    nets: Nets, name: str, batch: int, rate: float
) -> None:
    case, journal = nets.get(name), Journal()
    unlearned = unsir(case.model, case.split.zero_glance(), LARGE_BATCHES, seed=0, journal=journal)
    assert journal.calibration is not None
    assert journal.calibration.batch_size == batch
    assert journal.calibration.repair_rate == pytest.approx(rate)
    for name in {"norm.running_mean", "norm.running_var"} & unlearned.state_dict().keys():
        assert not torch.equal(unlearned.state_dict()[name], case.model.state_dict()[name])


@pytest.mark.parametrize("per_class", [15, 60])
def test_the_class_does_not_come_back_with_statistics_measured_anew(nets: Nets, per_class: int) -> None:
    case = nets.get("tied")
    labels = torch.as_tensor(labels_of(case.split.retain))
    rows = torch.cat([(labels == label).nonzero().flatten()[:per_class] for label in sorted(set(labels.tolist()))])
    images, _, _ = take(case.split.retain, rows)
    split = replace(case.split, retain=TensorImages(images, labels[rows]))
    unlearned = unsir(case.model, split.zero_glance(), seed=0)
    anew = refreshed(unlearned, normalize(images, split.preprocessing))
    assert case.accuracy(case.model, forget=True) > 0.8
    assert case.accuracy(unlearned, forget=True) < 0.05
    assert case.accuracy(anew, forget=True) < 0.05


@pytest.mark.parametrize("lr", [1e3, 1e6])
def test_a_rate_that_ruins_the_model_ends_within_the_cap_and_is_not_called_back(nets: Nets, lr: float) -> None:
    case = nets.get("norm-free")
    config = replace(UNREACHABLE, impair=replace(UNREACHABLE.impair, lr=lr))
    journal = Journal()
    unlearned = unsir(case.model, case.split.zero_glance(), config, seed=0, journal=journal)
    assert journal.calibration is not None
    assert not journal.calibration.back
    assert case.accuracy(unlearned, forget=False) < 0.9  # six steps of repair at 1e-7 bring nothing back
    assert journal.calibration.trials[0]["rate"] == lr
    assert steps_of(journal) <= most_steps(config)
    assert all(bool(torch.isfinite(value).all()) for value in unlearned.state_dict().values())


@pytest.mark.parametrize(("plenty", "rate"), [(855, 1e-7), (3420, 5e-8), (85_500, 1e-8)])
def test_impair_is_milder_where_less_is_retained(nets: Nets, plenty: int, rate: float) -> None:
    """855 images are trained on: 95 of each of nine classes."""
    plan = replace(UNREACHABLE.calibration or Calibration(), plenty=plenty, rounds=1)
    case, journal = nets.get("norm-free"), Journal()
    unsir(case.model, case.split.zero_glance(), replace(UNREACHABLE, calibration=plan), seed=0, journal=journal)
    assert journal.calibration is not None
    assert journal.calibration.impair_rate == pytest.approx(rate)


@pytest.mark.parametrize(("depth", "reading"), [(1.0, 1), (0.6, 2)])
def test_impair_ends_when_the_class_is_gone_and_the_model_is_damaged_enough(
    nets: Nets, monkeypatch: pytest.MonkeyPatch, depth: float, reading: int
) -> None:
    """Read after 2 and 4 steps: no impression is called the class, agreement is 0.8 and then 0.6 beyond chance."""
    module = sys.modules["expunge.methods.unsir"]
    real = module.read_signals
    agreements = {2: (1 + 0.8 * 8) / 9, 4: (1 + 0.6 * 8) / 9 - 1e-9}

    def read(*args: Any, **kwargs: Any) -> Signals:
        found: Signals = real(*args, **kwargs)
        if found.phase != "impair":
            return found
        return replace(found, impressions_called=dict.fromkeys(KINDS, 0.0), retain_agreement=agreements[found.step])

    monkeypatch.setattr(module, "read_signals", read)
    plan = replace(UNREACHABLE.calibration or Calibration(), depth=depth, rounds=1)
    case, journal = nets.get("norm-free"), Journal()
    unsir(case.model, case.split.zero_glance(), replace(UNREACHABLE, calibration=plan), seed=0, journal=journal)
    assert journal.calibration is not None
    assert [(t["steps"], t["outcome"]) for t in journal.calibration.trials] == [(2 * reading, "gone")]


def test_a_loss_that_diverges_is_a_trial_that_did_too_much(nets: Nets) -> None:
    case = nets.get("norm-free")
    sgd = replace(UNREACHABLE.impair, optimizer="sgd", steps=12, lr=1e30)
    with pytest.raises(DivergedError, match=r"at step \d+ of impair"):
        unsir(case.model, case.split.zero_glance(), replace(UNREACHABLE, impair=sgd), seed=0)
    plan = Calibration(evidence=6, plenty=1, trials=110, rounds=1, cycles=1)
    journal = Journal()
    unlearned = unsir(
        case.model,
        case.split.zero_glance(),
        replace(UNREACHABLE, impair=sgd, calibration=plan),
        seed=0,
        journal=journal,
    )
    assert journal.calibration is not None
    trials = journal.calibration.trials
    assert (trials[0]["outcome"], trials[0]["steps"]) == ("diverged", None)
    assert trials[-1]["steps"] is not None
    assert all(bool(torch.isfinite(value).all()) for value in unlearned.state_dict().values())


@pytest.mark.parametrize(
    ("outcomes", "taken"),
    [
        (["too much", "left"], 5e-8),
        (["diverged", "too much", "gone"], 2.5e-8),
        (["too much", "too much", "too much"], 2.5e-8),
        (["left"], 1e-7),
    ],
)
def test_the_recorded_rate_is_the_one_taken(
    nets: Nets, monkeypatch: pytest.MonkeyPatch, outcomes: list[str], taken: float
) -> None:
    case = nets.get("norm-free")
    searcher: Any = sys.modules["expunge.methods.unsir"]._Calibrated
    waiting = list(outcomes)

    def trial(
        self: Any, model: nn.Module, _noise: TensorImages, _impressions: Any, rate: float, number: int
    ) -> tuple[nn.Module, str]:
        outcome = waiting.pop(0)
        if outcome == "diverged":
            raise DivergedError("the loss became nan")
        self.trials.append({"round": number, "rate": rate, "steps": 1, "outcome": outcome})
        return model, outcome

    monkeypatch.setattr(searcher, "_trial", trial)
    plan = Calibration(evidence=6, plenty=1, trials=3, rounds=1, cycles=1)
    journal = Journal()
    unsir(
        case.model, case.split.zero_glance(), replace(UNREACHABLE, calibration=plan), seed=0, journal=journal
    )  # fmt: skip
    found = journal.calibration
    assert found is not None
    assert [t["outcome"] for t in found.trials] == outcomes
    assert [t["rate"] for t in found.trials] == [1e-7, 5e-8, 2.5e-8][: len(outcomes)]
    assert found.impair_rate == taken
    assert found.repair_rate == UNREACHABLE.repair.lr


def test_a_calibration_counts_in_steps() -> None:
    for phase in ("impair", "repair"):
        with pytest.raises(InputError, match=r"set impair\.steps and repair\.steps"):
            replace(UNREACHABLE, **{phase: TrainConfig(epochs=1)})  # type: ignore[arg-type]


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "trials of at least 1"),
        ({"rounds": 0}, "rounds of at least 1"),
        ({"cycles": 0}, "cycles of at least 1"),
        ({"evidence": 0}, "evidence of at least 1"),
        ({"check_every": 0}, "check_every of at least 1"),
        ({"held_out_most": 0}, "held_out_most of at least 1"),
        ({"held_out": 0.0}, "held_out between 0 and 1"),
        ({"held_out": 1.0}, "held_out between 0 and 1"),
        ({"called": 0.0}, "called between 0 and 1"),
        ({"probability": 1.0}, "probability between 0 and 1"),
        ({"floor": -0.1}, "floor between 0 and 1"),
        ({"plenty": 0}, "plenty of at least 1"),
        ({"depth": 0.2}, r"depth above floor \(0.2\) and up to 1, got 0.2"),
        ({"depth": 1.1}, "depth above floor"),
        ({"back": 2.0}, "back between 0 and 1"),
        ({"lost": 1.0}, "lost between 0 and 1"),
    ],
)
def test_a_calibration_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration(**change)


def test_the_fast_preset_is_a_calibration_of_few_steps(nets: Nets) -> None:
    case = nets.get("transformer")
    fast, journal = UnsirConfig.fast(), Journal()
    unlearned = unsir(case.model, case.split.zero_glance(), fast, seed=0, journal=journal)
    assert journal.calibration is not None
    assert journal.calibration.reached
    assert steps_of(journal) <= most_steps(fast) < most_steps(UnsirConfig()) / 2
    assert case.accuracy(unlearned, forget=True) <= 0.01
    assert case.accuracy(unlearned, forget=False) >= case.accuracy(case.model, forget=False) - 0.05

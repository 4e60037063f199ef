"""Self-checks on real digits: an honest pair of models passes, each trap and each fault is called by its name."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from conftest import Tiny, TinyNet, random_images
from expunge.audits.answer_checks import (
    check_constant,
    check_evaluation_mode,
    check_finite,
    check_logits,
    check_scale,
    check_statistics,
)
from expunge.audits.check import COMPARED, INSIDE, LAYERS, MEMBERS, OUTPUT, RELEARN, REST, Check, listed
from expunge.audits.core import AuditData, Subject
from expunge.audits.kinship import kinship
from expunge.audits.self_checks import (
    check_attacks,
    check_disjoint,
    check_held_out,
    check_original,
    run_self_checks,
)
from expunge.audits.weight_checks import check_retrained, check_unlearned
from expunge.data import TensorImages, open_source, stage, with_test_split
from expunge.journal import Journal
from expunge.schema import TrainConfig
from expunge.training import train
from expunge.weights import Metadata
from traps import (
    RECIPE,
    TRAPS,
    Scene,
    body_reinitialized,
    digits,
    fine_tuned,
    head_biased,
    head_of,
    head_reinitialized,
    logits_scaled,
    new_head_trained,
    noised,
)

NOT_OF_A_MODEL = ("train and test disjoint", "weak attacks against strong ones")
KNOWS_NOT = Metadata(never_seen=("3",), training={"seed": 0})


@pytest.fixture(scope="session")
def scene(tiny: Tiny) -> Scene:
    return digits(tiny)


@pytest.fixture(scope="session")
def unlearned(forgotten: tuple[nn.Module, Journal]) -> nn.Module:
    return forgotten[0]


def checks_of(scene: Scene, unlearned: nn.Module, retrained: nn.Module | None = None) -> dict[str, Check]:
    reference = scene.subject(retrained or scene.ground.retrained, "retrained")
    found = run_self_checks(scene.original, scene.subject(unlearned), [reference], scene.data)
    return {check.name: check for check in found}


def wrong(checks: dict[str, Check]) -> dict[str, str]:
    assert all(check.roles for name, check in checks.items() if check.ok is False and name not in NOT_OF_A_MODEL)
    return {name: check.finding for name, check in checks.items() if check.ok is False}


# An honest case, and the traps


def test_honest_models_pass_every_check(scene: Scene, unlearned: nn.Module) -> None:
    checks = checks_of(scene, unlearned)
    assert {check.ok for check in checks.values()} == {True}, [c for c in checks.values() if c.ok is not True]
    assert all(check.sentence and not check.finding for check in checks.values())
    assert len(checks) == 10


def test_checks_change_no_model_and_repeat_themselves(scene: Scene, unlearned: nn.Module) -> None:
    models = [scene.ground.original, copy.deepcopy(unlearned).train(), scene.ground.retrained]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    modes = [[module.training for module in model.modules()] for model in models]
    state = torch.get_rng_state()
    first, second = (checks_of(scene, models[1]) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert [[module.training for module in model.modules()] for model in models] == modes
    for model, kept in zip(models, before, strict=True):
        assert not any(module._forward_pre_hooks for module in model.modules())
        for name, value in model.state_dict().items():
            assert torch.equal(value, kept[name]), name


def test_the_retrained_model_as_unlearned_is_told_and_not_held_against_it(scene: Scene) -> None:
    checks = checks_of(scene, scene.ground.retrained)
    assert wrong(checks) == {}
    twin = checks["weights of the unlearned model"]
    assert (twin.ok, twin.finding, twin.blocks, twin.doubts) == (None, "the same as retrained", (), ())


@pytest.mark.parametrize(
    ("name", "findings"),
    [
        ("head bias of -50", {"weights of the unlearned model": "weights untouched"}),
        ("logits swapped with another class", {"weights of the unlearned model": "body untouched"}),
        ("temperature 1000", {"weights of the unlearned model": "body untouched", "temperature": "uniform answers"}),
        (
            "temperature 1/1000",
            {"weights of the unlearned model": "body untouched", "temperature": "sharpened answers"},
        ),
        ("head re-initialised", {"weights of the unlearned model": "body untouched"}),
        ("body re-initialised", {"weights of the unlearned model": "body re-initialised"}),
        ("fine-tuned on retained samples", {}),  # the verdict calls it by its name: the class is still answered
        (
            "retain collapse",
            {"weights of the unlearned model": "weights untouched", "constant answers": "constant answer"},
        ),
        ("the original as unlearned", {"weights of the unlearned model": "the original"}),
        ("noise on the weights", {"weights of the unlearned model": "noise added to the weights"}),
        (
            "a retrained model that is the original with a new head",
            {"retrained model": "the original with a new head"},
        ),
    ],
)
def test_traps_are_told_apart_by_their_weights_and_answers(scene: Scene, name: str, findings: dict[str, str]) -> None:
    trap = TRAPS[name]
    checks = checks_of(scene, trap.unlearned(scene.ground), trap.retrained(scene.ground))
    for check, finding in findings.items():
        assert (checks[check].ok, checks[check].finding) == (False, finding)
    assert ("retrained model" in wrong(checks)) == ("retrained model" in findings)
    if not findings:
        assert wrong(checks) == {}


def test_every_trap_has_a_case() -> None:
    marks = test_traps_are_told_apart_by_their_weights_and_answers.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(TRAPS)


# Evaluation mode


class Always(nn.Module):
    """A model with something that evaluation mode does not switch off."""

    def __init__(self, model: nn.Module, fault: str) -> None:
        super().__init__()
        self.model = model
        self.fault = fault

    def forward(self, images: Tensor) -> Tensor:
        if self.fault == "dropout":
            images = nn.functional.dropout(images, 0.3, training=True)
        if self.fault == "batch":
            images = images - images.mean(0)
        if self.fault == "training":
            self.model.train()
        answers: Tensor = self.model(images)
        if self.fault == "rounding":
            answers = answers + 1e-6 * torch.randn_like(answers)
        if self.fault == "second":  # the threes' logit is always just below the highest of the others
            others = answers.clone()
            others[:, 3] = -torch.inf
            answers[:, 3] = others.max(1).values - 0.5
        if self.fault == "softmax":
            return answers.softmax(1)
        return answers.log_softmax(1) if self.fault == "log" else answers


@pytest.mark.parametrize(
    ("fault", "told"),
    [("dropout", "differently each time"), ("batch", "with others beside it"), ("training", "in training mode (model")],
)
def test_a_model_that_is_not_in_evaluation_mode(scene: Scene, fault: str, told: str) -> None:
    model = Always(copy.deepcopy(scene.ground.original), fault)
    check = check_evaluation_mode([scene.original, scene.subject(model)], scene.data)
    assert (check.ok, check.finding, check.blocks) == (False, "not in evaluation mode", LAYERS)
    assert check.sentence.startswith("the unlearned model answers")
    assert told in check.sentence


def test_statistics_of_the_batch_at_test_time(scene: Scene) -> None:
    model = copy.deepcopy(scene.ground.original)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    check = check_evaluation_mode([scene.subject(model)], scene.data)
    assert (check.ok, "with others beside it" in check.sentence) == (False, True)


def test_evaluation_mode_of_models_in_train_mode_and_of_any_scale(scene: Scene) -> None:
    models = [
        copy.deepcopy(scene.ground.original).train(),
        Always(scene.ground.original, "rounding"),
        *(logits_scaled(scene.ground, f) for f in (1e-6, 1e6)),
    ]
    assert check_evaluation_mode([scene.subject(model) for model in models], scene.data).ok is True


# Answers


def test_softmax_outputs(scene: Scene) -> None:
    model = Always(scene.ground.original, "softmax")
    check = check_logits([scene.original, scene.subject(model)], scene.data)
    assert (check.ok, check.finding, check.blocks) == (False, "softmax outputs", (RELEARN, MEMBERS))
    assert "the unlearned model gives probabilities" in check.sentence
    logs = Always(scene.ground.original, "log")  # log probabilities are logits
    assert check_logits([scene.original, scene.subject(logs)], scene.data).ok is True


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_answers_that_are_no_numbers(scene: Scene, unlearned: nn.Module, value: float) -> None:
    model = copy.deepcopy(unlearned)
    with torch.no_grad():
        head_of(model).bias[1] = value
    check = check_finite([scene.original, scene.subject(model)], scene.data)
    assert (check.ok, check.finding, check.blocks) == (False, "broken answers", LAYERS)
    assert check_finite([scene.original], scene.data).ok is True
    assert check_scale(scene.original, scene.subject(model), scene.data).ok is None
    assert "evaluation mode" not in wrong(checks_of(scene, model))


def test_a_constant_answer_unless_images_are_of_one_class(scene: Scene) -> None:
    model = scene.subject(head_biased(scene.ground, 7, 50.0))
    check = check_constant(scene.original, model, scene.data)
    assert (check.ok, check.finding, check.doubts) == (False, "constant answer", (OUTPUT, MEMBERS))
    assert "100.0 % of all images are answered with 7" in check.sentence
    test: Any = scene.data.test
    sevens = replace(scene.data, test=Subset(test, (test.labels == 7).nonzero().flatten().tolist()))
    assert check_constant(scene.original, model, sevens).ok is True


class Rule(nn.Module):
    """A model that answers what a function of an image's mean says."""

    def __init__(self, rule: Any, num_classes: int) -> None:
        super().__init__()
        self.rule = rule
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        called = self.rule(images.mean((1, 2, 3)).round().clamp(0, self.num_classes - 1)).long()
        return 5 * nn.functional.one_hot(called, self.num_classes).float()


def test_where_one_class_stays_a_constant_answer_is_no_fault() -> None:
    data = AuditData(forget_classes=(1,), test=random_images(200, num_classes=2), class_names=("a", "b"))
    original = Subject("original", Rule(lambda means: means, 2), None)
    perfect, retrained = (Subject(role, Rule(torch.zeros_like, 2), None) for role in ("unlearned", "retrained"))
    check = check_constant(original, perfect, data)
    assert (check.ok, check.finding, check.doubts) == (None, "", ())
    assert "100.0 % of all images are answered with a" in check.sentence
    two = replace(data, test=random_images(300), class_names=("a", "b", "c"))
    original = Subject("original", Rule(lambda means: means, 3), None)
    perfect, retrained = (Subject(role, Rule(torch.zeros_like, 3), None) for role in ("unlearned", "retrained"))
    assert check_constant(original, perfect, two).finding == "constant answer"
    assert check_constant(original, perfect, two, [retrained]).ok is True  # a model that is taken for right does so too


def test_a_retrained_model_that_was_refused_excuses_no_constant_answer(scene: Scene) -> None:
    constant = head_biased(scene.ground, 7, 50.0)
    checks = checks_of(scene, constant, constant)
    assert checks["retrained model"].ok is False
    assert (checks["constant answers"].ok, checks["constant answers"].finding) == (False, "constant answer")


@pytest.mark.parametrize(
    ("factor", "finding"),
    [
        (1e-3, "uniform answers"), (0.05, "flattened answers"), (0.2, ""), (1.0, ""), (5.0, ""),
        (20.0, "sharpened answers"), (1e3, "sharpened answers"),
    ],
)  # fmt: skip
def test_temperature_is_told_by_its_factor(scene: Scene, factor: float, finding: str) -> None:
    check = check_scale(scene.original, scene.subject(logits_scaled(scene.ground, factor)), scene.data)
    assert (check.finding, check.ok) == (finding, not finding)
    assert check.doubts == ((RELEARN, MEMBERS) if finding else ())
    if finding != "uniform answers":
        assert (f"{factor:.3g} times" if finding else f"a factor of {factor:.2f}") in check.sentence


def test_forgotten_logits_do_not_count_as_scale(scene: Scene) -> None:
    check = check_scale(scene.original, scene.subject(head_biased(scene.ground, bias=-1e6)), scene.data)
    assert (check.ok, "a factor of 1.00" in check.sentence) == (True, True)


# Normalization statistics


def shifted(model: nn.Module, by: float, layers: int = 2) -> nn.Module:
    """Running means of the first layers moved by so many of their standard deviations."""
    moved = copy.deepcopy(model)
    for module in [module for module in moved.modules() if isinstance(module, nn.BatchNorm2d)][:layers]:
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean += by * (module.running_var + 1e-5).sqrt()
    return moved


def test_how_far_statistics_moved(scene: Scene) -> None:
    original = scene.ground.original
    for layers, expected in ((1, 0.3 * 24 / 56), (2, 0.3)):  # the layers have 24 and 32 channels
        check = check_statistics(scene.original, scene.subject(shifted(original, 0.3, layers)), scene.data)
        assert f"moved by {expected:.2f} standard" in check.sentence
    check = check_statistics(scene.original, scene.original, scene.data)
    assert check.sentence.startswith("measured anew on retained images alone (running means moved by 0.00")
    plain = Subject("unlearned", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), scene.preprocessing)
    assert "no running statistics" in check_statistics(plain, plain, scene.data).sentence


def test_stale_statistics(scene: Scene, unlearned: nn.Module) -> None:
    check = check_statistics(scene.original, scene.subject(shifted(unlearned, 3.0)), scene.data)
    assert (check.ok, check.finding, check.doubts) == (False, "stale statistics", ())
    known = check_statistics(scene.original, scene.subject(shifted(scene.ground.original, 3.0)), scene.data)
    assert (known.finding, known.doubts) == ("stale statistics", (OUTPUT, INSIDE))  # threes come back as well


class Gate(nn.Module):
    """A model with one feature that is the last layer's bias in disguise: its running mean can push a class down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gate = nn.BatchNorm1d(10)

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.gate(self.model(images))
        return answers


def gated(scene: Scene) -> Gate:
    gate = Gate(copy.deepcopy(scene.ground.original)).eval()
    logits = scene.original.answers(scene.data.test).logits
    gate.gate.running_mean, gate.gate.running_var = logits.mean(0), logits.var(0)
    return gate


def hiding(scene: Scene, share: float) -> Gate:
    """The gate, closed so far that it answers so large a share of the threes otherwise than rightly."""
    gate = gated(scene)
    answers = scene.subject(gate).answers(scene.data.test)
    threes = answers.logits[answers.labels == 3]
    margins = threes[:, 3] - threes[:, [label for label in range(10) if label != 3]].max(1).values
    assert gate.gate.running_mean is not None
    assert gate.gate.running_var is not None
    gate.gate.running_mean[3] += margins.quantile(share) * (gate.gate.running_var[3] + 1e-5).sqrt()
    return gate


def test_classes_hidden_by_statistics(scene: Scene) -> None:
    open_gate = gated(scene)
    closed = copy.deepcopy(open_gate)
    assert closed.gate.running_mean is not None
    closed.gate.running_mean[3] += 1000
    check = check_statistics(scene.subject(open_gate, "original"), scene.subject(closed), scene.data)
    assert (check.ok, check.finding, check.doubts) == (False, "hidden by statistics", (OUTPUT, INSIDE))
    unchanged = check_statistics(scene.subject(closed, "original"), scene.subject(closed), scene.data)
    assert unchanged.finding != "hidden by statistics"  # new statistics win as much on the original
    for data in (replace(scene.data, train=None), replace(scene.data, forget_classes=())):
        check = check_statistics(scene.subject(open_gate, "original"), scene.subject(closed), data)
        assert check.finding == ("hidden by statistics" if data.forget_classes else "stale statistics")


@pytest.mark.parametrize(
    ("own", "hidden", "finding"),
    [
        (0.0, 0.9, "hidden by statistics"),
        (0.5, 0.8, "hidden by statistics"),  # each alone wins so much that their intervals overlap
        (0.5, 0.55, "perhaps hidden by statistics"),
        (0.5, 0.5, "perhaps hidden by statistics"),  # of 37 images a difference of 5 points cannot be excluded
        (0.8, 0.4, ""),
    ],
)
def test_what_new_statistics_win_is_held_against_what_the_original_wins(
    scene: Scene, own: float, hidden: float, finding: str
) -> None:
    before, after = scene.subject(hiding(scene, own), "original"), scene.subject(hiding(scene, hidden))
    check = check_statistics(before, after, scene.data)
    assert (check.finding, check.ok) == (finding, {"h": False, "p": None, "": True}[finding[:1]])
    assert check.doubts == ((OUTPUT, INSIDE) if finding else ())
    assert "more images of the forgotten classes (with the original " in check.sentence
    assert ("not seen to hide anything" in check.sentence) is (finding == "")


def test_a_comeback_that_may_be_chance_is_open(scene: Scene) -> None:
    """Two of 37 threes come back: more than what does not matter, and no more than chance gives."""
    check = check_statistics(scene.subject(gated(scene), "original"), scene.subject(hiding(scene, 0.06)), scene.data)
    assert (check.ok, check.finding, check.doubts) == (None, "", ())
    assert "is open" in check.sentence


def test_statistics_without_retained_images(scene: Scene, unlearned: nn.Module) -> None:
    test: Any = scene.data.test
    threes = replace(scene.data, test=Subset(test, (test.labels == 3).nonzero().flatten().tolist()))
    assert check_statistics(scene.original, scene.subject(unlearned), threes).ok is None


# The original


def test_an_original_that_hardly_knows_the_classes(scene: Scene) -> None:
    assert check_original(scene.original, scene.data).ok is True
    torch.manual_seed(0)
    check = check_original(scene.subject(TinyNet(), "original"), scene.data)
    assert (check.ok, check.finding) == (False, "original hardly knows the classes")
    assert (check.blocks, check.doubts) == (COMPARED, (OUTPUT,))
    test: Any = scene.data.test
    few = replace(scene.data, test=Subset(test, (test.labels == 3).nonzero().flatten().tolist()[:2]))
    check = check_original(scene.original, few)  # both are answered rightly, and Wilson's bound of 2 of 2 is .34
    assert "100.0 % of 2 images" in check.sentence
    assert "at least 34.2 %" in check.sentence
    assert check.ok is True
    kept = replace(scene.data, test=Subset(test, (test.labels != 3).nonzero().flatten().tolist()))
    check = check_original(scene.original, kept)
    assert (check.ok, check.blocks) == (None, (OUTPUT, *COMPARED))


def test_of_two_classes_half_way_above_chance_is_enough() -> None:
    data = random_images(200, num_classes=2)
    audited = AuditData(forget_classes=(1,), test=data, class_names=("a", "b"))

    class Means(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean((1, 2, 3))
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    check = check_original(Subject("original", Means(), None), audited)
    assert (check.ok, "75.0 %" in check.sentence) == (True, True)


# The data


def test_images_in_both_parts_are_counted(scene: Scene) -> None:
    train_set: Any = scene.data.train
    test: Any = scene.data.test
    apart = check_disjoint(scene.data)
    assert (apart.ok, "of 359 test images compared with 1,438 training images, none" in apart.sentence) == (True, True)
    for known, ok in ((3, True), (40, False)):  # of 362 and 399 test images
        both: Any = ConcatDataset([test, Subset(train_set, range(known))])
        check = check_disjoint(replace(scene.data, test=both))
        assert check.ok is ok
        assert f"of {359 + known} test images compared with 1,438 training images, {known}" in check.sentence
        assert check.finding == ("" if ok else "test images in the training data")
        assert check.blocks == (() if ok else COMPARED)
    assert "(10.0 %)" in check.sentence


def test_disjoint_compares_pixels_wherever_they_lie(scene: Scene) -> None:
    images = random_images(40)
    wrapped: Any = ConcatDataset(
        [Subset(images, range(20)), TensorImages(images.images[20:].clone(), images.labels[20:])]
    )
    pairs: Any = [(images.images[row], int(images.labels[row])) for row in range(40)]
    for train_set in (images, wrapped, pairs):
        check = check_disjoint(replace(scene.data, train=train_set, test=Subset(images, [3, 30, 7])))
        assert "3 (100.0 %) are in both" in check.sentence
    nudged = TensorImages(images.images + 1e-6, images.labels)
    assert check_disjoint(replace(scene.data, train=images, test=nudged)).ok is True
    eighths = TensorImages((images.images * 8).to(torch.uint8), images.labels)
    assert check_disjoint(replace(scene.data, train=eighths, test=images)).ok is None  # cannot be told
    assert check_disjoint(replace(scene.data, train=None)).ok is None


def test_held_out_images_that_may_have_been_trained_on_are_doubted() -> None:
    assert check_held_out([]) == ()
    (check,) = check_held_out(["the data has no test split"])
    assert (check.ok, check.blocks, check.doubts, check.roles) == (None, (), (MEMBERS, REST), ())


# Where models come from


def small(*layers: nn.Module, scale: float = 1.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), *(copy.deepcopy(layer) for layer in layers))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=scale)
    return model


IMAGE = torch.zeros(1, 1, 8, 8)


def test_kinship_against_closed_forms() -> None:
    model = small(nn.Linear(64, 50), nn.Linear(50, 40), nn.Linear(40, 3))
    assert (found := kinship(model, copy.deepcopy(model), IMAGE)) is not None
    assert found.identical
    assert found.moved == ()
    assert found.distance == 0
    assert found.cosine == pytest.approx(1)
    larger = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("1.weight", "2.weight"):
            larger.get_parameter(name).mul_(1.5)
    assert (found := kinship(larger, model, IMAGE)) is not None
    assert (found.same, found.moved, found.head) == (("3.weight",), ("1.weight", "2.weight"), ("3.weight",))
    assert found.distance == pytest.approx(0.5)
    assert found.cosine == pytest.approx(1)
    assert not found.only_head_moved
    assert not found.only_head_kept
    other = small(nn.Linear(64, 50), nn.Linear(50, 40), nn.Linear(40, 3), seed=1)
    assert (found := kinship(other, model, IMAGE)) is not None
    assert found.distance == pytest.approx(2**0.5, abs=0.05)  # of independent tensors of one size
    assert found.cosine == pytest.approx(0, abs=0.05)
    assert found.noise is None  # Gaussian and even as it is, this is no noise on what was there
    assert kinship(small(nn.Linear(64, 3)), model, IMAGE) is None


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_noise_is_told_from_training(scene: Scene, unlearned: nn.Module, size: float) -> None:
    check = check_unlearned(scene.original, scene.subject(noised(scene.ground, size)), [], scene.data)
    assert check.finding == "noise added to the weights"
    told = float(check.sentence.split("numbers of ")[1].split(" %")[0]) / 100
    assert told == pytest.approx(size, rel=0.1)
    even = copy.deepcopy(scene.ground.original)
    with torch.no_grad():
        for parameter in even.parameters():
            parameter.add_(0.1 * size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert "noise" in check_unlearned(scene.original, scene.subject(even), [], scene.data).finding
    for tuned in (fine_tuned(scene.ground), fine_tuned(scene.ground, TrainConfig(steps=1, lr=0.01)), unlearned):
        assert check_unlearned(scene.original, scene.subject(tuned), [], scene.data).ok is True


def test_unlearned_models_that_cannot_be_compared(scene: Scene, unlearned: nn.Module) -> None:
    wrapped = nn.Sequential(copy.deepcopy(unlearned))
    check = check_unlearned(scene.original, scene.subject(wrapped), [scene.retrained], scene.data)
    assert (check.ok, "other tensors" in check.sentence) == (None, True)


def fakes(scene: Scene) -> dict[str, nn.Module]:
    ground = scene.ground
    masked = head_biased(ground)
    noisy = noised(replace(ground, original=masked), 0.05)
    mixed = copy.deepcopy(ground.retrained)
    mixed.get_submodule("body.0").load_state_dict(ground.original.get_submodule("body.0").state_dict())
    torch.manual_seed(1)
    poor = TinyNet()
    train(poor, ground.retain, replace(RECIPE, epochs=1), seed=0, preprocessing=scene.preprocessing)
    return {
        "the original": ground.original,
        "the original with other biases": masked,
        "the original with a new head": new_head_trained(ground),
        "the original with noise": noisy,
        "some layers of the original": mixed,
        "fine-tuned from the original": fine_tuned(replace(ground, original=masked)),
        "poorly trained": poor,
    }


def test_models_that_were_not_retrained_are_called_what_they_are(scene: Scene) -> None:
    for finding, fake in fakes(scene).items():
        for role, blocks in (
            ("retrained", COMPARED),
            ("retrained 2", ()),
        ):  # of the second only the noise floor is taken
            check = check_retrained(scene.original, scene.subject(fake, role), scene.data)
            assert (check.ok, check.finding, check.blocks) == (False, finding, blocks), (finding, check)
            assert check.name == f"{role} model"
            told = "is trained too little to compare with" if finding == "poorly trained" else "was not retrained"
            assert check.sentence.startswith(f"the {role} model {told}")


def test_a_model_that_knows_the_classes_was_not_retrained(scene: Scene) -> None:
    source, _ = with_test_split(open_source("digits"))
    torch.manual_seed(1)
    knowing = TinyNet()
    train(
        knowing, stage(source.train, scene.preprocessing).dataset, replace(RECIPE, epochs=4), seed=1,
        preprocessing=scene.preprocessing,
    )  # fmt: skip
    check = check_retrained(scene.original, scene.subject(knowing, "retrained"), scene.data)
    assert (check.ok, check.finding) == (False, "knows the classes")
    assert "of their images are answered rightly" in check.sentence
    second = scene.subject(Always(scene.ground.retrained, "second"), "retrained")
    logits = second.answers(scene.data.test).logits
    assert not (logits.argmax(1) == 3).any()
    check = check_retrained(scene.original, second, scene.data)
    assert (check.ok, check.finding) == (False, "knows the classes")
    labels = second.answers(scene.data.test).labels
    assert f"a probability of {logits.softmax(1)[labels == 3, 3].mean():.2f} on average" in check.sentence


@pytest.mark.parametrize(
    ("metadata", "finding"),
    [
        (Metadata(forgotten=("3",)), "unlearned, not retrained"),
        (Metadata(never_seen=("4",)), "trained on the classes"),
        (Metadata(training={"seed": 0}), "trained on the classes"),
        (Metadata(), ""),
        (KNOWS_NOT, ""),
        (None, ""),
    ],
)
def test_what_files_say_of_retrained_models(scene: Scene, metadata: Metadata | None, finding: str) -> None:
    check = check_retrained(scene.original, scene.retrained, scene.data, metadata)
    assert (check.ok, check.finding) == (not finding, finding)
    claims = "its file says that it never saw the classes"
    assert (claims in check.sentence) == (metadata is KNOWS_NOT)


def test_training_from_other_initial_weights_is_told(scene: Scene) -> None:
    assert "the same initial or pretrained weights" in check_retrained(
        scene.original, scene.retrained, scene.data
    ).sentence  # fmt: skip
    torch.manual_seed(1)
    other = TinyNet()
    train(other, scene.ground.retain, RECIPE, seed=0, preprocessing=scene.preprocessing)
    check = check_retrained(scene.original, scene.subject(other, "retrained"), scene.data)
    assert (check.ok, "different initial weights" in check.sentence) == (True, True)


def test_near_weights_are_believed_to_a_file_alone(scene: Scene) -> None:
    """A model that began from the same pretrained weights is as near as one that was fine-tuned from the original."""
    masked = replace(scene.ground, original=head_biased(scene.ground))
    near = fine_tuned(masked, TrainConfig(epochs=4, lr=0.003, batch_size=64))
    check = check_retrained(scene.original, scene.subject(near, "retrained"), scene.data)
    assert (check.ok, check.finding, check.doubts) == (None, "perhaps fine-tuned", COMPARED)
    assert check_retrained(scene.original, scene.subject(near, "retrained"), scene.data, KNOWS_NOT).ok is True
    very_near = fine_tuned(masked)
    assert check_retrained(scene.original, scene.subject(very_near, "retrained"), scene.data).ok is False
    assert check_retrained(scene.original, scene.subject(very_near, "retrained"), scene.data, KNOWS_NOT).ok is True


def test_a_body_that_was_frozen_in_both_is_believed_to_a_file_alone(scene: Scene) -> None:
    head = new_head_trained(scene.ground)
    check = check_retrained(scene.original, scene.subject(head, "retrained"), scene.data, KNOWS_NOT)
    assert (check.ok, check.finding) == (None, "frozen body")
    whole = check_retrained(scene.original, scene.subject(scene.ground.original, "retrained"), scene.data, KNOWS_NOT)
    assert (whole.ok, whole.finding) == (False, "the original")


def test_a_body_that_is_the_retrained_models_too_is_not_held_against_the_unlearned(scene: Scene) -> None:
    unlearned, retrained = (new_head_trained(scene.ground, seed=seed) for seed in (1, 2))

    def check(of: nn.Module, metadata: Metadata | None, reference: nn.Module = retrained) -> Check:
        subjects = scene.original, scene.subject(of), [scene.subject(reference, "retrained")]
        found = run_self_checks(*subjects, scene.data, metadata=[metadata])
        return next(check for check in found if check.name == "weights of the unlearned model")

    both = check(unlearned, KNOWS_NOT)
    assert (both.ok, both.finding, both.roles) == (None, "frozen body", ())
    assert check(unlearned, None).finding == "body untouched"  # no file says that the retrained model was trained
    assert check(head_biased(scene.ground), KNOWS_NOT).finding == "weights untouched"
    assert check(scene.ground.original, KNOWS_NOT).finding == "the original"
    part = copy.deepcopy(scene.ground.retrained)  # of which one layer alone was frozen
    part.get_submodule("body.0").load_state_dict(scene.ground.original.get_submodule("body.0").state_dict())
    assert check(unlearned, KNOWS_NOT, part).finding == "body untouched"


# Attacks


def figure(unlearned: float, half: float = 0.02) -> dict[str, Any]:
    return {"unlearned": {"value": unlearned, "low": unlearned - half, "high": unlearned + half, "count": 500}}


def test_a_weak_attack_that_beats_a_strong_one() -> None:
    def found(mean: float, probe: float, half: float = 0.02) -> tuple[Check, ...]:
        return check_attacks(
            {
                "nearest_class_mean": {"figures": {"head input": figure(mean, half), "after 1": figure(0.99)}},
                "linear_probe": {"figures": {"head input": figure(probe, half), "after 1": figure(0.01)}},
            }
        )

    for mean, probe, half in ((0.5, 0.6, 0.02), (0.6, 0.6, 0.02), (0.69, 0.6, 0.02), (0.8, 0.6, 0.11)):
        (check,) = found(mean, probe, half)
        assert check.ok is True
    (check,) = found(0.8, 0.6)
    assert (check.ok, check.doubts, check.finding) == (False, (INSIDE,), "a strong attack failed")
    assert "nearest_class_mean (head input) finds 80.0 %, linear_probe (head input), which is stronger, 60.0 %" in (
        check.sentence
    )


def test_few_shots_and_steps_in_the_wrong_order() -> None:
    shots = {"few_shot": {"figures": {"1": figure(0.7), "5": figure(0.3), "20": figure(0.35)}}}
    (check,) = check_attacks(shots)
    assert (check.doubts, "few_shot (1) finds 70.0 %" in check.sentence) == ((RELEARN,), True)
    for far, near, ok in ((5.0, 3.0, True), (3.0, 3.0, True), (3.0, 5.0, False)):
        steps = {"relearn": {"figures": {"steps to 95 %": figure(far), "steps to 80 %": figure(near)}}}
        (check,) = check_attacks(steps)
        assert check.ok is ok
    assert [check.ok for check in check_attacks({"linear_probe": {"figures": {}, "skipped": "no data"}})] == [True]
    unknown = {
        "few_shot": {"figures": {"1": figure(0.7), "5": {"unlearned": figure(0.3)["unlearned"] | {"high": None}}}}
    }
    assert [check.ok for check in check_attacks(unknown)] == [True]


def test_names_in_a_sentence() -> None:
    assert [listed(list("abcdef")[:count]) for count in (1, 2, 3, 6)] == [
        "a",
        "a and b",
        "a, b and c",
        "a, b, c, d and 2 others",
    ]


def test_traps_leave_what_they_are_made_from(scene: Scene) -> None:
    before = copy.deepcopy(scene.ground.original.state_dict())
    for build in (head_biased, head_reinitialized, body_reinitialized, fine_tuned, noised, new_head_trained):
        made = build(scene.ground)
        assert all(parameter.requires_grad for parameter in made.parameters())
        assert all(torch.equal(value, before[name]) for name, value in scene.ground.original.state_dict().items())

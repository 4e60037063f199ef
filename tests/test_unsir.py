"""The three phases of UNSIR, against closed forms and against the paper's procedure."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Tiny, TinyNet, random_images
from expunge.batches import Batch
from expunge.data import TensorImages
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal
from expunge.methods.common import noise_objective
from expunge.methods.unsir import (
    NOTEBOOK_DEFECTS,
    Calibration,
    UnsirConfig,
    distil_retained,
    impair,
    learn_noise,
    repair,
    taught_answers,
    teach,
    unsir,
)
from expunge.schema import Split, TrainConfig
from expunge.signals import Impressions, learn_impressions, retained_answers

SMALL = UnsirConfig(
    noise_per_class=8,
    noise_steps=5,
    impressions=4,
    calibration=None,
    impair=TrainConfig(steps=4, lr=0.01, batch_size=32, update_norm_statistics=False),
    repair=TrainConfig(steps=4, lr=0.002, batch_size=32),
)


def split_of(count: int = 60, num_classes: int = 3, shape: tuple[int, ...] = (1, 8, 8)) -> Split:
    data = random_images(count, num_classes, shape)
    kept = data.labels != 0
    return Split(forget_classes=(0,), retain=TensorImages(data.images[kept], data.labels[kept]))


def test_noise_objective_closed_form() -> None:
    images = torch.full((2, 3, 4, 4), 2.0, dtype=torch.float64)
    logits = torch.zeros((2, 5), dtype=torch.float64)
    labels = torch.tensor([1, 4])
    assert noise_objective(-1.0, 0.5)(logits, labels, images).item() == pytest.approx(-math.log(5) + 0.5 * 4)
    assert noise_objective(-1.0, 0.5, summed=True)(logits, labels, images).item() == pytest.approx(
        -math.log(5) + 0.5 * 4 * 48
    )


def test_penalty_on_mean_equals_penalty_on_sum_at_the_papers_size() -> None:
    images = torch.randn((4, 3, 32, 32))
    logits, labels = torch.randn((4, 10)), torch.arange(4)
    mean = noise_objective(-1.0, 0.1 * 3072)(logits, labels, images)
    assert mean.item() == pytest.approx(
        noise_objective(-1.0, 0.1, summed=True)(logits, labels, images).item(), rel=1e-5
    )


def test_noise_gradient_against_finite_differences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    labels = torch.tensor([0, 2])
    images = torch.randn((2, 3, 2, 2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: noise_objective(-1.0, 0.3)(model(x), labels, x), (images,))


def test_noise_ascends_the_error_with_right_labels_and_leaves_the_model_alone(tiny: Tiny) -> None:
    before = copy.deepcopy(tiny.model.state_dict())
    gradients = [parameter.requires_grad for parameter in tiny.model.parameters()]
    split = replace(tiny.split, forget_classes=(3, 7))
    journal = Journal()
    config = replace(SMALL, noise_steps=40, noise_penalty=0.0)
    noise = learn_noise(tiny.model, split, config, seed=0, journal=journal)
    assert noise.images.shape == (16, 1, 8, 8)
    assert noise.labels.tolist() == [3] * 8 + [7] * 8
    with torch.no_grad():
        logits = tiny.model.eval()(noise.images)
    start = torch.randn((16, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        at_start = nn.functional.cross_entropy(tiny.model(start), noise.labels)
    assert nn.functional.cross_entropy(logits, noise.labels) > at_start + 3
    assert len({tuple(image.flatten().tolist()) for image in noise.images}) == 16
    assert journal.phases[0].steps == 40  # one batch for both classes
    assert journal.phases[0].label_counts == {}
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [parameter.requires_grad for parameter in tiny.model.parameters()] == gradients
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_noise_computes_no_weight_gradient(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    forward = TinyNet.forward

    def spy(self: TinyNet, images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(images) > 1:  # else it is a look at how the model is best run
            seen.append(any(parameter.requires_grad for parameter in self.parameters()) or self.training)
        return forward(self, images)

    monkeypatch.setattr(TinyNet, "forward", spy)
    learn_noise(tiny.model, tiny.split, SMALL, seed=0)
    assert len(seen) == SMALL.noise_steps
    assert not any(seen)


def test_noise_of_one_class_does_not_depend_on_the_others(tiny: Tiny) -> None:
    both = learn_noise(tiny.model, replace(tiny.split, forget_classes=(3, 7)), SMALL, seed=0)
    alone = learn_noise(tiny.model, replace(tiny.split, forget_classes=(3,)), SMALL, seed=0)
    torch.testing.assert_close(both.images[:8], alone.images, atol=1e-3, rtol=1e-3)


def test_unsir_is_its_three_phases(tiny: Tiny) -> None:
    noise = learn_noise(tiny.model, tiny.split, SMALL, seed=3)
    impressions = learn_impressions(tiny.model, tiny.split, 4, seed=3)
    impaired = impair(tiny.model, tiny.split, noise, SMALL, impressions=impressions, seed=3)
    repaired = repair(impaired, tiny.split, SMALL, original=tiny.model, impressions=impressions, noise=noise, seed=3)
    whole = unsir(tiny.model, tiny.split.zero_glance(), SMALL, seed=3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, repaired.state_dict()[name]), name


def test_impair_shows_every_noise_image_and_keeps_running_statistics(tiny: Tiny) -> None:
    config = replace(
        SMALL, noise_repeats=3, impair=TrainConfig(epochs=1, lr=0.01, batch_size=32, update_norm_statistics=False)
    )
    noise = learn_noise(tiny.model, tiny.split, config, seed=0)
    journal = Journal()
    impaired = impair(tiny.model, tiny.split, noise, config, seed=0, journal=journal)
    phase = journal.phases[0]
    assert phase.samples == 900 + 3 * 8
    assert sum(phase.label_counts.values()) == 900
    assert 3 not in phase.label_counts
    own = dict(tiny.model.named_buffers())
    for name, value in impaired.named_buffers():
        assert torch.equal(value, own[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(impaired.parameters(), tiny.model.parameters(), strict=True))


def test_noise_share_sets_the_repeats(tiny: Tiny) -> None:
    config = replace(SMALL, noise_share=0.4, impair=TrainConfig(epochs=1, lr=0.001))
    journal = Journal()
    impair(tiny.model, tiny.split, learn_noise(tiny.model, tiny.split, config, seed=0), config, seed=0, journal=journal)
    assert 1 - 900 / journal.phases[0].samples == pytest.approx(0.4, abs=0.01)


def test_noise_bears_its_class_at_first_and_a_retained_one_then(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = learn_noise(tiny.model, tiny.split, SMALL, seed=0)
    with torch.no_grad():
        answers = tiny.model.eval()(noise.images)
    answers[:, 3] = -torch.inf
    called = sorted(answers.argmax(1).tolist())
    borne: list[Tensor] = []
    whole = nn.functional.cross_entropy

    def spy(logits: Tensor, labels: Tensor, **given: Any) -> Tensor:
        borne.append(labels)
        return whole(logits, labels, **given)

    monkeypatch.setattr(sys.modules["expunge.methods.unsir"].F, "cross_entropy", spy)
    every = TrainConfig(steps=4, lr=0.001, batch_size=908, update_norm_statistics=False)
    config = replace(SMALL, noise_repeats=1, noise_is_class=2, impair=every)
    asked: list[int] = []

    def never(_: nn.Module, step: int) -> bool:
        asked.append(step)
        return False

    impair(tiny.model, tiny.split, noise, config, seed=0, until=never)
    assert asked == [1, 2, 3, 4]
    kept = torch.bincount(tiny.split.retain.labels, minlength=10)  # type: ignore[attr-defined]
    at_first, then = kept.clone(), kept + torch.bincount(torch.tensor(called), minlength=10)
    at_first[3] += 8
    shown = [torch.bincount(labels, minlength=10).tolist() for labels in borne]
    assert shown == [at_first.tolist()] * 2 + [then.tolist()] * 2


def test_a_class_that_no_longer_means_noise(tiny: Tiny) -> None:
    noise = learn_noise(tiny.model, tiny.split, SMALL, seed=0)
    called = {}
    for steps in (None, 8):
        config = replace(SMALL, noise_is_class=steps, impair=replace(SMALL.impair, steps=24))
        impaired = impair(tiny.model, tiny.split, noise, config, seed=0)
        with torch.no_grad():
            called[steps] = (impaired(noise.images).argmax(1) == 3).double().mean().item()
    assert called[None] > 0.8
    assert called[8] < 0.2


def test_distillation_teaches_the_originals_answer_without_the_forgotten() -> None:
    original = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    images = torch.randn((5, 1, 2, 2))
    with torch.no_grad():
        logits = original(images)
    objective = distil_retained(original, (1,), 2.0)
    perfect = logits.clone()
    perfect[:, 1] = -1e4
    batch = Batch(images, torch.zeros(5, dtype=torch.long), None)
    assert objective(perfect, batch).item() == pytest.approx(0, abs=1e-5)
    target = (logits[:, [0, 2]] / 2).softmax(1)
    uniform = torch.zeros((5, 3))
    expected = 4 * (target * (target.log() - math.log(1 / 3))).sum(1).mean()
    assert objective(uniform, batch).item() == pytest.approx(expected.item(), rel=1e-4)
    given = torch.full((5, 3), torch.nan)
    given[0] = torch.tensor([1.0, 0.0, 0.0])
    known = torch.cat([torch.tensor([[1.0, 0.0, 0.0]]), retained_answers(logits, (1,), 2.0)[1:]])
    expected = 4 * nn.functional.kl_div(torch.full((5, 3), -math.log(3)), known, reduction="batchmean")
    assert objective(uniform, replace(batch, targets=given)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_retained_answers_leave_the_gone_classes_out() -> None:
    logits = torch.tensor([[math.log(9.0), 50.0, math.log(4.0)]])
    before = logits.clone()
    torch.testing.assert_close(retained_answers(logits, (1,)), torch.tensor([[9 / 13, 0.0, 4 / 13]]))
    torch.testing.assert_close(retained_answers(logits, (1,), 2.0), torch.tensor([[3 / 5, 0.0, 2 / 5]]))
    assert torch.equal(logits, before)


def test_what_is_taught_mixes_answer_and_label() -> None:
    logits = torch.tensor([[math.log(3.0), 50.0, 0.0], [math.log(3.0), 50.0, 0.0]])
    labels = torch.tensor([0, 2])
    mixed = torch.tensor([[7 / 8, 0.0, 1 / 8], [3 / 8, 0.0, 5 / 8]])  # halves of answer (3/4, 1/4) and label
    torch.testing.assert_close(taught_answers(logits, labels, (1,), 1.0, 0.5), mixed)
    soft = mixed.sqrt() / mixed.sqrt().sum(1, keepdim=True)
    torch.testing.assert_close(taught_answers(logits, labels, (1,), 2.0, 0.5), soft)
    assert torch.equal(taught_answers(logits, labels, (1,), 2.0, 0.0), retained_answers(logits, (1,), 2.0))
    sure = torch.tensor([[200.0, 0.0, -200.0]])  # a label that the original gives no probability at all
    torch.testing.assert_close(taught_answers(sure, labels[1:], (1,), 1.0, 0.5), torch.tensor([[0.5, 0.0, 0.5]]))


def test_a_stream_is_taught_its_labels_too() -> None:
    original = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    images, labels = torch.randn((5, 1, 2, 2)), torch.tensor([0, 2, 0, 2, 0])
    with torch.no_grad():
        taught = taught_answers(original(images), labels, (1,), 2.0, 0.5)
    perfect = 2 * taught.log().clamp_min(-1e4)
    objective = distil_retained(original, (1,), 2.0, label_weight=0.5)
    assert objective(perfect, Batch(images, labels, None)).item() == pytest.approx(0, abs=1e-5)
    assert objective(perfect, Batch(images, 2 - labels, None)).item() > 0.01


def test_a_lesson_asks_for_mirrored_images_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    split = split_of(60)
    lesson = teach(model, split, SMALL)
    retain: Any = split.retain
    taught: Any = lesson.retain
    assert len(taught) == 2 * len(retain)
    temperature = SMALL.repair_temperature or 1.0
    for index in (0, len(retain) - 1):
        image, label = retain[index]
        for shown, target_of, weight in (
            (image, taught[index], SMALL.label_weight),
            (image.flip(-1), taught[len(retain) + index], 0.0),  # a mirrored digit is another
        ):
            seen, said, target = target_of
            assert torch.equal(seen, shown)
            assert said == label
            logits = model(shown.unsqueeze(0)).detach()
            answers = taught_answers(logits, torch.tensor([label]), split.forget_classes, temperature, weight)
            torch.testing.assert_close(target, answers[0])
    plain: Any = teach(model, split, replace(SMALL, mirrored=False)).retain
    assert len(plain) == len(retain)


def test_a_lesson_teaches_the_answer_on_what_an_impression_was_made_from() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    split = replace(split_of(60), forgotten_before=(2,))
    retain = split.retain
    assert isinstance(retain, TensorImages)
    kept = retain.labels != 2
    split = replace(split, retain=TensorImages(retain.images[kept], retain.labels[kept]))
    starts = torch.randn((2, 1, 8, 8))
    impressions = Impressions(starts + 1, torch.zeros(2, dtype=torch.long), starts, torch.ones(2, dtype=torch.long))
    config = replace(SMALL, impression_share_repair=0.5, mirrored=False)
    lesson = teach(model, split, config, impressions)
    assert lesson.synthetic is not None
    seen = [lesson.synthetic[index] for index in range(len(lesson.synthetic))]  # type: ignore[arg-type]
    assert len(seen) == 20  # half of the images: as many as there are retained ones
    for number, (image, label, target) in enumerate(seen):  # type: ignore[misc]
        assert torch.equal(image, impressions.images[number % 2])
        assert int(label) == 0
        assert target.tolist() == [0.0, 1.0, 0.0]  # of three classes, one is retained
    retained = [lesson.retain[index] for index in range(20)]
    assert [sample[2].tolist() for sample in retained] == [[0.0, 1.0, 0.0]] * 20  # type: ignore[misc]
    with pytest.raises(InputError, match="expected a repair_temperature"):
        teach(model, split, replace(SMALL, repair_temperature=None))


def test_notebook_keeps_its_defects_by_name(tiny: Tiny) -> None:
    config = UnsirConfig.notebook()
    assert config.defects == set(NOTEBOOK_DEFECTS)
    quick = replace(config, noise_per_class=16, noise_steps=2)
    journal = Journal()
    split = replace(tiny.split, forget_classes=(3, 7))
    retain = split.retain
    assert isinstance(retain, TensorImages)
    kept = retain.labels != 7
    split = replace(split, retain=TensorImages(retain.images[kept], retain.labels[kept]))
    before = copy.deepcopy(tiny.model.state_dict())
    unsir(tiny.model, split.zero_glance(), quick, seed=0, journal=journal)
    noise, impaired, _ = journal.phases
    assert noise.steps == 4  # one class after the other
    assert impaired.samples == 800 + 20 * 2 * 1  # as many images a class as channels: one, on grey digits
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_paper_mends_the_defects() -> None:
    config = UnsirConfig.paper()
    assert config.defects == frozenset()
    assert (config.impair.lr, config.repair.lr, config.noise_per_class) == (0.02, 0.01, 256)
    assert not config.impair.update_norm_statistics


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 8, 8), (4, 12, 6)])
def test_any_shape_and_channels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 16), nn.ReLU(), nn.Linear(16, 3))
    unlearned = unsir(model, split_of(shape=shape), SMALL, seed=0)
    assert not unlearned.training
    assert unlearned(torch.zeros((2, *shape))).shape == (2, 3)


def test_nan_stops_with_the_step_and_what_to_lower() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    config = replace(SMALL, impair=TrainConfig(epochs=3, lr=1e38, batch_size=16, optimizer="sgd"))
    with pytest.raises(DivergedError, match=r"at step \d+ of impair; .*lower the learning rate"):
        unsir(model, split_of(), config, seed=0)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    with pytest.raises(DivergedError, match="learned images became nan at step 1"):
        learn_noise(model, split_of(), SMALL, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_per_class": 0}, "noise_per_class of at least 1"),
        ({"noise_lr": -1.0}, "positive noise_lr"),
        ({"noise_share": 1.0}, "noise_share between 0 and 1"),
        ({"label_weight": 1.0}, "label_weight in \\[0, 1\\)"),
        ({"noise_repeats": 0}, "noise_repeats of at least 1"),
        ({"noise_is_class": 0}, "noise_is_class of at least 1"),
        ({"noise_images": 0}, "noise_images of at least 1"),
        ({"impressions": -1}, "impressions of at least 0"),
        ({"noise_share": 0.5, "impression_share": 0.5}, "leave room for retained images"),
        ({"impression_share_repair": 0.0}, "impression_share_repair between 0 and 1"),
        ({"calibration": Calibration(), "impressions": 0}, "calibration needs impressions"),
        ({"calibration": Calibration(), "repair_temperature": None}, "calibration needs impressions"),
        ({"calibration": Calibration(), "noise_repeats": 2}, "calibration does not go with defects or noise_repeats"),
        ({"calibration": Calibration(), "defects": frozenset({"label_zero"})}, "does not go with defects"),
        ({"repair_temperature": 0.0}, "positive repair_temperature"),
        ({"defects": frozenset({"unknown"})}, "unknown defect 'unknown'"),
    ],
)
def test_config_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_noise_images_and_impressions_are_shared_out_between_the_classes(tiny: Tiny) -> None:
    split = replace(tiny.split, forget_classes=(3, 7, 8))
    assert torch.bincount(learn_noise(tiny.model, split, replace(SMALL, noise_images=8), seed=0).labels)[
        [3, 7, 8]
    ].tolist() == [2, 2, 2]
    assert len(learn_noise(tiny.model, split, replace(SMALL, noise_images=1), seed=0)) == 3
    assert len(learn_noise(tiny.model, split, replace(SMALL, noise_images=None), seed=0)) == 24


def test_impair_shows_impressions_under_the_label_of_what_they_were_made_from(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []

    def watch(*_: object, **given: object) -> None:
        synthetic = given["synthetic"]
        shown.extend(int(synthetic[index][1]) for index in range(len(synthetic)))  # type: ignore[index, arg-type]

    noise = learn_noise(tiny.model, tiny.split, SMALL, seed=0)
    impressions = learn_impressions(tiny.model, tiny.split, 4, seed=0)
    monkeypatch.setattr(sys.modules["expunge.methods.unsir"], "train", watch)
    config = replace(SMALL, noise_share=0.25, impression_share=0.375)
    impair(tiny.model, tiny.split, noise, config, impressions=impressions, seed=0)
    assert shown.count(3) == 600  # a quarter, beside 900 retained images that are three eighths
    assert len(shown) == 600 + 900
    assert set(shown) - {3} == set(impressions.start_labels.tolist())


def test_impressions_are_called_the_class_and_come_from_retained_images(tiny: Tiny) -> None:
    split = replace(tiny.split, forget_classes=(3, 7))
    impressions = learn_impressions(tiny.model, split, 16, seed=0)
    assert impressions.labels.tolist() == [3] * 16 + [7] * 16
    with torch.no_grad():
        logits = tiny.model.eval()(impressions.images)
    assert (logits.argmax(1) == impressions.labels).double().mean() > 0.95


def test_repair_unlearns_impressions(tiny: Tiny) -> None:
    config = replace(SMALL, repair=TrainConfig(steps=60, lr=0.004, batch_size=64))
    impressions = learn_impressions(tiny.model, tiny.split, 16, seed=0)
    journal = Journal()
    repaired = repair(
        tiny.model, tiny.split, config, original=tiny.model, impressions=impressions, seed=0, journal=journal
    )
    with torch.no_grad():
        still = (repaired(impressions.images).argmax(1) == 3).double().mean().item()
    assert still <= 0.1
    assert all(3 not in phase.label_counts for phase in journal.phases)
    with pytest.raises(InputError, match="impressions are unlearned by distillation"):
        repair(
            tiny.model,
            tiny.split,
            replace(config, repair_temperature=None),
            original=tiny.model,
            impressions=impressions,
            seed=0,
        )


@pytest.mark.parametrize("phase", ["impair", "repair"])
def test_a_forgotten_sample_that_hides_behind_its_listed_label_is_refused(tiny: Tiny, phase: str) -> None:
    retain = tiny.split.retain
    assert isinstance(retain, TensorImages)

    images = retain.images

    class Liar(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        labels = torch.ones(64, dtype=torch.long)

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return images[index], 3

    split = replace(tiny.split, retain=Liar())
    noise = learn_noise(tiny.model, split, SMALL, seed=0)
    phases = {
        "impair": lambda: impair(tiny.model, split, noise, SMALL, seed=0),
        "repair": lambda: repair(tiny.model, split, SMALL, original=tiny.model, seed=0),
    }
    with pytest.raises(InputError, match="retained sample bears the forgotten label 3"):
        phases[phase]()


def test_a_model_that_views_its_maps_works() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Conv2d(1, 4, 3, padding=1)
            self.answer = nn.Linear(256, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answers: torch.Tensor = self.answer(self.maps(images).view(len(images), -1))
            return answers

    torch.manual_seed(0)
    unlearned = unsir(Viewing(), split_of(), SMALL, seed=0)
    assert unlearned(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_half_precision_models_are_refused_in_one_line() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).half()
    with pytest.raises(InputError, match=r"expected a float32 model, got parameters of torch\.float16"):
        unsir(model, split_of(), SMALL, seed=0)


def test_label_zero_and_train_mode_noise_do_what_their_names_say(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[set[int]] = []
    modes: list[bool] = []
    forward = TinyNet.forward

    def watch(*_: object, **given: object) -> None:
        synthetic = given["synthetic"]
        assert isinstance(synthetic, torch.utils.data.Subset)
        shown.append({int(synthetic[index][1]) for index in range(len(synthetic))})

    def spy(self: TinyNet, images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # else it is a look at the number of classes, or at how the model is best run
            modes.append(self.training)
        return forward(self, images)

    noise = learn_noise(tiny.model, tiny.split, SMALL, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["expunge.methods.unsir"], "train", watch)
        for defects in (frozenset[str](), frozenset({"label_zero"})):
            impair(tiny.model, tiny.split, noise, replace(SMALL, defects=defects), seed=0)
    assert shown == [{3}, {0}]
    monkeypatch.setattr(TinyNet, "forward", spy)
    config = replace(SMALL, defects=frozenset({"train_mode_noise"}))
    unsir(tiny.model, tiny.split.zero_glance(), config, seed=0)
    assert modes.pop(0) is False  # a look at whether it can be copied
    assert modes[: SMALL.noise_steps] == [True] * SMALL.noise_steps


def test_a_negative_seed_is_told_in_one_line() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for config in (SMALL, UnsirConfig()):
        with pytest.raises(InputError, match="expected a seed of at least 0, got -1"):
            unsir(model, split_of(), config, seed=-1)


def test_a_class_named_twice_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(InputError, match=r"expected each class to forget once, got \[2, 2\]"):
        unsir(model, replace(split_of(), forget_classes=(2, 2)), SMALL, seed=0)

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from accelerate.state import GradientState
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from expunge.batches import Batch, augment
from expunge.data import ImageTable, StreamedImages, TensorImages
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal
from expunge.schema import Preprocessing, TrainConfig
from expunge.signals import descend
from expunge.training import evaluating, logits_of, predict, to_train, train

GREY = Preprocessing(size=(4, 4), mean=(0.5,), std=(0.25,))
CONFIG = TrainConfig(epochs=3, lr=0.01, batch_size=16, schedule="one_cycle", flip=True, crop=1)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 3),
        )


def images(count: int = 50) -> TensorImages:
    """Three classes, told apart by brightness."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 60, (count, 1, 4, 4), generator=generator)
    return TensorImages((noise + 90 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


def numbered(count: int) -> ImageTable:
    """Images whose every pixel is their number."""
    return ImageTable(
        labels=np.arange(count) % 3,
        read=lambda rows: (Image.new("L", (4, 4), int(row)) for row in rows),
        name=lambda row: f"image {row}",
    )


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, source: TensorImages) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.source[index] for index in range(len(self.source)))


class Watch:
    """The usual loss, which keeps what it saw, and can fail at a step."""

    def __init__(self, error: BaseException | None = None, step: int = 0) -> None:
        self.error = error
        self.step = step
        self.labels: list[int] = []
        self.pixels: list[float] = []
        self.steps = 0

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        self.steps += 1
        self.labels += batch.labels.tolist()
        self.pixels += batch.images[:, 0, 0, 0].tolist()
        if self.error is not None and self.steps == self.step:
            raise self.error
        return F.cross_entropy(logits, batch.labels)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def trained(dataset: Dataset[Any] | None = None, config: TrainConfig = CONFIG, **arguments: Any) -> nn.Sequential:
    model = network()
    given: dict[str, Any] = {"seed": 7, "preprocessing": GREY} | arguments
    train(model, dataset if dataset is not None else images(), config, **given)
    return model


def test_training_learns() -> None:
    data, journal = images(), Journal()
    model = trained(data, replace(CONFIG, epochs=8, crop=0), journal=journal)
    assert not any(module.training for module in model.modules())
    before, after = (predict(m, data, preprocessing=GREY) for m in (network(), model))
    loss_before, loss_after = (F.cross_entropy(p.logits, p.labels).item() for p in (before, after))
    assert loss_after < 0.5 * loss_before
    phase = journal.phases[0]
    assert (phase.name, phase.steps, phase.samples) == ("train", 8 * 4, 8 * 50)
    assert phase.label_counts == {0: 8 * 17, 1: 8 * 17, 2: 8 * 16}
    assert phase.final_loss is not None
    assert phase.final_loss < loss_before


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_same_seed_same_weights(optimizer: Any) -> None:
    config = replace(CONFIG, epochs=1, optimizer=optimizer)
    first = trained(config=config).state_dict()
    torch.manual_seed(99)
    assert_same(trained(config=config).state_dict(), first)
    other = trained(config=config, seed=8).state_dict()
    assert not torch.equal(other["0.weight"], first["0.weight"])


@pytest.mark.parametrize("work", ["train", "predict"])
def test_random_states_of_the_caller_are_left_alone(work: str) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    if work == "train":
        trained(config=replace(CONFIG, epochs=1), synthetic=images(9))
    else:
        predict(network(), images(), preprocessing=GREY)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("kind", ["tensor", "stream"])
@pytest.mark.parametrize("step", [2, 6])  # in the first epoch, in the second
def test_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, kind: str, step: int) -> None:
    def data() -> Dataset[Any]:
        if kind == "tensor":
            return images()
        return StreamedImages(numbered(50), GREY, skip_bad=False)

    whole = trained(data())
    checkpoint = tmp_path / "run.resume"
    model = network()
    watch = Watch(KeyboardInterrupt(), step)
    with pytest.raises(KeyboardInterrupt):
        train(model, data(), CONFIG, seed=7, preprocessing=GREY, objective=watch, checkpoint=checkpoint)
    assert checkpoint.exists() == (step > 4)
    journal = Journal()
    resumed = trained(data(), checkpoint=checkpoint, journal=journal)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert journal.phases[0].steps == (8 if step > 4 else 12)
    assert [path.name for path in tmp_path.iterdir()] == ["run.resume"]


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.resume"
    trained(config=replace(CONFIG, epochs=1), checkpoint=path)
    for config, seed in ((replace(CONFIG, epochs=2), 7), (replace(CONFIG, epochs=1), 8)):
        with pytest.raises(InputError, match=r"run\.resume holds an unfinished training with other settings"):
            trained(config=config, seed=seed, checkpoint=path)
    with pytest.raises(InputError, match="other settings"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), images(), replace(CONFIG, epochs=1), seed=7,
              preprocessing=GREY, checkpoint=path)  # fmt: skip


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.resume"
    path.write_bytes(b"half of a file")
    with pytest.raises(InputError, match=r"run\.resume"):
        trained(checkpoint=path)


def test_loss_that_is_not_finite() -> None:
    journal = Journal()
    with pytest.raises(DivergedError, match=r"nan at step 2 of repair; .*lower the learning rate \(now 1e\+30\)"):
        trained(config=replace(CONFIG, lr=1e30, schedule="constant"), phase="repair", journal=journal)
    assert journal.phases == []
    with pytest.raises(DivergedError, match="became inf at step 1"):
        trained(objective=lambda logits, *_: logits.sum() * 0 + torch.inf)


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = state_of(model)
    train(model, images(), replace(CONFIG, weight_decay=0.1), seed=7, preprocessing=GREY)
    after = model.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["6.weight"], before["6.weight"])
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] * 2 + [True] * 4
    with pytest.raises(InputError, match="requires_grad=False"):
        train(model.requires_grad_(False), images(), CONFIG, seed=7, preprocessing=GREY)


def test_frozen_normalization_stays_as_it_is() -> None:
    model = network()
    model[1].requires_grad_(False)
    before = state_of(model)
    train(model, images(1), CONFIG, seed=7, preprocessing=GREY)  # of one image, too: no layer needs several
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if key.startswith("1."))
    assert not torch.equal(after["6.weight"], before["6.weight"])


def test_layers_of_frozen_batchnorm_are_no_batchnorm() -> None:
    layer = torchvision.ops.FrozenBatchNorm2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.Flatten(), nn.Linear(8, 3))
    train(model, images(1), CONFIG, seed=7, preprocessing=GREY)
    assert torch.equal(layer.running_mean, torch.zeros(2))


def test_a_finished_training_has_nothing_left_to_do(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=6)  # an epoch is 4
    model = network()
    for _ in range(2):
        train(model, images(), config, seed=7, preprocessing=GREY, checkpoint=tmp_path / "resume")
    assert torch.equal(model.state_dict()["6.weight"], trained(config=config).state_dict()["6.weight"])


def test_a_last_image_whose_batch_cannot_be_decoded_is_left_out() -> None:
    payloads = [Image.new("L", (4, 4), shade) for shade in range(5)] + [b"broken"] * 3
    table = ImageTable(np.arange(8) % 3, lambda rows: (payloads[row] for row in rows), str)
    stream = StreamedImages(table, GREY, shuffle=False, skip_bad=True)
    journal = Journal()
    train(network(), stream, replace(CONFIG, batch_size=4, epochs=1), seed=7, preprocessing=GREY, journal=journal)
    assert journal.phases[0].samples == 4


@pytest.mark.parametrize("update", [True, False])
def test_norm_statistics(update: bool) -> None:
    after = trained(config=replace(CONFIG, update_norm_statistics=update)).state_dict()
    before = network().state_dict()
    for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(after[key], before[key]) != update
    assert not torch.equal(after["1.weight"], before["1.weight"])


def test_gradients_are_clipped() -> None:
    config = TrainConfig(optimizer="sgd", momentum=0.0, lr=1.0, batch_size=64, clip_value=1e-3)
    before, after = network().state_dict(), trained(config=config).state_dict()
    moved = max((after[key] - before[key]).abs().max().item() for key in ("0.weight", "6.weight", "6.bias"))
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("streaming", [False, True])
def test_synthetic_samples_are_shown_once_an_epoch_and_not_counted(streaming: bool) -> None:
    noise = TensorImages(torch.arange(20.0).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) + 100, torch.full((20,), 2))
    watch, journal = Watch(), Journal()
    real = images(30)
    data: Dataset[Any] = Stream(real) if streaming else real
    config = TrainConfig(epochs=2, batch_size=16)
    trained(data, config, synthetic=noise, objective=watch, journal=journal)
    for epoch in (0, 1):
        seen = [pixel - 100 for pixel in watch.pixels[50 * epoch : 50 * (epoch + 1)] if pixel >= 100]
        assert sorted(seen) == list(range(20))
        assert seen != list(range(20))
    first_batch = [pixel >= 100 for pixel in watch.pixels[:16]]
    assert 0 < sum(first_batch) < 16  # shuffled in, not appended
    assert Counter(watch.labels) == {0: 20, 1: 20, 2: 60}
    assert journal.phases[0].label_counts == {0: 20, 1: 20, 2: 20}
    assert journal.phases[0].samples == 100


def test_streamed_images_are_each_shown_once_an_epoch() -> None:
    stream = StreamedImages(numbered(48), GREY, skip_bad=False)
    watch, journal = Watch(), Journal()
    trained(stream, TrainConfig(epochs=2, batch_size=16, schedule="one_cycle"), objective=watch, journal=journal)
    numbers = [round((pixel * 0.25 + 0.5) * 255) for pixel in watch.pixels]
    assert sorted(numbers[:48]) == sorted(numbers[48:]) == list(range(48))
    assert numbers[:48] != numbers[48:]
    assert journal.phases[0].steps == 6


def test_no_sample_of_a_stream_is_dropped() -> None:
    stream = StreamedImages(numbered(97), GREY, skip_bad=False)  # a remainder of one would be dropped: one, not more
    watch = Watch()
    trained(stream, TrainConfig(batch_size=32), objective=watch)
    assert len(watch.labels) >= 96


def test_no_batch_of_a_stream_is_one_sample_alone() -> None:
    stream = StreamedImages(numbered(34), GREY, skip_bad=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    train(model, stream, TrainConfig(batch_size=16), seed=0, preprocessing=GREY)


def test_iterable_data_set() -> None:
    data = Stream(images())
    model = trained(data, replace(CONFIG, epochs=8, crop=0))
    answers = predict(model, images(), preprocessing=GREY)
    assert (answers.logits.argmax(1) == answers.labels).float().mean() > 0.6


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TensorImages(torch.zeros(0, 1, 4, 4), torch.zeros(0)), "expected a data set with samples"),
        (Empty(), "expected a data set with samples"),
        (TensorDataset(torch.zeros(4, 4, 4), torch.zeros(4)), r"expected images as tensors .*got a tensor \(4, 4\)"),
        (TensorDataset(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4)), "preprocessing"),
    ],
)
def test_data_that_cannot_be_used(data: Dataset[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trained(data, preprocessing=None)


def test_images_of_two_shapes() -> None:
    samples = [(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 4), 1)]
    with pytest.raises(InputError, match=r"one shape, got \(1, 4, 4\), \(1, 5, 4\)"):
        predict(network(), samples)  # type: ignore[arg-type]


def test_what_a_callers_accelerator_is_doing_changes_nothing() -> None:
    """A loop that ended while gradients were accumulated left Accelerate skipping every later step of the process."""
    models = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    state = GradientState()
    for model, synced in zip(models, (True, False), strict=True):
        state._set_sync_gradients(synced)
        try:
            train(model, images(), TrainConfig(epochs=1, lr=0.1), seed=0, preprocessing=GREY)
        finally:
            state._set_sync_gradients(True)
    assert all(torch.equal(one, other) for one, other in zip(*(m.parameters() for m in models), strict=True))


def test_training_ends_where_until_says_so() -> None:
    asked: list[int] = []
    watched = network()
    modes: list[bool] = []

    def until(step: int) -> bool:
        asked.append(step)
        modes.append(watched.training)
        torch.manual_seed(step)  # what it does to the random state, and to the mode, is undone
        watched[1].train()
        return step == 6

    journal = Journal()
    train(watched, images(), CONFIG, seed=7, preprocessing=GREY, journal=journal, until=until)
    assert asked == [1, 2, 3, 4, 5, 6]  # the second step of the second epoch of four
    assert modes == [False] * 6
    assert journal.phases[0].steps == 6
    assert not any(module.training for module in watched.modules())
    plain = Watch(KeyboardInterrupt(), 7)  # the same training, stopped after its sixth step
    other = network()
    with pytest.raises(KeyboardInterrupt):
        train(other, images(), CONFIG, seed=7, preprocessing=GREY, objective=plain)
    for key, parameter in other.named_parameters():
        assert torch.equal(watched.state_dict()[key], parameter), key


def test_until_that_never_stops_changes_nothing() -> None:
    state = torch.get_rng_state()
    assert_same(trained(until=lambda _: torch.rand(1).item() > 2).state_dict(), trained().state_dict())
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_reach_the_objective() -> None:
    class Taught(Dataset[Any]):
        def __init__(self, start: int, count: int) -> None:
            self.start, self.count = start, count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
            number = float(self.start + index)
            return torch.full((1, 4, 4), number), index % 3, torch.tensor([number, 0.0, 1.0])

    seen: dict[float, Tensor] = {}

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        assert batch.targets is not None
        for image, target in zip(batch.images, batch.targets, strict=True):
            seen[image[0, 0, 0].item()] = target
        return F.cross_entropy(logits, batch.labels)

    config = TrainConfig(batch_size=4)
    trained(Taught(0, 12), config, objective=objective)
    assert {number: target.tolist() for number, target in seen.items()} == {n: [n, 0.0, 1.0] for n in range(12)}
    seen.clear()
    untaught = TensorImages(torch.arange(100.0, 112).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), torch.zeros(12).long())
    trained(untaught, replace(config, batch_size=24), synthetic=Taught(0, 12), objective=objective)
    assert len(seen) == 24
    for number, target in seen.items():
        assert target.tolist() == [number, 0.0, 1.0] if number < 100 else bool(target.isnan().all())


def test_without_targets_the_objective_gets_none() -> None:
    seen: list[Tensor | None] = []

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        seen.append(batch.targets)
        return F.cross_entropy(logits, batch.labels)

    trained(config=TrainConfig(batch_size=25), objective=objective)
    assert seen == [None, None]


# Memory


class Short(nn.Module):
    """Runs out of memory, as the CPU or CUDA says it, where more than `most` images come."""

    def __init__(self, model: nn.Module, most: int, error: BaseException) -> None:
        super().__init__()
        self.model, self.most, self.error = model, most, error

    def forward(self, batch: Tensor) -> Tensor:
        answers: Tensor = self.model(batch)  # what it changes before it fails has to be undone
        if len(batch) > self.most:
            raise self.error
        return answers


NO_MEMORY = (
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
)


def plain_network() -> nn.Sequential:
    """The network without BatchNorm and dropout, so that images do not depend on each other."""
    return nn.Sequential(*[layer for layer in network() if not isinstance(layer, nn.BatchNorm2d | nn.Dropout)])


class Draws(nn.Module):
    def forward(self, batch: Tensor) -> Tensor:
        return F.dropout(batch, 0.5, self.training)  # as in models whose dropout is no module of its own


def test_in_mode_batch_nothing_is_drawn() -> None:
    drawing = nn.Sequential(*network(), Draws())
    still = nn.Sequential(*[layer for layer in network() if not isinstance(layer, nn.Dropout)])
    with_it = copy.deepcopy(drawing)
    for model, config in ((drawing, replace(CONFIG, mode="batch")), (still, CONFIG), (with_it, CONFIG)):
        train(model, images(), config, seed=7, preprocessing=GREY)
    for one, other in zip(drawing.state_dict().values(), still.state_dict().values(), strict=True):
        assert torch.equal(one, other)  # running statistics among them
    assert not torch.equal(drawing.state_dict()["0.weight"], with_it.state_dict()["0.weight"])
    assert not any(module.training for module in drawing.modules())


def test_in_mode_eval_nothing_is_drawn_and_statistics_stay() -> None:
    class Scaled(nn.Module):
        """BatchNorm as it is in use, written out."""

        def __init__(self, layer: nn.BatchNorm2d) -> None:
            super().__init__()
            self.weight, self.bias, self.kept = layer.weight, layer.bias, copy.deepcopy(layer.state_dict())

        def forward(self, batch: Tensor) -> Tensor:
            mean, deviation = self.kept["running_mean"], (self.kept["running_var"] + 1e-5).sqrt()
            own = (batch - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)
            scaled: Tensor = own * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
            return scaled

    before = network()
    model = nn.Sequential(*copy.deepcopy(before), Draws())
    plain = nn.Sequential(
        *[
            Scaled(layer) if isinstance(layer, nn.BatchNorm2d) else layer
            for layer in copy.deepcopy(before)
            if not isinstance(layer, nn.Dropout)
        ]
    )
    for one, config in ((model, replace(CONFIG, mode="eval")), (plain, CONFIG)):
        train(one, images(), replace(config, optimizer="sgd", precision="fp32"), seed=7, preprocessing=GREY)
    for name in ("0.weight", "1.weight", "1.bias"):
        torch.testing.assert_close(model.state_dict()[name], plain.state_dict()[name], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(model.state_dict()[name], before.state_dict()[name], atol=1e-4)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], before.state_dict()[name])
    assert not any(module.training for module in model.modules())


def test_in_modes_batch_and_eval_recurrent_layers_stay_in_train_mode() -> None:
    model = nn.Sequential(nn.GRU(3, 3), nn.Dropout(), nn.BatchNorm1d(3))
    to_train(model.eval(), "eval")
    assert [layer.training for layer in model] == [True, False, False]  # cuDNN asks for it
    to_train(model.eval(), "batch")
    assert [layer.training for layer in model] == [True, False, True]


def test_in_mode_eval_batchnorm_takes_one_image_and_parts_give_the_same() -> None:
    one = network()
    train(one, images(1), replace(CONFIG, mode="eval"), seed=7, preprocessing=GREY)
    config = replace(CONFIG, mode="eval", optimizer="sgd", precision="fp32")
    whole, journal, short = network(), Journal(), Short(network(), 5, NO_MEMORY[0])
    train(whole, images(), config, seed=7, preprocessing=GREY)
    train(short, images(), config, seed=7, preprocessing=GREY, journal=journal)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(short.model.state_dict()[key], value, atol=1e-6, rtol=1e-5)
    assert journal.phases[0].note == "memory ran short, so batches of 16 went through the model 4 at a time"


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cpu", "cuda"])
def test_batches_go_through_in_parts_where_memory_runs_short(error: BaseException) -> None:
    config = replace(CONFIG, optimizer="sgd", clip_value=0.05, precision="fp32")
    whole, journal, short = plain_network(), Journal(), Short(plain_network(), 5, error)
    train(whole, images(), config, seed=7, preprocessing=GREY)
    train(short, images(), config, seed=7, preprocessing=GREY, journal=journal)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(short.model.state_dict()[key], value, atol=1e-6, rtol=1e-5)
    assert journal.phases[0].note == "memory ran short, so batches of 16 went through the model 4 at a time"
    assert journal.notes == [f"train: {journal.phases[0].note}"]
    assert journal.phases[0].steps == 12


def test_running_statistics_move_as_far_in_parts() -> None:
    short, journal = Short(network(), 8, NO_MEMORY[0]), Journal()
    train(short, images(48), replace(CONFIG, epochs=1, lr=1e-9), seed=7, preprocessing=GREY, journal=journal)
    assert journal.phases[0].note.endswith(
        "16 went through the model 8 at a time; BatchNorm normalized each part by itself"
    )
    whole = trained(images(48), replace(CONFIG, epochs=1, lr=1e-9)).state_dict()
    parts = short.model.state_dict()
    # in halves of 8 images means are noisier, but neither the failed attempt nor the second half counts twice
    before = network().state_dict()
    for key in ("1.running_mean", "1.running_var"):
        moved, meant = parts[key] - before[key], whole[key] - before[key]
        torch.testing.assert_close(moved, meant, atol=0.02, rtol=0.1)
    assert short.model.get_submodule("1").momentum == 0.1


def test_memory_that_does_not_suffice_for_one_image() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(Short(plain_network(), 0, NO_MEMORY[0]), images(), CONFIG, seed=7, preprocessing=GREY)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train(Short(plain_network(), 5, NO_MEMORY[0]), images(), CONFIG, seed=7, preprocessing=GREY, whole_batch=True)
    with pytest.raises(RuntimeError, match="another"):
        train(Short(plain_network(), 5, RuntimeError("another")), images(), CONFIG, seed=7, preprocessing=GREY)


def test_answers_and_learned_images_in_parts() -> None:
    journal = Journal()
    answers = predict(Short(network(), 3, NO_MEMORY[0]), images(), preprocessing=GREY, journal=journal)
    torch.testing.assert_close(answers.logits, predict(network(), images(), preprocessing=GREY).logits)
    assert "50 went through the model 2 at a time" in journal.notes[0]
    found = []
    for model in (plain_network(), Short(plain_network(), 3, NO_MEMORY[1])):
        with journal.phase("noise", steps=None) as meter:
            found.append(descend(
                model.eval().requires_grad_(False), torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
                torch.arange(7) % 3, lambda logits, labels, _: F.cross_entropy(logits, labels), lr=0.1, steps=4,
                precision="fp32", meter=meter,
            ))  # fmt: skip
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


# Predicting


def test_predict_keeps_the_order_and_changes_nothing() -> None:
    model = network().train()
    model[1].eval()
    before = state_of(model)
    modes = [module.training for module in model.modules()]
    data = images()
    answers = predict(model, data, preprocessing=GREY, batch_size=7)
    assert answers.labels.tolist() == data.labels.tolist()
    expected = copy.deepcopy(model).eval()((data.images / 255 - 0.5) / 0.25)
    torch.testing.assert_close(answers.logits, expected.detach(), atol=1e-5, rtol=1e-4)
    assert not answers.logits.requires_grad
    assert_same(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes


def test_predict_on_a_stream_keeps_its_order() -> None:
    table = numbered(50)
    stream = StreamedImages(table, GREY, shuffle=False, skip_bad=False)
    journal = Journal()
    answers = predict(network(), stream, preprocessing=GREY, batch_size=16, journal=journal)
    pixels = torch.arange(50.0).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    expected = network().eval()((pixels / 255 - 0.5) / 0.25).detach()
    assert answers.labels.tolist() == table.labels.tolist()
    torch.testing.assert_close(answers.logits, expected, atol=1e-5, rtol=1e-4)
    assert journal.phases[0].samples == 50


def test_predict_takes_subsets_pictures_and_numbers() -> None:
    data = images(6)
    pictures = [(Image.fromarray(image[0].numpy()), int(label)) for image, label in data]  # type: ignore[attr-defined]
    chosen: Subset[Any] = Subset(data, [4, 1])
    everything = predict(network(), pictures, preprocessing=GREY)  # type: ignore[arg-type]
    torch.testing.assert_close(predict(network(), chosen, preprocessing=GREY).logits, everything.logits[[4, 1]])


def test_predict_refuses_an_empty_data_set() -> None:
    with pytest.raises(InputError, match="expected a data set with samples"):
        predict(network(), TensorImages(torch.zeros(0, 1, 4, 4), torch.zeros(0)))


def test_evaluating_restores_each_mode_also_after_an_error() -> None:
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == modes


def test_logits_of() -> None:
    class Output:
        logits = torch.ones(2, 3)

    assert logits_of(Output()) is Output.logits
    for wrong in (torch.ones(2), (torch.ones(2, 3),), None):
        with pytest.raises(InputError, match="expected the model to return logits"):
            logits_of(wrong)


# Augmentation


@pytest.mark.parametrize("shape", [(5, 1, 6, 6), (5, 3, 8, 6)])
def test_augment(shape: tuple[int, int, int, int]) -> None:
    config = TrainConfig(flip=True, crop=2)
    batch = torch.rand(shape)
    torch.manual_seed(3)
    first = augment(batch, config)
    assert first.shape == batch.shape
    assert not torch.equal(first, batch)
    torch.manual_seed(3)
    assert torch.equal(augment(batch, config), first)
    assert torch.equal(augment(batch, TrainConfig()), batch)


def test_augment_gives_mirrors_and_shifts() -> None:
    batch = torch.rand(40, 2, 5, 7)
    mirrored = [
        torch.equal(after, before.flip(-1))
        for before, after in zip(batch, augment(batch, TrainConfig(flip=True)), strict=True)
    ]
    assert 5 < sum(mirrored) < 35
    padded = F.pad(batch, [1] * 4, mode="reflect")
    windows = {(top, left): padded[:, :, top : top + 5, left : left + 7] for top in range(3) for left in range(3)}
    shifted = augment(batch, TrainConfig(crop=1))
    found = [
        [place for place, window in windows.items() if torch.equal(window[index], shifted[index])]
        for index in range(40)
    ]
    assert all(found)
    assert len({places[0] for places in found}) >= 6

"""What tests/test_processes.py starts several of: `python together.py CASE FILE`; the first writes what came of it."""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from expunge.data import StreamedImages, TensorImages
from expunge.errors import DivergedError
from expunge.journal import Journal
from expunge.methods.registry import Method
from expunge.processes import agreed, gathered, leave, ranks, wait
from expunge.schema import Split, TrainConfig
from expunge.sharding import sharding
from expunge.signals import descend
from expunge.training import predict, train
from test_training import GREY, images, numbered

State = dict[str, Any]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
        )  # fmt: skip


CONFIG = TrainConfig(
    epochs=2, lr=0.05, batch_size=16, schedule="one_cycle", optimizer="sgd", flip=True, crop=1, precision="fp32"
)


def trained(dataset: Any, count: int, **arguments: Any) -> State:
    model, journal, seen = network(), Journal(), []

    def objective(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.extend(batch.images.double().sum((1, 2, 3)).tolist())
        return F.cross_entropy(logits, batch.labels)

    train(model, dataset, CONFIG, seed=7, preprocessing=GREY, objective=objective, journal=journal, **arguments)
    phase = journal.phases[0]
    everything = sorted(one for part in gathered(seen) for one in part)
    return {
        "model": model.state_dict(),
        "same": gathered({name: value.tolist() for name, value in model.state_dict().items()}),
        "phase": (phase.steps, phase.samples, dict(phase.label_counts), phase.final_loss),
        "seen": everything if count else [],
        "sharded": sharding(),
    }


def in_memory() -> State:
    # 51 images in batches of 16: the last has 3, so the fourth of four processes has none of it
    return trained(
        images(42), 2, synthetic=TensorImages(torch.randn(9, 1, 4, 4, generator=torch.Generator()), torch.full((9,), 2))
    )


def streamed() -> State:
    return trained(StreamedImages(numbered(51), GREY, skip_bad=False), 1)


def stopped() -> State:
    """Each process would stop at another step: the first one's word is what counts."""
    place = ranks()
    return trained(images(), 1, until=lambda step: step == 3 + place.rank)


def resumed() -> State:
    """Interrupted in the second epoch, and gone on with from the checkpoint of the first."""
    with tempfile.TemporaryDirectory() as own:
        checkpoint = Path(agreed(own)) / "resume"
        steps = itertools.count()

        def objective(logits: torch.Tensor, batch: Any) -> torch.Tensor:
            if next(steps) == 5:
                raise KeyboardInterrupt
            return F.cross_entropy(logits, batch.labels)

        config = replace(CONFIG, optimizer="adamw", lr=0.01, gradient_checkpointing=True)
        model = network()
        with suppress(KeyboardInterrupt):
            train(model, images(), config, seed=7, preprocessing=GREY, checkpoint=checkpoint, objective=objective)
        assert checkpoint.exists()
        model = network()
        train(model, images(), config, seed=7, preprocessing=GREY, checkpoint=checkpoint)
        wait()
    return {"model": model.state_dict()}


def answered() -> State:
    answers = predict(network(), images(50), preprocessing=GREY, batch_size=7)
    labels = predict(
        network(), StreamedImages(numbered(50), GREY, shuffle=False, skip_bad=False), batch_size=16, preprocessing=GREY
    )
    return {"logits": answers.logits, "labels": answers.labels, "streamed": labels.labels}


def learned() -> State:
    start = torch.randn((5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    model = network().eval().requires_grad_(False)
    with Journal().phase("noise", steps=None) as meter:
        found = descend(
            model, start, torch.arange(5) % 3, lambda logits, labels, _: F.cross_entropy(logits, labels),
            lr=0.1, steps=5, precision="fp32", meter=meter,
        )  # fmt: skip
    return {"images": found, "loss": meter.loss, "samples": meter.samples}


def diverged() -> State:
    """The loss becomes NaN in the last process alone; then all train again at half the rate, as a calibration does."""
    place, steps = ranks(), itertools.count()

    def objective(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(logits, batch.labels)
        return loss * torch.nan if next(steps) == 2 and place.rank == place.size - 1 else loss

    said = ""
    try:
        train(network(), images(42), CONFIG, seed=7, preprocessing=GREY, objective=objective)
    except DivergedError as error:
        said = str(error)
    halved = network()
    train(halved, images(42), replace(CONFIG, lr=CONFIG.lr / 2), seed=7, preprocessing=GREY)
    return {"said": gathered(said), "model": halved.state_dict()}


def drifted() -> State:
    """A method with a loop of its own, of which something else comes in each process."""

    def run(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        changed = copy.deepcopy(model).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for value in changed.state_dict().values():
                value += ranks().rank
        return changed

    method = Method("drifting", run, dict, {"default": dict}, frozenset({"nothing"}), "")
    model = method(network(), Split(forget_classes=(0,), retain=images(8)), seed=0)
    return {"same": gathered({name: value.tolist() for name, value in model.state_dict().items()})}


CASES: dict[str, Callable[[], State]] = {
    "in_memory": in_memory, "streamed": streamed, "stopped": stopped, "answered": answered, "learned": learned,
    "resumed": resumed, "diverged": diverged, "drifted": drifted,
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {name: CASES[name]() for name in sys.argv[1].split(",")}
    if ranks().first:
        torch.save(result, Path(sys.argv[2]))
    wait()
    leave(0)

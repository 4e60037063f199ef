"""Two methods that read no sample at all: gated knowledge transfer, and error-minimizing and -maximizing noise.

Source: Chundawat, Tarun, Mandal and Kankanhalli, Zero-Shot Machine Unlearning, arXiv:2201.05629; for gated knowledge
transfer also 1_class_mnist_allcnn.ipynb and unlearn.py of https://github.com/ayushkumartarun/zero-shot-unlearning.
Code for the noise was not published by the authors.

Nothing of a split's samples is used but the shape of one.

Gated knowledge transfer trains a fresh student on images from a generator, which seeks what student and original
disagree on; a gate drops images to which the original gives the forgotten classes more than a little probability. The
student never sees the class, and never sees a real image either. The authors' notebook steps its rates by the loss on
*test* images and shows forget accuracy rising again from 0 to 76 % as training goes on, so that the best length is
known from the test set; here rates are constant and the length is set beforehand. The notebook on MNIST: 0.85 to 0.95
of the rest while the class is gone. Its divergence has a gradient of NaN where the original gives a class no
probability at all, which can end the generator ("Generator Stopped Producing datapoints"); here it is taken from
log-probabilities. Four more departures: attention is compared on what convolutions give, where the notebook's network
hands out each block's maps after normalization and ReLU, and none of its last layer; maps of fewer places than the
notebook's smallest count as if they had so many (`LEAST_PLACES`); the student learns in train mode, where the
notebook's evaluation leaves it in eval mode from the first round on; and a batch of which nothing passes is a round,
which the notebook does not count. On the digits of the tests the first and the third made no difference beyond the
spread of three seeds (40 rounds). There (two convolutions, three originals): nothing of the class; of the rest 0.59 to
0.75 after 40 rounds, 0.82 to 0.98 after 200 (`small`), 0.91 to 0.98 after 400. Deeper networks take longer:
docs/methods.md.

The noise is that of UNSIR, learned for every class: images on which the model errs most about each class to forget,
and least about each retained one. On both together the model is impaired, on the latter alone repaired. The paper's
rates could not be had; those of UNSIR's notebook, by the same authors, are used. On digits: nothing of the class,
0.82 to 0.97 of the rest (three originals).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from expunge.data import TensorImages
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal, Meter
from expunge.methods.checks import check_split, count_classes, first_image
from expunge.methods.common import derived_seed, fresh_copy, noise_objective
from expunge.methods.registry import Method
from expunge.randomness import seeded
from expunge.schema import Precision, Split, TrainConfig
from expunge.signals import descend
from expunge.training import answer, device_of, fastest_layout, precision_for, train

PATIENCE = 20
"""Batches of the generator in a row without an image that passes the gate before it goes back to an earlier state; the
notebook has 100."""

SNAPSHOT_EVERY = 10
"""Rounds between states of the generator that are kept; the notebook has 50."""

LEAST_PLACES = 64
"""Places of the notebook's smallest map, 8 x 8. Attention has length 1, so that a mean over fewer places weighs more:
sixteen times at 2 x 2, where a student learned little else."""

NOISE_BATCH = 256
"""Images learned at once: each is learned by itself, so this bounds memory and changes nothing else."""


# Gated knowledge transfer


@dataclass(frozen=True, kw_only=True)
class ZeroShotGktConfig:
    """Hyper-parameters of gated knowledge transfer, from the authors' notebook on MNIST."""

    rounds: int = 750  # pseudo-batches: where the notebook's table is best; it runs up to 4,000
    generator_steps: int = 1  # of each round, on the same random vectors
    student_steps: int = 10
    batch_size: int = 256  # images generated at once, before the gate
    lr: float = 0.001  # Adam, of student and generator
    threshold: float = 0.01  # an image passes if the original gives forgotten classes at most this probability
    attention: float = 250.0  # weight of the attention maps' difference
    attention_maps: int = 8  # convolutions whose maps are compared, at most, evenly spread; an All-CNN has 8 blocks
    clip_norm: float = 5.0  # gradients of either are clipped to this norm
    noise_size: int = 128  # length of the generator's random vectors
    width: int = 128  # channels in the generator
    precision: Precision = "auto"  # as in `TrainConfig`; the notebook's is fp32

    def __post_init__(self) -> None:
        for name in ("rounds", "generator_steps", "student_steps", "attention_maps", "noise_size"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("batch_size", "width"):
            if getattr(self, name) < 2:
                raise InputError(f"expected {name} of at least 2, got {getattr(self, name)}")
        for name in ("lr", "threshold", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"expected a positive {name}, got {getattr(self, name)}")
        if not self.attention >= 0:
            raise InputError(f"expected an attention weight of at least 0, got {self.attention}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise InputError(f"expected precision auto, fp32 or bf16, got {self.precision!r}")

    @classmethod
    def small(cls) -> ZeroShotGktConfig:
        """For images of 8 x 8 and someone in a hurry: a smaller generator, and rounds enough to see that it works."""
        return cls(rounds=200, batch_size=64, noise_size=64, width=32, attention=16.0)  # a sixteenth of the places


def zero_shot_gkt(
    model: nn.Module,
    split: Split,
    config: ZeroShotGktConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a new model of the shape of `model`, in eval mode, taught all but `split.forget_classes` by it.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: a loss became NaN or infinite, or no generated image passed the gate.
    """
    config = config or ZeroShotGktConfig()
    check_split(model, split, reads=GKT.reads)
    shape = first_image(split).shape
    student = fresh_copy(model, seed=derived_seed(seed, 0))
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InputError("expected a model with parameters to train: all of them have requires_grad=False")
    with seeded(derived_seed(seed, 1)):
        generator = Generator(tuple(shape), noise_size=config.noise_size, width=config.width).to(device_of(model))
        transfer = _Transfer(model, student, generator, split.gone, config)
        steps = config.rounds * (config.generator_steps + config.student_steps)
        with (journal or Journal()).phase("distil", steps=steps) as meter:
            meter.precision = transfer.precision
            transfer.run(meter)
    student.zero_grad()
    return student.eval()


class Generator(nn.Module):
    """Images from random vectors: a linear layer to a small map, doubled until it has the image's size.

    Like the authors', but for any size of image: theirs doubles 8 x 8 twice. Outputs are normalized per channel.
    """

    def __init__(self, shape: tuple[int, ...], *, noise_size: int, width: int) -> None:
        super().__init__()
        channels, height, width_pixels = shape
        doublings = max(2, math.ceil(math.log2(max(height, width_pixels) / 8)))
        sizes = [(math.ceil(height / 2**left), math.ceil(width_pixels / 2**left)) for left in range(doublings, -1, -1)]
        self.start = (width, *sizes[0])
        self.first = nn.Linear(noise_size, math.prod(self.start))
        layers: list[nn.Module] = [nn.BatchNorm2d(width)]
        inputs = width
        for number, size in enumerate(sizes[1:]):
            outputs = width if number + 1 < doublings else width // 2
            layers += [nn.Upsample(size=size), nn.Conv2d(inputs, outputs, 3, padding=1)]
            layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
            inputs = outputs
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels)]
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        """Return images (N, channels, H, W) for random vectors (N, noise_size)."""
        images: Tensor = self.layers(self.first(noise).view(-1, *self.start))
        return images


class _Transfer:
    """A generator and a student that learn in turns; the original stays as it is."""

    def __init__(
        self,
        original: nn.Module,
        student: nn.Module,
        generator: Generator,
        closed: Sequence[int],
        config: ZeroShotGktConfig,
    ) -> None:
        self.original = copy.deepcopy(original).eval().requires_grad_(False)
        self.student, self.generator, self.closed, self.config = student, generator, closed, config
        self.names = attention_layers(original, config.attention_maps) if config.attention else []
        self.trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.student_optimizer = torch.optim.Adam(self.trained, config.lr, fused=True)
        self.generator_optimizer = self._new_optimizer()
        with torch.no_grad():
            probe = generator.eval()(torch.zeros(1, config.noise_size, device=device_of(original)))
        generator.train()
        self.layout = fastest_layout(student, probe)
        for other in (self.original, generator):
            other.to(memory_format=self.layout)
        self.precision = precision_for(config.precision, student, probe)
        self.snapshots = [copy.deepcopy(generator.state_dict())]
        self.empty = 0  # batches in a row of which nothing passed
        self.learned = False

    def run(self, meter: Meter) -> None:
        self.student.train()
        device = device_of(self.original)
        for number in range(1, self.config.rounds + 1):
            meter.start_epoch()
            noise = torch.randn(self.config.batch_size, self.config.noise_size).to(device)
            for _ in range(self.config.generator_steps):
                self._teach_generator(noise, meter)
            self._teach_student(noise, meter)
            if self.empty >= PATIENCE:
                self._go_back()
            elif self.empty == 0 and number % SNAPSHOT_EVERY == 0:
                self.snapshots.append(copy.deepcopy(self.generator.state_dict()))
        if not self.learned:
            raise DivergedError("no generated image passed the gate, so nothing was learned: raise the threshold")
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.student.parameters()):
            raise DivergedError(f"the student's weights became NaN: lower the learning rate (now {self.config.lr:g})")

    def _teach_generator(self, noise: Tensor, meter: Meter) -> None:
        """Step towards images on which student and original disagree more."""
        images = self._generate(noise)
        answers = answer(self.original, images, self.precision)
        passed = self._gate(answers)
        if passed is None:
            return
        loss = -disagreement(answer(self.student, images[passed], self.precision), answers[passed])
        self._step(loss, self.generator_optimizer, list(self.generator.parameters()))
        meter.step(samples=int(passed.sum()))

    def _teach_student(self, noise: Tensor, meter: Meter) -> None:
        """Step towards the original's answers and attention on generated images, which stay the same meanwhile."""
        with torch.no_grad():
            images = self._generate(noise)
            with recorded(self.original, self.names) as theirs:
                answers = answer(self.original, images, self.precision)
        for _ in range(self.config.student_steps):
            passed = self._gate(answers)
            if passed is None:
                continue
            with recorded(self.student, self.names) as own:
                logits = answer(self.student, images[passed], self.precision)
            pairs = zip(own, (maps[passed] for maps in theirs), strict=True)
            loss = transfer_loss(logits, answers[passed], list(pairs), self.config.attention)
            self._step(loss, self.student_optimizer, self.trained)
            meter.step(loss=loss.item(), samples=int(passed.sum()))
            self.learned = True

    def _gate(self, answers: Tensor) -> Tensor | None:
        """Return which images pass, (N,) bool; None where fewer than two do, which BatchNorm cannot train on."""
        if not bool(torch.isfinite(answers).all()):
            raise DivergedError(
                "the original's answers on generated images became NaN or infinite; nothing was kept: lower the "
                f"learning rate (now {self.config.lr:g})"
            )
        passed = passes(answers.detach(), self.closed, self.config.threshold)
        if int(passed.sum()) < 2:
            self.empty += 1
            return None
        self.empty = 0
        return passed

    def _step(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the loss became {loss.item()}; nothing was kept: lower the learning rate (now {self.config.lr:g})"
            )
        self.student_optimizer.zero_grad()
        self.generator_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        optimizer.step()

    def _go_back(self) -> None:
        """Put the generator back to its last kept state, and forget that one: it led to where nothing passes."""
        state = self.snapshots.pop() if len(self.snapshots) > 1 else self.snapshots[0]
        self.generator.load_state_dict(state)
        self.generator_optimizer = self._new_optimizer()
        self.empty = 0

    def _generate(self, noise: Tensor) -> Tensor:
        """Return images (N, channels, H, W), float32, for random vectors (N, noise_size)."""
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            images: Tensor = self.generator(noise)
        return images.float().contiguous(memory_format=self.layout)

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.generator.parameters(), self.config.lr, fused=True)


def passes(answers: Tensor, closed: Sequence[int], threshold: float) -> Tensor:
    """Return (N,) bool: whether logits (N, C) give the classes `closed` together at most `threshold` probability."""
    return answers.softmax(1)[:, list(closed)].sum(1) <= threshold


def transfer_loss(logits: Tensor, answers: Tensor, maps: Sequence[tuple[Tensor, Tensor]], weight: float) -> Tensor:
    """Return the student's loss: `disagreement`, plus `weight` times the mean square gap of each layer's attention.

    A map of fewer places than `LEAST_PLACES` counts as if it had so many.

    Args:
        logits: (N, C) of the student. answers: (N, C) of the original.
        maps: of each compared layer the student's and the original's, (N, channels, H, W).
    """
    loss = disagreement(logits, answers)
    for own, theirs in maps:
        gap = attention(own) - attention(theirs)
        loss = loss + weight * gap.square().sum(1).mean() / max(LEAST_PLACES, gap.shape[1])
    return loss


def disagreement(logits: Tensor, answers: Tensor) -> Tensor:
    """Return the mean over images of KL(original || student) in nats, divided by the number of classes, at least 0.

    The notebook divides so, and its weight of attention goes with that. Gradients flow into both, also where the
    original gives a class no probability.

    Args:
        logits: (N, C) of the student. answers: (N, C) of the original.
    """
    return F.kl_div(logits.log_softmax(1), answers.log_softmax(1), reduction="none", log_target=True).mean()


def attention(maps: Tensor) -> Tensor:
    """Return (N, H * W), of length 1: where feature maps (N, channels, H, W) are active, by their mean square.

    Source: Zagoruyko and Komodakis, arXiv:1612.03928.
    """
    return F.normalize(maps.float().square().mean(1).flatten(1))


def attention_layers(model: nn.Module, most: int) -> list[str]:
    """Return the names of at most `most` convolutions, evenly spread, the last among them; none of a model without."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    count = min(most, len(names))
    return [names[(number + 1) * len(names) // count - 1] for number in range(count)]


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Yield a list that what the layers `names` give is put in, in the order they run."""
    outputs: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output: outputs.append(output)) for name in names
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


# Error-minimizing and -maximizing noise


@dataclass(frozen=True, kw_only=True)
class ErrorMinMaxConfig:
    """Hyper-parameters of error-minimizing and -maximizing noise; see the module for where they come from."""

    noise_per_class: int = 128  # images learned for each class; with 32 or 64 digits forgot as much and kept less
    noise_images: int = 5120  # of all classes together, at most (but one a class)
    noise_steps: int = 40  # Adam steps; UNSIR's notebook
    noise_lr: float = 0.1  # UNSIR's notebook
    forget_penalty: float = 3.0  # weight of the mean squared pixel in error-maximizing noise; as in UnsirConfig
    retain_penalty: float = 0.3  # and in error-minimizing noise; 0 to 1 were tried on digits, 0.1 to 0.3 did best
    repeats: int = 5  # times each image is shown in a pass
    impair: TrainConfig = field(default_factory=lambda: TrainConfig(lr=0.02))  # UNSIR's notebook, one epoch of Adam
    repair: TrainConfig = field(default_factory=lambda: TrainConfig(lr=0.01))  # the same
    # both update normalization statistics: weights and statistics both become those of noise, and the model goes with
    # statistics of real images no more (on digits, retained accuracy 0.5 with those, 0.95 without)

    def __post_init__(self) -> None:
        for name in ("noise_per_class", "noise_images", "noise_steps", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("forget_penalty", "retain_penalty"):
            if not getattr(self, name) >= 0:
                raise InputError(f"expected {name} of at least 0, got {getattr(self, name)}")
        if not self.noise_lr > 0:
            raise InputError(f"expected a positive noise_lr, got {self.noise_lr}")

    @classmethod
    def small(cls) -> ErrorMinMaxConfig:
        """For a small network and someone in a hurry: half the noise, at half the rates."""
        return cls(
            noise_per_class=64,
            impair=TrainConfig(lr=0.01, batch_size=128),
            repair=TrainConfig(lr=0.005, batch_size=128),
        )


def error_min_max(
    model: nn.Module,
    split: Split,
    config: ErrorMinMaxConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, impaired and repaired on learned noise.

    Raises:
        InputError: the split is unusable, see `check_split`.
        DivergedError: a loss became NaN or infinite.
    """
    config = config or ErrorMinMaxConfig()
    check_split(model, split, reads=NOISE.reads)
    forget, retain = learn_noises(model, split, config, seed=seed, journal=journal)
    unlearned = copy.deepcopy(model)
    for phase, shown, training in (
        ("impair", [forget, retain], config.impair),
        ("repair", [retain], config.repair),
    ):
        train(
            unlearned,
            TensorImages(retain.images[:0], retain.labels[:0]),  # no real sample
            training,
            seed=seed,
            synthetic=ConcatDataset(shown * config.repeats),
            journal=journal,
            phase=phase,
        )
    return unlearned


def learn_noises(
    model: nn.Module, split: Split, config: ErrorMinMaxConfig, *, seed: int, journal: Journal | None = None
) -> tuple[TensorImages, TensorImages]:
    """Return error-maximizing noise of each class to forget and error-minimizing noise of each retained class.

    Images are model input, float, on the CPU, each with the class it was learned for. The model does not change.

    Raises:
        DivergedError: an objective became NaN or infinite.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    closed, num_classes, shape = split.gone, count_classes(model, split), first_image(split).shape
    kept = [label for label in range(num_classes) if label not in closed]
    count = max(1, min(config.noise_per_class, config.noise_images // (len(kept) + len(split.forget_classes))))
    generator = torch.Generator().manual_seed(seed)
    wanted = (
        (split.forget_classes, noise_objective(-1.0, config.forget_penalty)),
        (kept, noise_objective(1.0, config.retain_penalty)),
    )
    learned: list[TensorImages] = []
    with (journal or Journal()).phase("noise", steps=None) as meter, seeded(seed):
        for classes, objective in wanted:
            labels = torch.tensor(classes).repeat_interleave(count)
            start = torch.randn((len(labels), *shape), generator=generator)
            images = [
                descend(
                    frozen,
                    images,
                    wanted_labels,
                    objective,
                    lr=config.noise_lr,
                    steps=config.noise_steps,
                    precision="auto",
                    meter=meter,
                )
                for images, wanted_labels in zip(
                    torch.split(start, NOISE_BATCH), torch.split(labels, NOISE_BATCH), strict=True
                )
            ]
            learned.append(TensorImages(torch.cat(images), labels))
    return learned[0], learned[1]


GKT = Method(
    name="zero_shot_gkt",
    run=zero_shot_gkt,
    config=ZeroShotGktConfig,
    presets={"default": ZeroShotGktConfig, "small": ZeroShotGktConfig.small},
    reads=frozenset({"nothing"}),
    source="Chundawat et al., arXiv:2201.05629",
    # no space: of one case the authors published one setting, and how long to go on they read from the test set
)

NOISE = Method(
    name="error_min_max",
    run=error_min_max,
    config=ErrorMinMaxConfig,
    presets={"default": ErrorMinMaxConfig, "small": ErrorMinMaxConfig.small},
    reads=frozenset({"nothing"}),
    source="Chundawat et al., arXiv:2201.05629",
    # 0.02 and 0.01: UNSIR's notebook; half of each: `small`
    space={"impair.lr": (0.01, 0.02), "repair.lr": (0.005, 0.01)},
)

METHODS = (GKT, NOISE)

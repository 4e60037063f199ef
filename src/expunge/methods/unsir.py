"""UNSIR: forget classes with error-maximizing noise, an impair pass and a repair pass. Zero-glance.

Source: Tarun, Chundawat, Mandal and Kankanhalli, Fast Yet Effective Machine Unlearning, arXiv:2111.08947.
Shapes: noise images (N, channels, H, W), float model input; labels (N,) int64.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from expunge.data import TensorImages, count_labels, normalize
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal, Meter
from expunge.methods.checks import check_zero_glance, first_image
from expunge.schema import Sample, Split, TrainConfig
from expunge.training import Objective, as_tensor, device_of, logits_of, seeded, train

NOTEBOOK_DEFECTS = {
    "three_noise_images": "of each class's noise only as many images as an image has channels are used",
    "label_zero": "every noise image is labelled 0, whichever class it was learned for",
    "train_mode_noise": "noise is learned in train mode, class by class: BatchNorm statistics absorb it",
    "summed_penalty": "the penalty weighs the sum over pixels, so it grows with resolution",
}
"""Defects of the authors' notebook that a configuration can switch on, by name."""


@dataclass(frozen=True, kw_only=True)
class UnsirConfig:
    """Hyper-parameters of UNSIR. The defaults are those that did best in docs/research/defaults.md."""

    noise_per_class: int = 32  # images learned for each forget class
    noise_steps: int = 40  # Adam steps, as in the notebook: 5 epochs of 8
    noise_lr: float = 0.1  # notebook
    noise_penalty: float = 3.0  # weight of the mean squared pixel; the notebook's 0.1 on the sum is 307.2 at 3x32x32
    noise_share: float = 0.4  # of the images in impair, in (0, 1)
    noise_repeats: int | None = None  # times each noise image is shown in a pass; None: as noise_share asks
    impair: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=24, lr=0.003, schedule="one_cycle", update_norm_statistics=False)
    )
    impressions_per_class: int = 32  # images the original calls a forget class, unlearned in repair; 0: none (paper)
    impression_share: float = 0.2  # of the images in repair, in (0, 1)
    repair: TrainConfig = field(default_factory=lambda: TrainConfig(steps=128, lr=0.004, schedule="one_cycle"))
    repair_temperature: float | None = 2.0  # of the original's answers that repair distils; None: train on labels
    defects: frozenset[str] = frozenset()  # of NOTEBOOK_DEFECTS

    def __post_init__(self) -> None:
        for name in ("noise_per_class", "noise_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.noise_repeats is not None and self.noise_repeats < 1:
            raise InputError(f"expected noise_repeats of at least 1, got {self.noise_repeats}")
        if not self.noise_lr > 0 or not self.noise_penalty >= 0:
            raise InputError(
                f"expected a positive noise_lr and a noise_penalty of at least 0, "
                f"got {self.noise_lr} and {self.noise_penalty}"
            )
        for name in ("noise_share", "impression_share"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        if self.impressions_per_class < 0:
            raise InputError(f"expected impressions_per_class of at least 0, got {self.impressions_per_class}")
        if self.repair_temperature is not None and not self.repair_temperature > 0:
            raise InputError(f"expected a positive repair_temperature, got {self.repair_temperature}")
        unknown = sorted(set(self.defects) - set(NOTEBOOK_DEFECTS))
        if unknown:
            raise InputError(f"unknown defect {unknown[0]!r}: expected one of {', '.join(NOTEBOOK_DEFECTS)}")

    @classmethod
    def paper(cls) -> UnsirConfig:
        """The paper's procedure with the rates its authors published, the notebook's defects mended."""
        return cls(
            noise_per_class=256,
            noise_penalty=307.2,
            noise_repeats=20,
            impair=TrainConfig(epochs=1, lr=0.02, update_norm_statistics=False),
            repair=TrainConfig(epochs=1, lr=0.01),
            repair_temperature=None,
            impressions_per_class=0,
        )

    @classmethod
    def notebook(cls) -> UnsirConfig:
        """The authors' notebook as published, with the four defects of its method kept; see NOTEBOOK_DEFECTS.

        Kept out, because they are no part of a method: its retain subset (the first files of each class), its accuracy
        (a mean of batch means), and weight gradients of the noise phase left over for the first impair step.
        """
        return cls(
            noise_per_class=256,
            noise_penalty=0.1,
            noise_repeats=20,
            impair=TrainConfig(epochs=1, lr=0.02),
            repair=TrainConfig(epochs=1, lr=0.01),
            repair_temperature=None,
            impressions_per_class=0,
            defects=frozenset(NOTEBOOK_DEFECTS),
        )


def unsir(
    model: nn.Module,
    split: Split,
    config: UnsirConfig | None = None,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model`, in eval mode, that has forgotten `split.forget_classes`. Zero-glance.

    Args:
        model: gives logits (N, C) for images (N, channels, H, W); it is not changed.
        split: the classes to forget and a retain sample without them; `split.forget` must be None.
        seed: of all randomness; the same seed gives the same weights, bit for bit on CPU.
        journal: collects seconds, steps and samples of each phase.

    Raises:
        InputError: the split holds forget samples, no or unusable classes, or no retain sample.
        DivergedError: a loss became NaN or infinite.
    """
    config = config or UnsirConfig()
    check_zero_glance(model, split)
    if "train_mode_noise" in config.defects:
        model = copy.deepcopy(model)  # whose statistics the noise phase spoils, as the notebook's does
        noise = _learn_noise(model.train(), split, config, seed=seed, journal=journal)
    else:
        noise = learn_noise(model, split, config, seed=seed, journal=journal)
    impaired = impair(model, split, noise, config, seed=seed, journal=journal)
    impressions = None
    if config.impressions_per_class:
        impressions = learn_impressions(model, split, config, seed=seed, journal=journal)
    return repair(impaired, split, config, original=model, impressions=impressions, seed=seed, journal=journal)


def learn_noise(
    model: nn.Module, split: Split, config: UnsirConfig, *, seed: int, journal: Journal | None = None
) -> TensorImages:
    """Learn images on which the model errs most about each forget class, all classes in one batch.

    The model is in eval mode with frozen parameters: its statistics do not move and no weight gradient is computed.

    Returns:
        `noise_per_class` images for each forget class, float model input on the CPU, with that class as label.

    Raises:
        DivergedError: the objective became NaN or infinite.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return _learn_noise(frozen, split, config, seed=seed, journal=journal)


def learn_impressions(
    model: nn.Module, split: Split, config: UnsirConfig, *, seed: int, journal: Journal | None = None
) -> TensorImages:
    """Learn images that the model calls a forget class, from retained images as the start.

    Without forget data they are what is at hand to ask whether a class is still known, and to unlearn it with. The
    model is in eval mode with frozen parameters.

    Returns:
        `impressions_per_class` images for each forget class, float model input on the CPU, with that class as label.

    Raises:
        DivergedError: the objective became NaN or infinite.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    labels = torch.tensor(split.forget_classes).repeat_interleave(config.impressions_per_class)
    with (journal or Journal()).phase("impressions", steps=IMPRESSION_STEPS) as meter, seeded(seed):
        images = _descend(
            frozen,
            _retained_images(split, len(labels), seed),
            labels,
            lambda logits, labels, _: F.cross_entropy(logits, labels),
            lr=IMPRESSION_LR,
            steps=IMPRESSION_STEPS,
            meter=meter,
        )
    return TensorImages(images, labels)


IMPRESSION_STEPS = 40  # Adam steps; enough for a probability of the class above 0.99 on every model tried
IMPRESSION_LR = 0.05  # four times it left 3 % of the class in the digits network of the tests


def noise_objective(logits: Tensor, labels: Tensor, images: Tensor, penalty: float, *, summed: bool = False) -> Tensor:
    """Return the loss that noise minimizes: minus cross-entropy plus `penalty` times the mean squared pixel.

    Source: arXiv:2111.08947, equation 1. Averaged over images. The paper weighs the sum of squares of an image;
    the mean (times channels * H * W for the same value) keeps its strength at any resolution.

    Args:
        logits: (N, C) of the frozen model on `images`.
        labels: (N,) int64, the class each image shall be mistaken about.
        images: (N, channels, H, W).
        summed: weigh the sum over pixels instead.
    """
    size = images.square().flatten(1)
    return -F.cross_entropy(logits, labels) + penalty * (size.sum(1) if summed else size.mean(1)).mean()


def impair(
    model: nn.Module,
    split: Split,
    noise: TensorImages,
    config: UnsirConfig,
    *,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model` trained on noise and retain sample, shuffled together: it unlearns, and is damaged.

    Raises:
        DivergedError: the loss became NaN or infinite.
        InputError: a retained sample bears a forgotten label.
    """
    images, labels = noise.images, noise.labels
    if "three_noise_images" in config.defects:
        first = [torch.nonzero(labels == label).flatten()[: images.shape[1]] for label in split.forget_classes]
        images, labels = images[torch.cat(first)], labels[torch.cat(first)]
    if "label_zero" in config.defects:
        labels = torch.zeros_like(labels)
    noise = TensorImages(images, labels)
    if config.noise_repeats is not None:
        repeated: Dataset[Sample] = Subset(noise, list(range(len(noise))) * config.noise_repeats)
    else:
        repeated = _as_share(noise, config.noise_share, split)
    impaired = copy.deepcopy(model)
    train(
        impaired,
        split.retain,
        config.impair,
        seed=seed,
        preprocessing=split.preprocessing,
        synthetic=repeated,
        journal=journal,
        phase="impair",
        refused=_gone(split),
    )
    return impaired


def repair(
    model: nn.Module,
    split: Split,
    config: UnsirConfig,
    *,
    original: nn.Module,
    impressions: TensorImages | None = None,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model` trained on the retain sample alone: what impair damaged comes back.

    Args:
        original: the model before impair, whose answers are distilled where `repair_temperature` is set.
        impressions: images shuffled in, on which the original's answer over retained classes is taught too.

    Raises:
        DivergedError: the loss became NaN or infinite.
        InputError: a retained sample bears a forgotten label, or impressions come without a `repair_temperature`.
    """
    repaired = copy.deepcopy(model)
    objective = None
    if config.repair_temperature is None and impressions is not None:
        raise InputError(
            "impressions are unlearned by distillation: set repair_temperature, or impressions_per_class=0"
        )
    if config.repair_temperature is not None:
        objective = distil_retained(copy.deepcopy(original).eval(), _gone(split), config.repair_temperature)
    train(
        repaired,
        split.retain,
        config.repair,
        seed=seed,
        preprocessing=split.preprocessing,
        synthetic=_as_share(impressions, config.impression_share, split) if impressions is not None else None,
        objective=objective,
        journal=journal,
        phase="repair",
        refused=_gone(split),
    )
    return repaired


def distil_retained(original: nn.Module, gone: Sequence[int], temperature: float) -> Objective:
    """Return the loss KL(original's answer over retained classes || the model's answer over all), times T squared.

    The original's logits of the classes `gone` are left out, so the model is taught what the original knows of the
    retained classes, and that the others do not exist. Source of distillation: Hinton et al., arXiv:1503.02531.
    """

    def objective(logits: Tensor, images: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            taught = logits_of(original(images)) / temperature
            taught[:, list(gone)] = -torch.inf
            target = taught.softmax(1)
        return F.kl_div((logits / temperature).log_softmax(1), target, reduction="batchmean") * temperature**2

    return objective


def _as_share(images: TensorImages, share: float, split: Split) -> Dataset[Sample]:
    """Return `images` repeated until they are `share` of what an epoch shows beside the retain sample."""
    shown = share / (1 - share) * sum(count_labels(split.retain).values())
    return Subset(images, list(range(len(images))) * max(1, round(shown / len(images))))


def _retained_images(split: Split, count: int, seed: int) -> Tensor:
    """Return `count` retained images as float model input, drawn at random (the first ones, of a stream), repeated
    where there are fewer."""
    retain: Any = split.retain
    if isinstance(retain, IterableDataset):
        samples = list(itertools.islice(retain, count))
    else:
        order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))[:count]
        samples = [retain[int(index)] for index in order]
    images = normalize(torch.stack([as_tensor(image) for image, _ in samples]), split.preprocessing)
    return images.repeat((math.ceil(count / len(images)), 1, 1, 1))[:count]


def _gone(split: Split) -> tuple[int, ...]:
    return (*split.forget_classes, *split.forgotten_before)


def _learn_noise(
    model: nn.Module, split: Split, config: UnsirConfig, *, seed: int, journal: Journal | None
) -> TensorImages:
    """Learn noise with `model` in the mode it is in."""
    shape = first_image(split).shape
    classes = torch.tensor(split.forget_classes)
    labels = classes.repeat_interleave(config.noise_per_class)
    start = torch.randn((len(labels), *shape), generator=torch.Generator().manual_seed(seed))
    # one batch a class only where the model's own statistics make the images of a batch depend on each other
    batches = classes.tolist() if model.training else [None]
    summed = "summed_penalty" in config.defects
    learned: list[Tensor] = []
    with (journal or Journal()).phase("noise", steps=config.noise_steps * len(batches)) as meter, seeded(seed):
        for label in batches:
            chosen = labels == label if label is not None else torch.ones_like(labels, dtype=torch.bool)
            images = _descend(
                model,
                start[chosen],
                labels[chosen],
                lambda logits, targets, noise: noise_objective(
                    logits, targets, noise, config.noise_penalty, summed=summed
                ),
                lr=config.noise_lr,
                steps=config.noise_steps,
                meter=meter,
            )
            learned.append(images)
    return TensorImages(torch.cat(learned), labels)


def _descend(
    model: nn.Module,
    start: Tensor,
    labels: Tensor,
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    lr: float,
    steps: int,
    meter: Meter,
) -> Tensor:
    """Return images after `steps` Adam steps down `objective(logits, labels, images)`; the model does not change."""
    device = device_of(model)
    images = start.to(device).clone().requires_grad_()
    targets = labels.to(device)
    optimizer = torch.optim.Adam([images], lr)
    with torch.enable_grad():
        for _ in range(steps):
            loss = objective(logits_of(model(images)), targets, images)
            if not torch.isfinite(loss):
                raise DivergedError(
                    f"the objective of learned images became {loss.item()} at step {meter.steps + 1}; nothing kept: "
                    f"the model gives NaN, or noise_lr is too high (now {lr:g})"
                )
            (images.grad,) = torch.autograd.grad(loss, [images])
            optimizer.step()
            meter.step(loss=loss.item(), samples=len(images))
    return images.detach().cpu()

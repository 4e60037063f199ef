"""UNSIR: forget classes with error-maximizing noise, an impair pass and a repair pass. Zero-glance.

Source: Tarun, Chundawat, Mandal and Kankanhalli, Fast Yet Effective Machine Unlearning, arXiv:2111.08947.
Shapes: noise images (N, channels, H, W), float model input; labels (N,) int64.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from torch.utils.hooks import RemovableHandle

from expunge.batches import Batch, Piece, as_tensor, take
from expunge.data import TensorImages, count_labels, hold_out, labels_of
from expunge.errors import DivergedError, InputError
from expunge.journal import Journal, Meter
from expunge.methods.checks import check_copyable, check_zero_glance, first_image
from expunge.methods.common import noise_objective
from expunge.randomness import check_seed, seeded
from expunge.schema import CalibrationReport, LearnedImages, Predictions, Sample, Signals, Split, TrainConfig
from expunge.signals import (
    LEAST_COMPARED,
    Evidence,
    Impressions,
    Units,
    are_probabilities,
    descend,
    gather_evidence,
    learn_impressions,
    logits_on,
    read_signals,
    retained_answers,
)
from expunge.training import Objective, answer, normalizes_by_the_batch, predict, train

NOTEBOOK_DEFECTS = {
    "three_noise_images": "of each class's noise only as many images as an image has channels are used",
    "label_zero": "every noise image is labelled 0, whichever class it was learned for",
    "train_mode_noise": "noise is learned in train mode, class by class: BatchNorm statistics absorb it",
    "summed_penalty": "the penalty weighs the sum over pixels, so it grows with resolution",
}
"""Defects of the authors' notebook that a configuration can switch on, by name."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How rates and lengths are found from signals, and the bounds of that search; see docs/research/calibration.md."""

    held_out: float = 0.05  # share of the retain sample that signals are read on and that is never trained on
    held_out_most: int = 512  # images, at most
    evidence: int = 32  # held-out class impressions of each kind, of all classes together (but two a class)
    check_every: int = 8  # impair steps between readings
    called: float = 0.05  # classes are gone where no more of their impressions, of any kind, are called one of them,
    probability: float = 0.005  # and, after repair, where their probability together is on average nowhere higher
    floor: float = 0.2  # agreement with the original, beyond chance, below which impair did too much
    depth: float = 0.6  # and to which it must bring the model: a class is gone at the output before it is gone inside
    plenty: int = 8192  # retained images from which on impair is at its full rate; fewer repair less: their root counts
    few_rate: float = 0.5  # of repair's rate, where BatchNorm needs larger batches than suit so few retained images
    without_batch_norm: float = 1.0  # times repair's rate, and its steps, where no layer normalizes by the batch
    trials: int = 4  # rates that impair may try in a round, each half the one before and from the same weights
    rounds: int = 2  # times that impair and repair may be done; each at twice the rate where the class is left
    cycles: int = 2  # of repair in a round; those after the first are a quarter as long, at half the rate
    back: float = 0.08  # loss of accuracy on held-out retained images, beyond its standard error, that counts as back:
    # the original was trained on them
    lost: float = 0.15  # loss at which a round did too much and is done again from the original, at half the rate

    def __post_init__(self) -> None:
        for name in ("held_out_most", "evidence", "check_every", "plenty", "trials", "rounds", "cycles"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.few_rate <= 1:
            raise InputError(f"expected a few_rate above 0 and up to 1, got {self.few_rate:g}")
        if not self.without_batch_norm > 0:
            raise InputError(f"expected a positive without_batch_norm, got {self.without_batch_norm:g}")
        for name in ("held_out", "called", "probability", "floor", "back", "lost"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        if not self.floor < self.depth <= 1:
            raise InputError(f"expected a depth above floor ({self.floor:g}) and up to 1, got {self.depth:g}")


@dataclass(frozen=True, kw_only=True)
class UnsirConfig:
    """Hyper-parameters of UNSIR. The defaults are those that did best in docs/research/calibration.md.

    With a calibration, the rates are where its search starts, and the batches the largest it uses: a small retain
    sample is trained on in smaller ones.
    """

    noise_per_class: int = 32  # images learned for each forget class
    noise_images: int | None = 96  # of all classes together, at most (but one a class); None: no limit
    noise_steps: int = 40  # Adam steps, as in the notebook: 5 epochs of 8
    noise_lr: float = 0.1  # notebook
    noise_penalty: float = 3.0  # weight of the mean squared pixel; the notebook's 0.1 on the sum is 307.2 at 3x32x32
    noise_share: float = 0.3  # of the images in impair, in (0, 1)
    noise_is_class: int | None = 16  # impair steps in which noise bears its class; after them it bears the retained
    # class that the model calls it first, so that the class does not come to mean "unknown"; None: throughout (paper)
    noise_repeats: int | None = None  # times each noise image is shown in a pass; None: as noise_share asks
    impair: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=48, lr=0.004, batch_size=128, schedule="one_cycle", update_norm_statistics=False, mode="batch"
        )
    )
    impressions: int = 96  # images the original calls a forget class, of all classes together; 0: none (paper)
    impression_share: float = 0.25  # of the images in impair, in (0, 1)
    impression_share_repair: float = 0.1  # of the images in repair, in (0, 1)
    repair: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=320, lr=0.0015, batch_size=128, schedule="one_cycle", mode="batch")
    )
    repair_temperature: float | None = 4.0  # of the original's answers that repair distils; None: train on labels
    label_weight: float = 0.5  # of the label, beside the original's answer, in what repair teaches; in [0, 1)
    mirrored: bool = True  # distil the original's answers on mirrored retained images too: twice the questions to it
    forget_margin: float = 3.0  # added to forgotten logits while distilling, so that they end so much lower
    calibration: Calibration | None = field(default_factory=Calibration)  # None: all as stated, nothing is read
    defects: frozenset[str] = frozenset()  # of NOTEBOOK_DEFECTS

    def __post_init__(self) -> None:
        for name in ("noise_per_class", "noise_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("noise_repeats", "noise_is_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"expected {name} of at least 1, got {value}")
        if not self.noise_lr > 0 or not self.noise_penalty >= 0:
            raise InputError(
                f"expected a positive noise_lr and a noise_penalty of at least 0, "
                f"got {self.noise_lr} and {self.noise_penalty}"
            )
        for name in ("noise_share", "impression_share", "impression_share_repair"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        if self.impressions and self.noise_share + self.impression_share >= 1:
            raise InputError("expected noise_share and impression_share to leave room for retained images")
        if self.noise_images is not None and self.noise_images < 1:
            raise InputError(f"expected noise_images of at least 1, got {self.noise_images}")
        if self.calibration is not None and (self.impressions < 1 or self.repair_temperature is None):
            raise InputError("a calibration needs impressions of at least 1 and a repair_temperature")
        if self.calibration is not None and None in (self.impair.steps, self.repair.steps):
            raise InputError("a calibration counts in steps: set impair.steps and repair.steps")
        if self.calibration is not None and (self.defects or self.noise_repeats is not None):
            raise InputError("a calibration does not go with defects or noise_repeats: set calibration=none")
        if self.impressions < 0:
            raise InputError(f"expected impressions of at least 0, got {self.impressions}")
        if not self.forget_margin >= 0:
            raise InputError(f"expected a forget_margin of at least 0, got {self.forget_margin}")
        if not 0 <= self.label_weight < 1:
            raise InputError(f"expected label_weight in [0, 1), got {self.label_weight}")
        if self.repair_temperature is not None and not self.repair_temperature > 0:
            raise InputError(f"expected a positive repair_temperature, got {self.repair_temperature}")
        unknown = sorted(set(self.defects) - set(NOTEBOOK_DEFECTS))
        if unknown:
            raise InputError(f"unknown defect {unknown[0]!r}: expected one of {', '.join(NOTEBOOK_DEFECTS)}")

    @classmethod
    def fast(cls) -> UnsirConfig:
        """The default for someone in a hurry: the class goes at the output, more of it is left inside."""
        whole = cls()
        return cls(
            noise_steps=20,
            noise_share=0.25,
            noise_is_class=None,
            impressions=32,
            mirrored=False,
            impair=replace(whole.impair, steps=12, lr=0.001),
            repair=replace(whole.repair, steps=88, lr=0.0007),
            calibration=Calibration(
                evidence=16,
                held_out_most=128,
                cycles=1,
                probability=0.02,
                depth=1.0,
                few_rate=1.0,
                without_batch_norm=2.0,
                rounds=3,  # at so low a rate many images of a class may be left after two
            ),
        )

    @classmethod
    def paper(cls) -> UnsirConfig:
        """The paper's procedure with the rates its authors published, the notebook's defects mended."""
        return cls(
            noise_per_class=256,
            noise_images=None,
            noise_penalty=307.2,
            noise_repeats=20,
            noise_is_class=None,
            impair=TrainConfig(epochs=1, lr=0.02, update_norm_statistics=False),
            repair=TrainConfig(epochs=1, lr=0.01),
            repair_temperature=None,
            impressions=0,
            calibration=None,
        )

    @classmethod
    def notebook(cls) -> UnsirConfig:
        """The authors' notebook as published, with the four defects of its method kept; see NOTEBOOK_DEFECTS.

        Kept out, because they are no part of a method: its retain subset (the first files of each class), its accuracy
        (a mean of batch means), and weight gradients of the noise phase left over for the first impair step.
        """
        return cls(
            noise_per_class=256,
            noise_images=None,
            noise_penalty=0.1,
            noise_repeats=20,
            noise_is_class=None,
            impair=TrainConfig(epochs=1, lr=0.02),
            repair=TrainConfig(epochs=1, lr=0.01),
            repair_temperature=None,
            impressions=0,
            calibration=None,
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
        journal: collects seconds, steps and samples of each phase, and what a calibration found.

    Raises:
        InputError: the split holds forget samples, no or unusable classes, or no retain sample; the seed is negative.
        DivergedError: a loss became NaN or infinite (with a calibration: at every rate that was tried).
    """
    check_seed(seed)
    config = config or UnsirConfig()
    journal = journal or Journal()
    check_zero_glance(model, split)
    check_copyable(model, first_image(split))
    if config.calibration is not None:
        return _Calibrated(model, split, config, config.calibration, seed=seed, journal=journal).run()
    if "train_mode_noise" in config.defects:
        model = copy.deepcopy(model)  # whose statistics the noise phase spoils, as the notebook's does
        noise = _learn_noise(model.train(), split, config, seed=seed, journal=journal)
    else:
        noise = learn_noise(model, split, config, seed=seed, journal=journal)
    impressions = None
    if config.impressions:
        impressions = _impressions(model, split, config, seed=seed, journal=journal)
    impaired = impair(model, split, noise, config, impressions=impressions, seed=seed, journal=journal)
    learned = noise if impressions is not None else None
    return repair(
        impaired, split, config, original=model, impressions=impressions, noise=learned, seed=seed, journal=journal
    )


def learn_noise(
    model: nn.Module,
    split: Split,
    config: UnsirConfig,
    *,
    seed: int,
    units: Units | None = None,
    journal: Journal | None = None,
) -> TensorImages:
    """Learn images on which the model errs most about each forget class, all classes in one batch.

    The model is in eval mode with frozen parameters: its statistics do not move and no weight gradient is computed.

    Args:
        units: of the input, where its pixels do not vary as usual; the rate and the penalty are of these.

    Returns:
        `noise_per_class` images for each forget class (fewer where `noise_images` would be exceeded), float model input
        on the CPU, with that class as label.

    Raises:
        DivergedError: the objective became NaN or infinite.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return _learn_noise(frozen, split, config, seed=seed, units=units, journal=journal)


def impair(
    model: nn.Module,
    split: Split,
    noise: TensorImages,
    config: UnsirConfig,
    *,
    impressions: Impressions | None = None,
    seed: int,
    journal: Journal | None = None,
    until: Callable[[nn.Module, int], bool] | None = None,
) -> nn.Module:
    """Return a copy of `model` trained on noise and retain sample, shuffled together: it unlearns, and is damaged.

    Noise bears the class it was learned for, so that the class comes to mean noise. After `noise_is_class` steps it
    bears the retained class that `model` calls it first: a class that means noise for long means whatever is unknown,
    and its own images are just that afterwards, so that it is relearned quickly (docs/research/calibration.md, 12).
    Impressions, where there are any, bear the class of the retained image they were made from, so that what made them
    the class comes to mean nothing.

    Args:
        until: asked after each step with the model and the number of steps done; impair ends where it says True.

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
    bearing: Dataset[Any] = TensorImages(images, labels)
    relabelled = None
    if config.noise_is_class is not None:
        answers = predict(model, bearing, precision=config.impair.precision)
        bearing = Taught(bearing, retained_answers(answers.logits, split.gone))
        relabelled = _Relabelled(config.noise_is_class)
    shown: Dataset[Sample]
    if config.noise_repeats is not None:
        shown = Subset(bearing, list(range(len(images))) * config.noise_repeats)
    elif impressions is None:
        shown = _as_share(bearing, config.noise_share, split.retain)
    else:
        others = 1 - config.noise_share - config.impression_share
        shown = ConcatDataset(
            [
                _as_share(bearing, config.noise_share, split.retain, others),
                _as_share(
                    TensorImages(impressions.images, impressions.start_labels),
                    config.impression_share,
                    split.retain,
                    others,
                ),
            ]
        )
    impaired = copy.deepcopy(model)

    def done(step: int) -> bool:
        if relabelled is not None:
            relabelled.steps = step
        return until is not None and until(impaired, step)

    train(
        impaired,
        split.retain,
        config.impair,
        seed=seed,
        preprocessing=split.preprocessing,
        synthetic=shown,
        objective=relabelled,
        journal=journal,
        phase="impair",
        refused=split.gone,
        until=done if until is not None or relabelled is not None else None,
    )
    return impaired


@dataclass
class _Relabelled:
    """Cross-entropy of labels; once `since` steps are done, of a sample's most probable target, where it has one."""

    since: int
    steps: int = 0  # that are done

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels
        if self.steps >= self.since and batch.targets is not None:
            labels = torch.where(batch.targets[:, 0].isnan(), labels, batch.targets.argmax(1))
        return F.cross_entropy(logits, labels)


def repair(
    model: nn.Module,
    split: Split,
    config: UnsirConfig,
    *,
    original: nn.Module,
    impressions: Impressions | None = None,
    noise: TensorImages | None = None,
    seed: int,
    journal: Journal | None = None,
) -> nn.Module:
    """Return a copy of `model` trained on the retain sample alone: what impair damaged comes back.

    Args:
        original: the model before impair, whose answers are distilled where `repair_temperature` is set.
        impressions: shuffled in; on each, the original's answer on the image it was made from is taught.
        noise: shuffled in with them: after impair, noise is not the class any more either.

    Raises:
        DivergedError: the loss became NaN or infinite.
        InputError: a retained sample bears a forgotten label, or impressions come without a `repair_temperature`.
    """
    if config.repair_temperature is None:
        if impressions is not None:
            raise InputError("impressions are unlearned by distillation: set repair_temperature, or impressions=0")
        lesson = Lesson(split.retain, None, None)
    else:
        lesson = teach(original, split, config, impressions, noise, journal=journal)
    return _repair(model, split, config.repair, lesson, seed=seed, journal=journal)


@dataclass(frozen=True)
class Lesson:
    """What repair is taught: retained samples, the loss, and what is shuffled in."""

    retain: Dataset[Sample]
    synthetic: Dataset[Sample] | None
    objective: Objective | None


def teach(
    original: nn.Module,
    split: Split,
    config: UnsirConfig,
    impressions: Impressions | None = None,
    noise: TensorImages | None = None,
    *,
    journal: Journal | None = None,
) -> Lesson:
    """Return the lesson of distillation: the original's answers over retained classes, on retained samples,
    impressions and noise. On an impression it is the answer on the image that it was made from: what made it the class
    shall mean nothing. On retained samples their labels have a part in it (`taught_answers`); on mirrored ones not, for
    a mirrored image need not keep its class. Answers on a retain sample in memory are computed once.

    Source of distillation: Hinton et al., arXiv:1503.02531.
    """
    if config.repair_temperature is None:
        raise InputError("expected a repair_temperature to distil with, got None")
    temperature, gone = config.repair_temperature, split.gone
    teacher = copy.deepcopy(original).eval()
    retain = split.retain
    if not isinstance(retain, IterableDataset):
        count = len(retain)  # type: ignore[arg-type]
        retain = Mirrored(retain) if config.mirrored else retain
        own = predict(
            teacher, retain, preprocessing=split.preprocessing, precision=config.repair.precision, journal=journal,
            phase="answers",
        )  # fmt: skip
        known = taught_answers(own.logits[:count], own.labels[:count], gone, temperature, config.label_weight)
        retain = Taught(retain, torch.cat([known, retained_answers(own.logits[count:], gone, temperature)]))
    synthetic: Dataset[Sample] | None = None
    if impressions is not None:
        images, asked, labels = impressions.images, impressions.starts, impressions.labels
        if noise is not None:
            images, asked = torch.cat([images, noise.images]), torch.cat([asked, noise.images])
            labels = torch.cat([labels, noise.labels])
        answers = predict(teacher, TensorImages(asked, labels), precision=config.repair.precision)
        taught = Taught(TensorImages(images, labels), retained_answers(answers.logits, gone, temperature))
        synthetic = _as_share(taught, config.impression_share_repair, retain)
    objective = distil_retained(teacher, gone, temperature, config.forget_margin, config.label_weight)
    return Lesson(retain, synthetic, objective)


def taught_answers(
    logits: Tensor, labels: Tensor, gone: tuple[int, ...], temperature: float, label_weight: float
) -> Tensor:
    """Return what repair teaches on retained samples, probabilities (N, C), 0 for the classes `gone`.

    The original's answer over retained classes and the label are mixed as probabilities, and the mixture is softened by
    the temperature: where the original is right, next to nothing changes; where it is wrong, it is corrected.

    Args:
        logits: (N, C) of the original.
        labels: (N,) int64, retained ones.
        label_weight: the label's share, in [0, 1).
    """
    if label_weight:
        kept = logits.index_fill(1, torch.tensor(gone, device=logits.device), -torch.inf)
        mixed = kept.log_softmax(1) + math.log1p(-label_weight)
        own = labels.unsqueeze(1)
        share = torch.full_like(own, math.log(label_weight), dtype=mixed.dtype)
        logits = mixed.scatter(1, own, torch.logaddexp(mixed.gather(1, own), share))
    return retained_answers(logits, gone, temperature)


def distil_retained(
    original: nn.Module,
    gone: tuple[int, ...],
    temperature: float,
    margin: float = 0.0,
    label_weight: float = 0.0,
) -> Objective:
    """Return the loss KL(what is taught || the model's answer over all classes), times temperature squared.

    Taught is a sample's target where it has one, else what `taught_answers` says: the model learns what the original
    knows of the retained classes, and that the classes `gone` do not exist.

    Args:
        margin: added to the logits of `gone` before they are compared. Where a class has no probability left on what is
            at hand, nothing else pushes it lower; in a retrained model its logit is low on every image.
        label_weight: of the labels, in what is taught on samples without a target.
    """

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        taught = batch.targets if batch.targets is not None else torch.full_like(logits, torch.nan)
        open_ones = torch.isnan(taught[:, 0])
        if open_ones.any():
            with torch.no_grad():
                known = answer(original, batch.images[open_ones])
                answers = taught_answers(known, batch.labels[open_ones], gone, temperature, label_weight)
            taught = taught.index_put((open_ones.nonzero().flatten(),), answers)
        raised = torch.zeros(logits.shape[1], device=logits.device)
        raised[list(gone)] = margin
        return (
            F.kl_div(((logits + raised) / temperature).log_softmax(1), taught, reduction="batchmean") * temperature**2
        )

    return objective


class Mirrored(Dataset[Any]):
    """Samples, (channels, H, W) tensors or PIL images, and after them the same turned left to right."""

    def __init__(self, samples: Dataset[Sample]) -> None:
        self.samples: Any = samples
        self.labels = np.tile(labels_of(samples), 2)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        turned, place = divmod(index, len(self) // 2)
        image, label = self.samples[place][:2]
        return as_tensor(image).flip(-1) if turned else image, label

    def samples_at(self, index: Tensor) -> Piece:
        """Return the samples at `index`, (N,) int64, in one piece."""
        turned, place = index >= len(self) // 2, index % (len(self) // 2)
        images, labels, targets = take(self.samples, place)
        images[turned] = images[turned].flip(-1)
        return images, labels, targets


class Taught(Dataset[Any]):
    """Samples with a target each, (image, label, target (C,))."""

    def __init__(self, samples: Dataset[Sample], targets: Tensor) -> None:
        self.samples: Any = samples
        self.labels = labels_of(samples)
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any, Tensor]:
        sample = self.samples[index]
        return sample[0], sample[1], self.targets[index]

    def samples_at(self, index: Tensor) -> Piece:
        """Return the samples at `index`, (N,) int64, in one piece."""
        images, labels, _ = take(self.samples, index)
        return images, labels, self.targets[index]


class _Calibrated:
    """UNSIR whose rates and lengths are found from signals. One object is one run."""

    def __init__(
        self, model: nn.Module, split: Split, config: UnsirConfig, plan: Calibration, *, seed: int, journal: Journal
    ) -> None:
        self.plan, self.seed, self.journal = plan, seed, journal
        training, held_out = hold_out(split.retain, share=plan.held_out, most=plan.held_out_most, seed=seed)
        self.apart = training is not split.retain  # else too few of each class to do without some
        self.split = replace(split, retain=training)
        self.scale = _scale(model, held_out, split, journal)
        self.hook: RemovableHandle | None = None
        if self.scale != 1:
            model = copy.deepcopy(model)
            self.hook = model.register_forward_hook(_divided(self.scale))
        self.model = model
        samples = sum(count_labels(training).values())
        mildness = min(1.0, math.sqrt(samples / plan.plenty))
        normalized = normalizes_by_the_batch(model)
        fitting = _fitting_batch(samples)

        def fitted(own: TrainConfig, few_rate: float) -> TrainConfig:
            if fitting >= own.batch_size:
                return own
            if normalized and own.mode != "eval":  # a small batch's statistics, half of them noise's, fit no model
                return replace(own, lr=own.lr * few_rate)
            return replace(own, batch_size=fitting)

        impair, repair = fitted(config.impair, 1.0), fitted(config.repair, plan.few_rate)
        if not normalized:
            more = plan.without_batch_norm
            repair = replace(repair, lr=more * repair.lr, steps=max(1, round(more * (repair.steps or 0))))
        self.config = replace(config, impair=replace(impair, lr=impair.lr * mildness), repair=repair)
        self.evidence = gather_evidence(
            model,
            self.split,
            held_out,
            per_class=max(2, plan.evidence // len(split.forget_classes)),
            compared=LEAST_COMPARED if self.apart else 0,
            seed=seed + 1,
            precision=config.impair.precision,
            journal=journal,
        )
        self.trials: list[dict[str, Any]] = []

    def run(self) -> nn.Module:
        config, split = self.config, self.split
        first = self._read(self.model, "original", 0)
        # of inputs that the original does not call the class itself it says nothing that a changed model does not
        telling = _called_of_images(first) >= TELLING
        units = self.evidence.units
        noise = learn_noise(self.model, split, config, seed=self.seed, units=units, journal=self.journal)
        noise, strength = _calmed(self.model, noise, self.evidence, self.journal)
        impressions = _impressions(self.model, split, config, seed=self.seed, units=units, journal=self.journal)
        lesson = teach(self.model, split, config, impressions, noise, journal=self.journal)
        goal = self._least(self.plan.back)
        best: tuple[nn.Module, Signals] | None = None
        model, rate, found, rounds = self.model, config.impair.lr, 0.0, 0
        for rounds in range(1, self.plan.rounds + 1):
            impaired, rate = self._impair(model, noise, impressions, rate, rounds)
            model, after = self._repair(impaired, lesson, goal, rounds)
            if best is None or self._rank(after) > self._rank(best[1]):
                best, found = (model, after), rate
            gone, lost = self._gone(after), self._lost(after)
            if gone and not lost:
                break
            rate *= (0.5 if lost else 1.0) * (1.0 if gone else 2.0)
            if lost:  # no second round brings back what the first destroyed
                model = self.model
        assert best is not None  # rounds >= 1
        model, after = best
        if self.hook is not None:
            model._forward_hooks.pop(self.hook.id)  # which a copy has too
        gone, lost = self._gone(after), self._lost(after)
        back = after.retain_accuracy >= goal
        held_out = self.evidence.held if self.apart else 0
        self.journal.calibration = CalibrationReport(
            reached=False if lost else gone if telling else None,
            back=back,
            why=self._why(gone, back, after) if telling else self._why_nothing(first, after),
            impair_rate=found,
            repair_rate=config.repair.lr,
            batch_size=config.repair.batch_size,
            held_out=held_out,
            trained_on=len(self.evidence.labels) - held_out,
            rounds=rounds,
            scale=self.scale,
            noise_strength=strength,
            trials=tuple(self.trials),
            signals=tuple(self.journal.signals),
        )
        return model

    def _impair(
        self, model: nn.Module, noise: TensorImages, impressions: Impressions, rate: float, number: int
    ) -> tuple[nn.Module, float]:
        """Return the impaired model and its rate, which is halved as long as impair does too much.

        Each trial starts from the weights of `model`. Too little is not seen here but after repair, which is what
        empties many classes: the next round then tries twice the rate.
        """
        mildest: nn.Module | None = None
        error: DivergedError | None = None
        for _ in range(self.plan.trials):
            try:
                mildest, outcome = self._trial(model, noise, impressions, rate, number)
                if outcome != "too much":
                    return mildest, rate
            except DivergedError as raised:
                error = raised
                self.trials.append({"round": number, "rate": rate, "steps": None, "outcome": "diverged"})
            rate /= 2
        if mildest is None:
            raise error or DivergedError("impair failed at every rate that was tried")
        return mildest, rate * 2

    def _trial(
        self, model: nn.Module, noise: TensorImages, impressions: Impressions, rate: float, number: int
    ) -> tuple[nn.Module, str]:
        plan, steps = self.plan, self.config.impair.steps or 0
        lowest, deep = self._agreement(plan.floor), self._agreement(plan.depth)
        last: list[Signals] = []

        def enough(impaired: nn.Module, step: int) -> bool:
            if step % plan.check_every and step != steps:
                return False
            last.append(self._read(impaired, "impair", step, refresh=True))
            agreement = last[-1].retain_agreement
            return agreement < lowest or (agreement <= deep and self._gone(last[-1]))

        config = replace(self.config, impair=replace(self.config.impair, lr=rate))
        impaired = impair(
            model, self.split, noise, config, impressions=impressions, seed=self.seed + number - 1,
            journal=self.journal, until=enough,
        )  # fmt: skip
        end = last[-1]
        outcome = "too much" if end.retain_agreement < lowest else "gone" if self._gone(end) else "left"
        self.trials.append(
            {
                "round": number,
                "rate": rate,
                "steps": end.step,
                "outcome": outcome,
                "still_called": end.still_called,
                "retain_agreement": end.retain_agreement,
            }
        )
        return impaired, outcome

    def _repair(self, model: nn.Module, lesson: Lesson, goal: float, number: int) -> tuple[nn.Module, Signals]:
        """Repair in cycles until retained accuracy is back or stalls; return the best of them and what it shows."""
        first = self.config.repair
        best: tuple[nn.Module, Signals] | None = None
        for cycle in range(self.plan.cycles):
            steps = first.steps or 0
            config = first if cycle == 0 else replace(first, lr=first.lr / 2, steps=max(1, steps // 4))
            seed = self.seed + 100 * number + cycle
            model = _repair(model, self.split, config, lesson, seed=seed, journal=self.journal)
            shown = self._read(model, "repair", steps + cycle * max(1, steps // 4))
            if best is not None and self._rank(shown) <= self._rank(best[1]):
                break
            best = (model, shown)
            if shown.retain_accuracy >= goal:
                break
        assert best is not None  # cycles >= 1
        return best

    def _gone(self, signals: Signals) -> bool:
        if signals.phase == "impair":  # in which noise bears the label of the class, so that kind says nothing
            return _called_of_images(signals) <= self.plan.called
        return signals.still_called <= self.plan.called and signals.class_probability <= self.plan.probability

    def _agreement(self, beyond_chance: float) -> float:
        """Return the share of answers that agree with the original's, where so much of it is not chance."""
        retained = self.evidence.answers.shape[1] - len(self.evidence.gone)
        return (1 + beyond_chance * (retained - 1)) / retained if retained > 1 else 0.0

    def _least(self, loss: float) -> float:
        return _least(_accuracy(self.evidence), self.evidence.held, loss)

    def _lost(self, signals: Signals) -> bool:
        return signals.retain_accuracy < self._least(self.plan.lost)

    def _rank(self, signals: Signals) -> tuple[bool, bool, float]:
        gone = self._gone(signals)
        return gone and not self._lost(signals), gone, -signals.retain_divergence

    def _read(self, model: nn.Module, phase: str, step: int, *, refresh: bool = False) -> Signals:
        with self.journal.phase("signals", steps=None, shown=False) as meter:
            signals = read_signals(model, self.evidence, phase=phase, step=step, refresh=refresh)
            self.evidence.count(meter, refresh=refresh)
        self.journal.signal(signals)
        return signals

    def _why(self, gone: bool, back: bool, after: Signals) -> str:
        if not gone:
            left = f"their mean probability is up to {after.class_probability:.1%}"
            if after.still_called > self.plan.called:
                left = (
                    f"{after.still_called:.0%} of the class impressions of one kind are still called a forgotten class "
                    f"({left})"
                )
            else:
                left = f"the classes are hardly called any more, but {left}, for {self.plan.probability:.1%} asked for"
            lost = f"; accuracy on retained images is lost ({self._shares(after)})" if self._lost(after) else ""
            return f"after {self.plan.rounds} rounds of impair and repair, {left}{lost}; the best round is kept"
        few = after.retain_accuracy < _accuracy(self.evidence) - self.plan.back
        state = "is lost" if self._lost(after) else "gains no more"
        if back:
            state = "is back as far as so few can tell" if few else "is back"
        return (
            f"the classes are gone, {'but' if self._lost(after) else 'and'} accuracy on "
            f"{self.evidence.held} {'held-out ' if self.apart else ''}retained images {state} ({self._shares(after)})"
        )

    def _shares(self, after: Signals) -> str:
        return f"{_accuracy(self.evidence):.1%} before, {after.retain_accuracy:.1%}"

    def _why_nothing(self, first: Signals, after: Signals) -> str:
        lost = f"; accuracy on retained images is lost ({self._shares(after)})"
        return (
            f"the original itself calls only {_called_of_images(first):.0%} of the class impressions learned from it "
            "the class, so it says nothing that a changed model does not; measure on held-out images of the class"
            f"{lost if self._lost(after) else ''}"
        )


TELLING = 0.5
"""The share of class impressions, of some kind that began as images, that the original must call the class for signals
to say anything."""


def _called_of_images(signals: Signals) -> float:
    """Return the share of impressions still called a forgotten class, of the kind made from images called so most."""
    return max(share for kind, share in signals.impressions_called.items() if kind != "noise")


SURE, USUAL = 8.0, 5.0
"""How far a model's first answer leads its second, in logits, on average over retained images. Above the first, answers
are divided so that they lead by the second: rates, temperature, margin and the bounds of signals are all of logits as
models usually have them (measured: .9 to 6.7), and a class of which a model is too sure stays (docs/research/
calibration.md, 15)."""
UNSURE = 0.3
"""How far a model's mean probability of its answer may lie below its accuracy. Further below, as where a model gives
probabilities or cosines, answers are multiplied until the two agree (temperature scaling, Guo et al.,
arXiv:1706.04599), or until the first leads the second by USUAL."""


def _scale(model: nn.Module, held_out: Dataset[Sample], split: Split, journal: Journal) -> float:
    """Return what to divide a model's answers by: 1 but for one that is much surer, or less sure, than it should be."""
    with journal.phase("signals", steps=None, shown=False) as meter:
        found = predict(model, held_out, preprocessing=split.preprocessing)
        first, second = found.logits.topk(2, dim=1).values.unbind(1)
        lead = (first - second).mean().item()
        meter.step(samples=len(found.labels))
        meter.read(Counter(found.labels.tolist()))
        _check_known(found, split.gone)
        if lead <= SURE:
            return 1 / _sharper(found, split.gone, lead, meter)
        meter.note = (
            f"the model is surer than most: its first answer leads the second by {lead:.1f} logits, so they were "
            f"divided by {lead / USUAL:.1f} while it forgot"
        )
        return lead / USUAL


def _right(found: Predictions, gone: tuple[int, ...]) -> Tensor:
    """Return which samples are answered rightly where the classes `gone` may not be answered, (N,) bool."""
    return retained_answers(found.logits, gone).argmax(1) == found.labels


def _check_known(found: Predictions, gone: tuple[int, ...]) -> None:
    """Raise InputError where a model answers retained images worse than a guess would, by two deviations of that."""
    right = _right(found, gone)
    chance, size = 1 / max(2, found.logits.shape[1] - len(gone)), len(right)
    if right.sum().item() < size * chance - 2 * math.sqrt(size * chance * (1 - chance)):
        raise InputError(
            f"the model answers {right.double().mean():.1%} of {len(right)} retained images rightly, less than a guess "
            "would: do weights, the order of class names, and --mean, --std and --size belong to this data?"
        )


def _sharper(found: Predictions, gone: tuple[int, ...], lead: float, meter: Meter) -> float:
    """Return what to multiply answers by so that their mean probability is their accuracy; 1 where it is near that."""
    most = USUAL / lead if lead > 0 else 1.0  # few images, all answered rightly, would ask for any number

    def confidence(times: float) -> float:
        return retained_answers(times * found.logits, gone).max(1).values.mean().item()

    accuracy = _right(found, gone).double().mean().item()
    if accuracy - confidence(1.0) <= UNSURE or most <= 1:
        return 1.0
    low, high = 1.0, most
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if confidence(middle) < accuracy else (low, middle)
    told = f"right on {accuracy:.0%}, it gives its answers a probability of {confidence(1.0):.0%}"
    if are_probabilities(found.logits):
        told = "it gives probabilities in place of logits, and is better handed in without its last softmax"
    meter.note = f"the model is less sure than most: {told}; its answers were multiplied by {high:.1f} while it forgot"
    return high


def _divided(by: float) -> Callable[[nn.Module, Any, Any], Any]:
    """Return a hook that divides the logits of a model, or those in its output."""

    def divide(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output / by
        if hasattr(output, "_replace"):  # a named tuple, of torchvision
            return output._replace(logits=output.logits / by)
        output.logits = output.logits / by
        return output

    return divide


WILD = 6.0
"""How many times as far apart as on retained images a model's answers on learned noise may be. Rates and the distilled
answers are of such noise (measured: 1.5 to 5.4 on ResNet18, All-CNN, MobileNetV2 and a ViT); small networks answer it
11 to 208 times as far apart, and what they are taught on it drowns what they are taught on images (docs/research/
calibration.md, 16)."""


def _calmed(model: nn.Module, noise: TensorImages, evidence: Evidence, journal: Journal) -> tuple[TensorImages, float]:
    """Return noise that `model` answers no wilder than WILD says, and the share of its strength that it kept."""
    units = evidence.units
    start = noise.images if units is None else units.measured(noise.images)

    def at(strength: float) -> Tensor:
        images = strength * start
        return images if units is None else units.input(images)

    with journal.phase("signals", steps=None, shown=False) as meter:

        def apart(images: Tensor) -> float:
            meter.step(samples=len(images))
            return logits_on(model, images).std(1, correction=0).mean().item()

        most = WILD * apart(evidence.retained)
        meter.read(Counter(evidence.labels.tolist()))
        if apart(noise.images) <= most:
            return noise, 1.0
        low, high = 2.0**-10, 1.0
        for _ in range(10):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if apart(at(middle)) <= most else (low, middle)
    return TensorImages(at(low), noise.labels), low


def _impressions(
    model: nn.Module,
    split: Split,
    config: UnsirConfig,
    *,
    seed: int,
    units: Units | None = None,
    journal: Journal | None,
) -> Impressions:
    """Learn the impressions to train on: few enough of each class that all together are as many as asked for."""
    count = max(1, config.impressions // len(split.forget_classes))
    made = learn_impressions(
        model, split, count, seed=seed, precision=config.impair.precision, units=units, journal=journal
    )
    if journal is not None:
        rows = _handful(made.labels)
        few = (part[rows].clone() for part in (made.images, made.labels, made.starts, made.start_labels))
        images, labels, starts, start_labels = few
        journal.learned.append(
            LearnedImages(kind="impressions", images=images, labels=labels, starts=starts, start_labels=start_labels)
        )
    return made


HANDFUL = 8  # learned images that are kept to be looked at, of all classes together,
HANDFUL_EACH = 3  # and of one


def _handful(labels: Tensor) -> Tensor:
    """Return the positions of the first few images of each class, (N,)."""
    classes = torch.unique(labels)[:HANDFUL]
    each = max(1, min(HANDFUL_EACH, HANDFUL // len(classes)))
    return torch.cat([(labels == label).nonzero().flatten()[:each] for label in classes])


def _repair(
    model: nn.Module, split: Split, config: TrainConfig, lesson: Lesson, *, seed: int, journal: Journal | None
) -> nn.Module:
    repaired = copy.deepcopy(model)
    train(
        repaired,
        lesson.retain,
        config,
        seed=seed,
        preprocessing=split.preprocessing,
        synthetic=lesson.synthetic,
        objective=lesson.objective,
        journal=journal,
        phase="repair",
        refused=split.gone,
    )
    return repaired


def _accuracy(evidence: Evidence) -> float:
    """Return the original's accuracy on held-out retained images, with no forgotten class to answer."""
    return (evidence.answers.argmax(1) == evidence.labels)[: evidence.held].double().mean().item()


def _least(accuracy: float, held_out: int, loss: float) -> float:
    """Return the least accuracy on `held_out` images that is no more than `loss` below the original's `accuracy`.

    A standard error less than that, and at least one image: no cycle of repair mends what few images show. Where the
    original is right on less than half, the loss is in proportion.
    """
    error = math.sqrt(accuracy * (1 - accuracy) / held_out)
    return accuracy - max(loss * min(1.0, 2 * accuracy) + error, 1 / held_out) - 1e-9


def _fitting_batch(samples: int) -> int:
    """Return the batch that suits a retain sample: a power of two near a sixteenth of it, at least 32."""
    return int(2 ** max(5, round(math.log2(max(1, samples) / 16))))


def _as_share(images: Dataset[Any], share: float, retain: Dataset[Any], others: float | None = None) -> Dataset[Any]:
    """Return `images` repeated until they are `share` of what an epoch shows, where retained samples are `others`."""
    size = len(images)  # type: ignore[arg-type]
    shown = share / (1 - share if others is None else others) * sum(count_labels(retain).values())
    return Subset(images, [index % size for index in range(max(size, round(shown)))])


def _learn_noise(
    model: nn.Module,
    split: Split,
    config: UnsirConfig,
    *,
    seed: int,
    units: Units | None = None,
    journal: Journal | None,
) -> TensorImages:
    """Learn noise with `model` in the mode it is in."""
    shape = first_image(split).shape
    classes = torch.tensor(split.forget_classes)
    count = config.noise_per_class
    if config.noise_images is not None:
        count = max(1, min(count, config.noise_images // len(classes)))
    labels = classes.repeat_interleave(count)
    start = torch.randn((len(labels), *shape), generator=torch.Generator().manual_seed(seed))
    start = units.input(start) if units is not None else start
    # one batch a class only where the model's own statistics make the images of a batch depend on each other
    batches = classes.tolist() if model.training else [None]
    summed = "summed_penalty" in config.defects
    learned: list[Tensor] = []
    with (journal or Journal()).phase("noise", steps=config.noise_steps * len(batches)) as meter, seeded(seed):
        for label in batches:
            chosen = labels == label if label is not None else torch.ones_like(labels, dtype=torch.bool)
            images = descend(
                model,
                start[chosen],
                labels[chosen],
                noise_objective(-1.0, config.noise_penalty, summed=summed),
                lr=config.noise_lr,
                steps=config.noise_steps,
                precision=config.impair.precision,
                units=units,
                meter=meter,
            )
            learned.append(images)
    noise = torch.cat(learned)
    if journal is not None:
        rows = _handful(labels)
        journal.learned.append(LearnedImages(kind="noise", images=noise[rows].clone(), labels=labels[rows].clone()))
    return TensorImages(noise, labels)

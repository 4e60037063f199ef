"""The data that travels between the parts: frozen, without behaviour beyond checks of itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

from expunge.errors import InputError

if TYPE_CHECKING:  # a record is read without torch
    from torch import Tensor
    from torch.utils.data import Dataset

SCHEMA_VERSION = 2
"""Version of `record.json`; raised when a key is renamed, moved or changes meaning.

Since 2 `checks.kept` is against the original that may not answer forgotten classes, and `calibration.held_out` counts
what is not trained on alone.
"""

READABLE = (1, 2)
"""Versions that are read."""

IMAGES = "images.json"
"""Name of the file beside a record that holds pictures of samples, there only where they were asked for."""

PAGE = "report.html"
"""Name of the page beside a record, for people."""

TRIAL_WORDS = {"left": "some left for repair"}
"""What people are told of the outcome of a trial of impair, where the word itself says too little: it is repair that
empties a class."""

Precision = Literal["auto", "fp32", "bf16"]
"""Of the sums within a model while it trains, weights being float32: auto takes the faster one for model and device."""

LayerMode = Literal["train", "batch", "eval"]
"""Of layers in training. batch: they draw nothing (dropout, stochastic depth); eval: and BatchNorm goes by its running
statistics, which stay as they are."""

Sample = tuple[Any, Any]
"""(image, label): a tensor (channels, H, W) or PIL image, and an integer class."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image on disk becomes a model's input: decode, resize, centre-crop, scale to [0, 1], normalize."""

    size: tuple[int, int]  # (height, width) in pixels
    mean: tuple[float, ...]  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...]  # per channel, likewise; positive
    source: str = "given"  # who said so: given, metadata, timm, torchvision, hf, measured

    def __post_init__(self) -> None:
        if not self.mean or len(self.std) != len(self.mean):
            raise InputError(
                f"expected a mean and a std for each channel, got {len(self.mean)} and {len(self.std)} values"
            )
        if min(self.std) <= 0 or not all(map(math.isfinite, (*self.mean, *self.std))):
            raise InputError(f"expected finite means and positive stds, got mean {self.mean}, std {self.std}")
        if min(self.size) < 1:
            raise InputError(f"expected an image size of at least 1 pixel, got {self.size}")

    @property
    def channels(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, kw_only=True)
class Split:
    """The data of one erasure.

    Images are uint8 in [0, 255], which `preprocessing` turns into model input, or float tensors that already are
    model input. A zero-glance method takes a split whose `forget` is None: see `zero_glance`.
    """

    forget_classes: tuple[int, ...]  # labels to forget
    retain: Dataset[Sample]  # samples of the other classes: what a method may read
    forget: Dataset[Sample] | None = None  # training samples of the forget classes
    test: Dataset[Sample] | None = None  # held-out samples, of any class; read by evaluation alone
    class_names: tuple[str, ...] = ()  # in label order; empty: unnamed
    preprocessing: Preprocessing | None = None  # needed where images are uint8
    forgotten_before: tuple[int, ...] = ()  # labels that earlier requests removed: their samples are refused too

    def __post_init__(self) -> None:
        for name in ("forget_classes", "forgotten_before"):
            value: Any = getattr(self, name)
            if not isinstance(value, Sequence) or not all(isinstance(label, Integral) for label in value):
                raise InputError(f"expected {name} as labels, whole numbers in a tuple, got {value!r}")

    @property
    def gone(self) -> tuple[int, ...]:
        """The labels that no result shall answer: forgotten now or before."""
        return (*self.forget_classes, *self.forgotten_before)

    def zero_glance(self) -> Split:
        """Return the part of this split that a zero-glance method may see: the retain sample alone."""
        return Split(
            forget_classes=self.forget_classes,
            retain=self.retain,
            class_names=self.class_names,
            preprocessing=self.preprocessing,
            forgotten_before=self.forgotten_before,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyper-parameters of one run of ordinary mini-batch training.

    The schedule one_cycle cycles momentum (SGD's, and Adam's beta1) between 0.95 and 0.85, whatever `momentum` says.
    """

    epochs: int = 1  # passes over the data
    steps: int | None = None  # optimizer steps, over as many passes as they take; overrides epochs
    lr: float = 0.001  # learning rate; the peak where the schedule is one_cycle
    batch_size: int = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9  # SGD alone (Nesterov); not with one_cycle
    weight_decay: float = 0.0
    schedule: Literal["constant", "one_cycle"] = "constant"  # one_cycle: Smith and Topin, arXiv:1708.07120
    flip: bool = False  # mirror each image left-right with probability one half
    crop: int = 0  # pixels of reflection padding before a random crop
    clip_value: float | None = None  # gradient elements are clipped to [-clip_value, clip_value]
    update_norm_statistics: bool = True  # False: running statistics stay as they are
    mode: LayerMode = "train"
    gradient_checkpointing: bool = False  # activations are computed anew in the backward pass: less memory, more time
    precision: Precision = "auto"  # fp32, bf16, or the faster one for model and device: training.precision_for

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"expected steps of at least 1, got {self.steps}")
        for name in ("weight_decay", "momentum", "crop"):
            if not getattr(self, name) >= 0:
                raise InputError(f"expected {name} of at least 0, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"expected a positive learning rate, got {self.lr}")
        if self.clip_value is not None and not self.clip_value > 0:
            raise InputError(f"expected a clip_value above 0, got {self.clip_value}")
        if self.mode not in get_args(LayerMode):
            raise InputError(f"expected mode {', '.join(get_args(LayerMode))}, got {self.mode!r}")
        if self.optimizer not in ("adam", "adamw", "sgd"):
            raise InputError(f"expected optimizer adam, adamw or sgd, got {self.optimizer!r}")
        if self.schedule not in ("constant", "one_cycle"):
            raise InputError(f"expected schedule constant or one_cycle, got {self.schedule!r}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise InputError(f"expected precision auto, fp32 or bf16, got {self.precision!r}")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one phase of a run cost."""

    name: str
    seconds: float  # wall clock
    steps: int  # optimizer steps; where nothing was trained, batches (or images) that were read
    samples: int  # images that went through them, repeats counted
    label_counts: Mapping[int, int]  # the same by label; real data only, so empty for learned noise
    final_loss: float | None  # mean over the last epoch; None where nothing was trained
    signals: str = ""  # what was last read of the model in this phase, in words
    note: str = ""  # what did not go as usual, in words
    precision: str = "fp32"  # of the sums within the model: fp32, or bf16 with float32 weights


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a changed model shows on inputs at hand, none of them of a forget class; see signals.py."""

    phase: str  # in which they were read
    step: int  # of it
    impressions_called: Mapping[str, float]  # share of held-out class impressions still called a forget class, by kind
    class_probability: float  # of the forget classes together: the highest mean over retained images and impressions
    retain_accuracy: float  # on held-out retained images
    retain_agreement: float  # the same, with the original's answer for the label and no forgotten class to answer
    retain_divergence: float  # nats, mean KL(original over retained classes || changed model) on the same images

    @property
    def still_called(self) -> float:
        """The share of impressions still called a forget class, of the kind that is called so most."""
        return max(self.impressions_called.values(), default=0.0)


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """What a calibrated method found, and why it ended."""

    reached: bool | None  # the signals say that the classes are gone, and not too much else; None: they can say nothing
    back: bool  # held-out retained accuracy is where the original's was, with no forgotten class to answer
    why: str  # it ended, as a sentence
    impair_rate: float  # found
    repair_rate: float
    batch_size: int
    held_out: int  # retained images that signals were read on and that nothing was trained on
    trained_on: int = 0  # others that signals were read on although they are trained on: few are held out, or none
    rounds: int  # of impair and repair
    scale: float = 1.0  # that logits were divided by: above 1 of a model surer than usual, below 1 of one less sure
    noise_strength: float = 1.0  # the share that learned noise kept: below 1 where the model answers it too wildly
    trials: tuple[Mapping[str, Any], ...]  # of impair: round, rate, steps, outcome, still_called, retain_agreement
    signals: tuple[Signals, ...]  # in the order they were read


@dataclass(frozen=True, kw_only=True)
class LearnedImages:
    """A handful of the images that a method learned, to be looked at: model input on the CPU."""

    kind: Literal["noise", "impressions"]
    images: Tensor  # (N, channels, H, W)
    labels: Tensor  # (N,) int64, the class that each was learned for
    starts: Tensor | None = None  # what impressions were made from, of the same shape
    start_labels: Tensor | None = None  # (N,) int64, its class


@dataclass(frozen=True, kw_only=True)
class Record:
    """One erasure or audit, as it is written to `record.json`. Keys are documented in docs/record.md."""

    method: str
    config: Mapping[str, Any]
    classes: Mapping[str, Any]
    seed: int | None
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Mapping[str, Any]
    cost: Mapping[str, Any]
    samples_read: Mapping[str, Any]
    environment: Mapping[str, Any]
    checks: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    learned: Mapping[str, Any] | None = None  # a handful of the images a method learned: what the models call them
    audits: Mapping[str, Any] = field(default_factory=dict)  # by name; empty where none was asked for
    self_checks: tuple[Mapping[str, Any], ...] = ()
    verdict: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None  # hashes and links; None of what no command made
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Predictions:
    """A model's answers on a dataset, in its order: logits (N, classes) float32 and labels (N,) int64, on the CPU."""

    logits: Tensor
    labels: Tensor


def has_retrained(metrics: Mapping[str, Any], self_checks: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether there is a retrained model to compare with, in a record's parts: none that was refused as one."""
    refused = any(one.get("name") == "retrained model" and one.get("ok") is False for one in self_checks)
    return bool(metrics.get("retrained")) and not refused

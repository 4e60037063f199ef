"""What every method checks of its split before it touches a sample."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from expunge.batches import as_tensor
from expunge.data import count_labels, normalize
from expunge.errors import InputError
from expunge.schema import Split
from expunge.training import check_float32, check_plain, device_of, evaluating, logits_of


def check_zero_glance(model: nn.Module, split: Split) -> dict[int, int]:
    """Check that a split holds nothing of what is to be forgotten; return the retain sample's label counts.

    Raises:
        InputError: as `check_split` of a method that reads retained samples alone.
    """
    return check_split(model, split, reads=("retain",))


def check_split(model: nn.Module, split: Split, *, reads: Collection[str]) -> dict[int, int]:
    """Check that a split fits the model and what a method reads; return the retain sample's label counts.

    Args:
        reads: as in `Method.reads`. Every split has a retain sample, whose labels are checked whether it is read or
            not; forget samples must be there if "forget" is among `reads`, and must not be there if it is not.

    Raises:
        InputError: the model cannot be copied; there is no class to forget, or all are; a label is out of range; forget
            samples are missing, of other classes, or there unasked; the retain sample is empty or has a sample of a
            forgotten class.
    """
    check_plain(model)
    check_float32(model)
    if not torch.is_grad_enabled():
        raise InputError("expected gradients to be on: call this outside torch.no_grad() and torch.inference_mode()")
    _check_samples(split)
    num_classes = count_classes(model, split)
    check_copyable(model)
    if split.class_names and len(split.class_names) != num_classes:
        raise InputError(
            f"expected {num_classes} class names, as many as the model has logits, got {len(split.class_names)}"
        )
    classes = split.forget_classes
    if not classes:
        raise InputError("expected at least one class to forget, got none")
    if len(set(classes)) < len(classes):
        raise InputError(f"expected each class to forget once, got {list(classes)}")
    outside = [label for label in classes if not 0 <= label < num_classes]
    if outside:
        raise InputError(f"class index {outside[0]} is out of range: expected 0 to {num_classes - 1}")
    gone = set(split.gone)
    if len(gone) >= num_classes:
        raise InputError(f"cannot forget all {num_classes} classes: at least one must be retained")
    if "forget" in reads:
        _check_forget(split)
    elif split.forget is not None:
        raise InputError("this method is zero-glance, but the split carries forget samples: pass split.zero_glance()")
    counts = count_labels(split.retain)
    if not counts:
        raise InputError("expected a retain sample, got an empty one")
    for label in sorted(counts):
        if not 0 <= label < num_classes:
            raise InputError(f"the retain sample has label {label}: expected 0 to {num_classes - 1}")
        if label in gone:
            raise InputError(
                f"the retain sample has {counts[label]} samples of the forgotten class {_name(split, label)}: remove "
                "them (on the command line: --drop-forgotten)"
            )
    return counts


def _check_samples(split: Split) -> None:
    """Check that the first retained sample is an image and a label, or an image, a label and a target."""
    retain: Any = split.retain
    if isinstance(retain, DataLoader):
        raise InputError("expected a torch Dataset of (image, label) to retain, got a DataLoader: hand in its dataset")
    if isinstance(retain, IterableDataset) or (hasattr(retain, "__len__") and len(retain) == 0):
        return  # a stream may have one pass alone
    sample = retain[0]
    if not isinstance(sample, Sequence) or len(sample) != 2:
        got = f"a {type(sample).__name__}" + (f" of {len(sample)}" if isinstance(sample, Sized) else "")
        raise InputError(f"expected samples (image, label) to retain, got {got}: wrap the data set")
    if isinstance(sample[1], Tensor) and sample[1].numel() != 1:
        raise InputError(f"expected labels that are class indices, got a tensor of {tuple(sample[1].shape)}")


def check_copyable(model: nn.Module, image: Tensor | None = None) -> None:
    """Check that a model can be copied as it is, or, with an `image`, after it answered one with gradients: a method
    changes a copy, and some copy what they are training.

    Args:
        image: float (channels, H, W) model input.

    Raises:
        InputError: a module keeps a tensor that was computed from parameters, as torch's old `weight_norm` does.
    """
    if image is not None:
        model = copy.deepcopy(model).eval()
        with torch.enable_grad():
            model(image.unsqueeze(0).to(device_of(model)))
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in MODULE_ITSELF:
                continue
            try:
                copy.deepcopy(value)
            except RuntimeError as error:
                raise InputError(
                    f"the model cannot be copied while it trains: {name or 'it'}.{attribute} keeps what was computed "
                    "from parameters (torch.nn.utils.weight_norm, spectral_norm and prune do: use "
                    "torch.nn.utils.parametrizations, or bake them in with their remove functions; an activation that "
                    "is kept needs a detach())"
                ) from error


MODULE_ITSELF = frozenset(vars(nn.Module()))
"""Attributes that every module has: parameters, modules and hooks, none of which a forward makes."""


def _check_forget(split: Split) -> None:
    """Check that there are forget samples: of each class to forget, and of no other."""
    if split.forget is None:
        raise InputError("this method reads samples of the classes to forget, none were given: set split.forget")
    counts = count_labels(split.forget)
    for label in sorted(counts):
        if label not in split.forget_classes:
            raise InputError(
                f"the forget sample has {counts[label]} samples of class {_name(split, label)}, "
                "which is not to be forgotten: remove them"
            )
    for label in split.forget_classes:
        if label not in counts:
            raise InputError(
                f"this method reads samples of the classes to forget, none were given of {_name(split, label)}"
            )


def _name(split: Split, label: int) -> str:
    return repr(split.class_names[label]) if 0 <= label < len(split.class_names) else str(label)


@torch.no_grad()
def count_classes(model: nn.Module, split: Split) -> int:
    """Return the number of logits the model gives."""
    with evaluating(model):
        image = first_image(split).unsqueeze(0).to(device_of(model))
        return logits_of(model(image)).shape[1]


def first_image(split: Split) -> Tensor:
    """Return one retained image as model input, float (channels, H, W).

    Raises:
        InputError: the retain sample is empty.
    """
    retain: Any = split.retain
    if hasattr(retain, "__len__") and len(retain) == 0:
        raise InputError("expected a retain sample, got an empty one")
    sample = next(iter(retain), None) if isinstance(retain, IterableDataset) else retain[0]
    if sample is None:
        raise InputError("expected a retain sample, got an empty one")
    return normalize(as_tensor(sample[0]).unsqueeze(0), split.preprocessing)[0]

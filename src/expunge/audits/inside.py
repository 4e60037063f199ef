"""What the features of a model still tell of a class, whatever its last layer answers.

A figure means nothing alone: a model that never saw a class also has features by which it can be told from others, so
each is to be read beside the same figure of a retrained model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import Dataset

from expunge.errors import InputError
from expunge.schema import Preprocessing
from expunge.training import evaluating, predict


@dataclass(frozen=True)
class Features:
    """What a model makes of samples before its last layer: values (N, D) float32 and labels (N,) int64, on the CPU."""

    values: Tensor
    labels: Tensor


def features_of(
    model: nn.Module, dataset: Dataset[Any], *, preprocessing: Preprocessing | None = None, layer: str | None = None
) -> Features:
    """Return the input of the model's last layer on every sample, in eval mode; feature maps are averaged over space.

    Args:
        layer: name of the layer whose input is wanted; None: the last linear or convolution layer that runs.

    Raises:
        InputError: the data set is empty, or there is no such layer.
    """
    tapped = _Tapped(copy.deepcopy(model), layer)
    answers = predict(tapped, dataset, preprocessing=preprocessing, phase="features")
    return Features(answers.logits, answers.labels)


def linear_probe(train: Features, test: Features, classes: Sequence[int], *, strength: float = 0.01) -> float:
    """Return the accuracy of a logistic regression on samples of `classes`, in [0, 1].

    It is trained on the features of all classes, standardized by the training features, with L2 regularization.

    Args:
        train: features of training samples, of all classes, those to look for among them.
        test: features of held-out samples of the same model.
        strength: inverse regularization, scikit-learn's C.

    Raises:
        InputError: `test` has no sample of `classes`, or `train` has fewer than two classes.
    """
    chosen = _of(test, classes)
    if len(torch.unique(train.labels)) < 2:
        raise InputError("expected features of at least two classes to train a probe on")
    mean, deviation = train.values.mean(0), train.values.std(0).clamp_min(1e-6)
    probe = LogisticRegression(C=strength, max_iter=300)
    probe.fit(((train.values - mean) / deviation).numpy(), train.labels.numpy())
    found = probe.predict(((chosen.values - mean) / deviation).numpy())
    return float((torch.from_numpy(found) == chosen.labels).double().mean())


def nearest_class_mean(train: Features, test: Features, classes: Sequence[int]) -> float:
    """Return the accuracy, on samples of `classes`, of answering with the nearest mean feature, in [0, 1].

    Args:
        train: features of training samples, of all classes: their means are the prototypes.
        test: features of held-out samples of the same model.

    Raises:
        InputError: `test` has no sample of `classes`.
    """
    chosen = _of(test, classes)
    labels = torch.unique(train.labels)
    means = torch.stack([train.values[train.labels == label].mean(0) for label in labels])
    nearest = labels[torch.cdist(chosen.values, means).argmin(1)]
    return float((nearest == chosen.labels).double().mean())


def _of(features: Features, classes: Sequence[int]) -> Features:
    wanted = torch.isin(features.labels, torch.tensor(list(classes)))
    if not wanted.any():
        raise InputError("expected held-out samples of the forgotten classes, found none")
    return Features(features.values[wanted], features.labels[wanted])


class _Tapped(nn.Module):
    """Gives the input of one layer instead of the model's answer."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        if self.layer is None:
            self.layer = self._last(images[:1])
        caught: list[Tensor] = []
        modules = dict(self.model.named_modules())
        if self.layer not in modules:
            raise InputError(f"the model has no layer {self.layer!r}")
        handle = modules[self.layer].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            self.model(images)
        finally:
            handle.remove()
        if not caught:
            raise InputError(f"the layer {self.layer!r} does not run when the model answers")
        values = caught[-1]
        return values.flatten(2).mean(2) if values.ndim > 3 else values.flatten(1)

    def _last(self, image: Tensor) -> str:
        """Return the name of the last linear or convolution layer that runs."""
        ran: list[str] = []
        handles = [
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
        try:
            with evaluating(self.model):
                self.model(image)
        finally:
            for handle in handles:
                handle.remove()
        if not ran:
            raise InputError("the model runs no linear or convolution layer: name the one to look at")
        return ran[-1]

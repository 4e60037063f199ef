"""Attacks that try to bring a forgotten class back: by its head row, by its whole head, by a few images.

Each changes a copy of the model and measures held-out samples of the forgotten classes, at a set share of retained ones
that are called forgotten: a row that takes in its neighbours finds a class in any model. Something comes back in models
that never saw the class, too, so all is read beside the retrained model's.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from expunge.audits.core import Audit, AuditData, Context, Found, Need, Subject
from expunge.audits.inside import HEAD_INPUT, Features, last_layer
from expunge.audits.inside_audits import HELD_OUT, LINEAR_PROBE, NEAREST_CLASS_MEAN, drawn, training_sample
from expunge.audits.relearn import RELEARN
from expunge.batches import as_tensor
from expunge.data import TensorImages, labels_of, normalize
from expunge.errors import InputError
from expunge.metrics.uncertainty import Measurement, of_hits, of_seeds, of_values
from expunge.schema import Predictions, TrainConfig
from expunge.training import device_of, predict, train

SHOTS = 20  # training images of each forgotten class that a prototype is the mean of
DRAWS = 5  # of those images; hits are averaged over them
HEAD_TRAINING = TrainConfig(steps=25, lr=0.01)  # of standardized features; more bring back no more
FEW_SHOTS = (1, 5, 20)  # training images of each forgotten class
# at 1e-3 the ten images of one shot leave a CIFAR-10 ResNet18 with 22 % of retained images right, at 1e-4 with 75 %;
# 10 or 20 steps bring back no more than 5
FEW_SHOT_TRAINING = TrainConfig(steps=5, lr=1e-4, batch_size=64, update_norm_statistics=False)
FEW_SHOT_DRAWS = 4  # of the images: of one image a class, one draw brings back 8 %, another 30 %
RETAINED_SHARE = 9  # retained images at most for one forgotten image: as many as there are of ten classes
FEW_SHOT_HELD_OUT = 200  # held-out samples of each side: the draws tell more apart than the samples do
FALSE_CALLS = 0.2  # retained samples called forgotten, for each forgotten sample, were there as many of every class
MOST_FALSE_CALLS = 0.5  # of retained samples, where most classes are forgotten
CHECKED = 64  # images that a head is compared with the model's logits on
ROUNDING = 1e-3  # of the largest logit, by which both may differ


@dataclass(frozen=True)
class Head:
    """The last layer of a model, on the CPU: it gives the logits (N, C) of features (N, D)."""

    layer: str  # its name
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)

    def logits(self, features: Tensor) -> Tensor:
        """Return (N, C)."""
        return features @ self.weight.T + self.bias


def head_of(subject: Subject, dataset: Dataset[Any]) -> Head:
    """Return the last layer of a model, which gives its logits.

    Raises:
        InputError: it is no linear layer or 1 x 1 convolution, or logits are made from its answer in another way.
    """
    first: Any = dataset[0]
    image = normalize(as_tensor(first[0]).unsqueeze(0).to(device_of(subject.model)), subject.preprocessing)
    name = last_layer(subject.model, image)
    layer: Any = subject.model.get_submodule(name)
    if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.weight.shape[1] != layer.in_channels):
        raise InputError(f"expected a last layer that is linear in the mean feature, got the convolution {name!r}")
    weight = layer.weight.detach().cpu().flatten(1).clone()
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().clone()
    head = Head(name, weight, bias)
    rows = range(min(CHECKED, len(dataset)))  # type: ignore[arg-type]
    some = Subset(dataset, list(rows))
    features, logits = subject.features(some).values, subject.answers(some).logits
    if not torch.isfinite(logits).all():
        raise InputError("expected finite logits, got NaN or infinite ones: the model gives those")
    fits = features.shape[1] == weight.shape[1] and logits.shape[1] == len(weight)
    if not fits or not torch.allclose(head.logits(features), logits, rtol=0, atol=ROUNDING * float(logits.abs().max())):
        raise InputError(f"expected logits that are the answer of the last layer {name!r}: they are made from it")
    return head


def imprinted(head: Head, prototypes: Mapping[int, Tensor], center: Tensor, kept: Sequence[int]) -> Head:
    """Return the head with the rows of some classes set so that they answer to a prototype feature.

    Such a row is the mean retained row plus the direction from `center` to the prototype, as long as retained rows lie
    from their mean on average. Its bias makes it answer at the center as retained rows do on average. (The prototype
    itself for a row answers to what all features share: with it a retrained CIFAR-10 ResNet18 calls 95 % of retained
    images wrong.) Adding one vector to all rows changes nothing.
    Source: imprinting of Qi et al., arXiv:1712.07136; as an attack arXiv:2506.01318.

    Args:
        prototypes: mean feature (D,) by class.
        center: (D,) mean feature of retained classes.
        kept: labels of the retained classes.
    """
    weight, bias = head.weight.clone(), head.bias.clone()
    rows = head.weight[list(kept)]
    mean_row, mean_bias = rows.mean(0), head.bias[list(kept)].mean()
    length = (rows - mean_row if len(rows) > 1 else rows).norm(dim=1).mean()  # a single row is its own mean
    for label, prototype in prototypes.items():
        direction = prototype - center
        step = length * direction / direction.norm().clamp_min(1e-12)
        weight[label] = mean_row + step
        bias[label] = mean_bias - step @ center
    return Head(head.layer, weight, bias)


def retrained_head(
    head: Head,
    features: Features,
    forgotten: Sequence[int],
    kept: Sequence[int],
    *,
    seed: int,
    config: TrainConfig = HEAD_TRAINING,
) -> Head:
    """Return the head after training it alone, from where it is, on features of all classes.

    Before, the bias of each forgotten row is set so that at the mean feature it answers as retained rows do on average:
    a low bias hides a class and forgets nothing, but takes many steps to climb. Features are standardized meanwhile, so
    that the learning rate means the same for every model.

    Args:
        forgotten: labels of the forgotten classes, and `kept` of the retained ones.

    Raises:
        InputError: there are none. DivergedError: the loss became NaN.
    """
    mean, deviation = features.values.mean(0), features.values.std(0)
    deviation = torch.where(deviation > 1e-6, deviation, torch.ones(()))
    linear = nn.Linear(head.weight.shape[1], len(head.weight), device="meta").to_empty(device="cpu")  # draws nothing
    with torch.no_grad():
        linear.weight.copy_(head.weight * deviation)
        linear.bias.copy_(head.bias + head.weight @ mean)
        linear.bias[list(forgotten)] = linear.bias[list(kept)].mean()
    as_images = ((features.values - mean) / deviation).view(*features.values.shape, 1, 1)
    train(nn.Sequential(nn.Flatten(), linear), TensorImages(as_images, features.labels), config, seed=seed)
    weight = linear.weight.detach() / deviation
    return Head(head.layer, weight, linear.bias.detach() - weight @ mean)


def with_head(model: nn.Module, head: Head) -> nn.Module:
    """Return a copy of a model with this head for its last layer; all its parameters can be trained."""
    changed = copy.deepcopy(model).requires_grad_(True)
    classes, width = head.weight.shape
    layer: nn.Linear | nn.Conv2d = nn.Linear(width, classes, device="meta")  # draws nothing from the random state
    if isinstance(changed.get_submodule(head.layer), nn.Conv2d):
        layer = nn.Conv2d(width, classes, 1, device="meta")
    layer = layer.to_empty(device=device_of(changed))
    assert layer.bias is not None  # both are made with one
    with torch.no_grad():
        layer.weight.copy_(head.weight.view_as(layer.weight))
        layer.bias.copy_(head.bias)
    parent, _, name = head.layer.rpartition(".")
    setattr(changed.get_submodule(parent), name, layer)
    return changed


def matched_hits(
    forget: Predictions, retain: Predictions, gone: Sequence[int], kept: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return which forgotten (N,) and which retained samples (M,) are answered rightly, at a set rate of false calls.

    One number is added to the logits of all forgotten classes, such that the share of retained samples called forgotten
    is `FALSE_CALLS` times the number of forgotten classes for each retained one. So neither a low bias hides a class,
    nor does a high one find it. Where logits tie, fewer are called so.

    Args:
        forget: answers on held-out samples of the forgotten classes, and `retain` of the retained ones.
        gone: labels of the forgotten classes, and `kept` of the retained ones; other logits count for nothing.
    """
    own, others = torch.tensor(gone), torch.tensor(kept)

    def lead(logits: Tensor) -> Tensor:
        return logits[:, own].max(1).values - logits[:, others].max(1).values

    share = min(MOST_FALSE_CALLS, FALSE_CALLS * len(gone) / len(kept))
    leads = lead(retain.logits)
    shift = leads.sort(descending=True).values[int(share * len(leads))]
    found = own[forget.logits[:, own].argmax(1)] == forget.labels
    stayed = others[retain.logits[:, others].argmax(1)] == retain.labels
    return (lead(forget.logits) > shift) & found, (leads <= shift) & stayed


# Audits


def _prototype(subject: Subject, data: AuditData, context: Context) -> Found:
    sides = _held_out(data, HELD_OUT, context.seed)
    head = head_of(subject, sides["forget"])
    known = _head_input(subject, training_sample(data, seed=context.seed))
    center, kept = _center(known, data.forget_classes), _kept(data, head)
    attacks = []
    for draw in range(DRAWS):
        seed = context.seed * DRAWS + draw
        shots = {c: drawn(known.labels, c, seed=seed)[:SHOTS] for c in _present(known.labels, data.forget_classes)}
        means = {label: known.values[rows].mean(0) for label, rows in shots.items()}
        attacks.append(imprinted(head, means, center, kept))
    return _of_heads(subject, data, sides, attacks, {"shots": SHOTS, "draws": DRAWS})


def _head_only(subject: Subject, data: AuditData, context: Context) -> Found:
    sides = _held_out(data, HELD_OUT, context.seed)
    head = head_of(subject, sides["forget"])
    known = _head_input(subject, training_sample(data, seed=context.seed))
    attack = retrained_head(head, known, data.forget_classes, _kept(data, head), seed=context.seed)
    details = {"steps": HEAD_TRAINING.steps, "training_images": len(known.labels)}
    return _of_heads(subject, data, sides, [attack], details)


def _few_shot(subject: Subject, data: AuditData, context: Context) -> Found:
    sides = _held_out(data, FEW_SHOT_HELD_OUT, context.seed)
    head = head_of(subject, sides["forget"])
    kept = _kept(data, head)
    figures: dict[str, Measurement] = {}
    details: dict[str, Any] = {"steps": FEW_SHOT_TRAINING.steps, "lr": FEW_SHOT_TRAINING.lr, "draws": FEW_SHOT_DRAWS}
    for shots in _shots(data):
        found: dict[str, list[Tensor]] = {f"{shots}": [], f"retain after {shots}": []}
        details[f"as answered after {shots}"] = []
        for draw in range(FEW_SHOT_DRAWS):
            seed = context.seed * FEW_SHOT_DRAWS + draw
            images = few_images(data, shots, seed=seed)
            known = subject.features(images)
            means = {c: known.values[known.labels == c].mean(0) for c in _present(known.labels, data.forget_classes)}
            student = with_head(subject.model, imprinted(head, means, _center(known, data.forget_classes), kept))
            train(
                student, images, FEW_SHOT_TRAINING, seed=seed, preprocessing=subject.preprocessing,
                journal=subject.journal, phase=f"{shots}-shot recovery",
            )  # fmt: skip
            answers = {
                side: predict(student, part, preprocessing=subject.preprocessing) for side, part in sides.items()
            }
            hits = matched_hits(answers["forget"], answers["retain"], data.forget_classes, kept)
            for values, hit in zip(found.values(), hits, strict=True):
                values.append(hit.double().mean())
            details[f"as answered after {shots}"].append(_as_answered(answers))
        figures |= {name: of_seeds(torch.stack(values)) for name, values in found.items()}
    return Found(figures, details)


def _shots(data: AuditData) -> list[int]:
    """Return those of FEW_SHOTS of which draws can differ: some forgotten class has more training images.

    Raises:
        InputError: there are none of the forgotten classes, or too few for any.
    """
    known = Counter(labels_of(data.part("train", forget=True)).tolist())
    chosen = [shots for shots in FEW_SHOTS if shots < max(known.values())]
    if not chosen:
        raise InputError("expected at least two training images of a forgotten class, to draw some of them, got one")
    return chosen


def _of_heads(
    subject: Subject, data: AuditData, sides: Mapping[str, Dataset[Any]], heads: Sequence[Head], details: dict[str, Any]
) -> Found:
    """Return what models with these heads find: hits are averaged over them."""
    asked = {side: _head_input(subject, part) for side, part in sides.items()}
    answers = [
        {side: Predictions(head.logits(part.values), part.labels) for side, part in asked.items()} for head in heads
    ]
    kept = _kept(data, heads[0])
    hits = [matched_hits(one["forget"], one["retain"], data.forget_classes, kept) for one in answers]
    figures = {
        f"{side} accuracy": of_values(torch.stack([hit[number].double() for hit in hits]).mean(0))
        for number, side in enumerate(("forget", "retain"))
    }
    return Found(figures, details | {"as answered": [_as_answered(one) for one in answers]})


def _as_answered(answers: Mapping[str, Predictions]) -> dict[str, float]:
    """Return the accuracy on each side with no logit shifted."""
    return {f"{side} accuracy": of_hits(part.logits, part.labels).value for side, part in answers.items()}


def few_images(data: AuditData, shots: int, *, seed: int) -> Subset[Any]:
    """Return `shots` training images of each class, of retained ones nine for one forgotten at most.

    The forgotten ones of fewer shots are among those of more.

    Raises:
        InputError: there are none of the forgotten classes, or of the retained ones.
    """
    for forget in (True, False):
        data.part("train", forget=forget, most=1)  # says what is missing
    assert data.train is not None  # it has a part
    labels = torch.from_numpy(labels_of(data.train))
    rows = {c: drawn(labels, c, seed=seed)[:shots] for c in torch.unique(labels).tolist()}
    forgotten = torch.cat([rows[c] for c in _present(labels, data.forget_classes)])
    retained = torch.cat([rows[c] for c in rows if c not in data.gone])
    order = torch.randperm(len(retained), generator=torch.Generator().manual_seed(seed))
    return Subset(data.train, [*forgotten.tolist(), *retained[order[: RETAINED_SHARE * len(forgotten)]].tolist()])


def _held_out(data: AuditData, most: int, seed: int) -> dict[str, Subset[Any]]:
    return {side: data.part("test", forget=side == "forget", most=most, seed=seed) for side in ("forget", "retain")}


def _head_input(subject: Subject, dataset: Dataset[Any]) -> Features:
    """Return the features before the head, from the pass over the data that probes of all blocks need as well."""
    return subject.blocks(dataset)[HEAD_INPUT]


def _center(features: Features, forget_classes: Sequence[int]) -> Tensor:
    """Return the mean of the mean features (D,) of the retained classes."""
    labels = [label for label in torch.unique(features.labels).tolist() if label not in forget_classes]
    return torch.stack([features.values[features.labels == label].mean(0) for label in labels]).mean(0)


def _kept(data: AuditData, head: Head) -> list[int]:
    return [c for c in range(len(head.bias)) if c not in data.forget_classes and c not in data.forgotten_before]


def _present(labels: Tensor, classes: Sequence[int]) -> list[int]:
    return [label for label in classes if bool((labels == label).any())]


NEEDS: tuple[Need, ...] = ("forget test", "retain test", "forget train", "retain train")

PROTOTYPE = Audit(
    name="prototype",
    says="how many held-out samples of the forgotten classes come back when their head rows are set to a mean feature",
    source="Ha et al., arXiv:2506.01318; imprinting of Qi et al., arXiv:1712.07136",
    needs=NEEDS,
    targets={"forget accuracy": "retrained", "retain accuracy": "none"},
    run=_prototype,
)

HEAD_ONLY = Audit(
    name="head_only",
    says="how many held-out samples of the forgotten classes come back when the head alone is trained on all classes",
    source="Gao et al., arXiv:2604.08271; Jeon et al., arXiv:2405.17878",
    needs=NEEDS,
    targets={"forget accuracy": "retrained", "retain accuracy": "none"},
    run=_head_only,
)

FEW_SHOT = Audit(
    name="few_shot",
    says="how many held-out samples of the forgotten classes come back when the model is fine-tuned on a few images",
    source="Ha et al., arXiv:2506.01318, with fine-tuning",
    needs=NEEDS,
    targets={**{f"{shots}": "retrained" for shots in FEW_SHOTS}, "retain after *": "none"},
    run=_few_shot,
)

INSIDE_AUDITS: tuple[Audit, ...] = (LINEAR_PROBE, NEAREST_CLASS_MEAN, PROTOTYPE, HEAD_ONLY, FEW_SHOT, RELEARN)
"""The audits that look inside a model, and those that try to bring a class back."""

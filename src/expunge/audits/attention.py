"""Where a model looks: which places of an image speak for a class, and whether they are still the original's."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from expunge.audits.core import Audit, AuditData, Context, Found, Subject
from expunge.audits.membership import answers_of
from expunge.batches import as_tensor
from expunge.data import labels_of, normalize
from expunge.errors import InputError
from expunge.metrics.uncertainty import of_values
from expunge.pictures import as_png, eight_bits, lit
from expunge.randomness import seeded
from expunge.training import device_of, evaluating, logits_of

SAMPLES = 200  # of either side: the interval of a mean correlation is then a few hundredths each way
SMALLEST = 4  # places a side that a map must have to say where
LARGEST = 8  # and to which a map of pixels is averaged, since a single pixel's gradient is noise
BATCH = 64


def attack_attention(subject: Subject, data: AuditData, context: Context) -> Found:
    """Compare a model's maps with the original's, sample by sample: see `WHERE_IT_LOOKS`.

    The map of a forgotten sample is of its own class' logit, that of a retained one of the class that the original
    answers: both models explain the same class. The figure is Spearman's correlation of the two maps over places, in
    [-1, 1]: 1 where both look at the same places, 0 where the one does not tell what the other does; a map without any
    variation counts as 0. The original against itself is 1.
    """
    figures = {}
    maps, parts = {}, {}
    for name, forget in (("forget", True), ("retain", False)):
        chosen = data.part("test", forget=forget, most=SAMPLES, seed=context.seed)
        targets = torch.from_numpy(labels_of(chosen))
        if not forget:
            targets = answers_of(context.original, data, chosen).logits.argmax(1)
        own, original = (_maps_once(model, data, chosen, targets) for model in (subject, context.original))
        if own.shape != original.shape:
            places = [tuple(maps.shape[1:]) for maps in (original, own)]
            raise InputError(f"expected maps of {places[0]} places, as the original's, got {places[1]}")
        figures[name] = of_values(rank_correlations(own.flatten(1), original.flatten(1)))
        maps[name], parts[name] = own, (chosen, targets)
    layer = map_layer(subject.model, _images(data.test, [0], subject))
    details: dict[str, Any] = {"map": f"Grad-CAM at {layer}" if layer else "gradient of the input"}
    if context.pictures is not None:
        for name, (chosen, targets) in parts.items():
            _take_pictures(name, subject, data, chosen, targets, maps[name], context)
    return Found(figures, details)


PICTURES = 4  # samples of either side that are shown, where pictures are asked for


def _take_pictures(
    side: str, subject: Subject, data: AuditData, chosen: Subset[Any], targets: Tensor, maps: Tensor, context: Context
) -> None:
    """Put a few samples, evenly spread over those that were looked at, into the pictures, each also lit by its map."""
    assert context.pictures is not None
    shown = context.pictures.setdefault("where_it_looks", {})
    count = min(PICTURES, len(chosen))
    for number in range(count):
        row = number * len(chosen) // count
        image, label = eight_bits(as_tensor(chosen[row][0]), subject.preprocessing), int(targets[row])
        name = data.class_names[label] if data.class_names else str(label)
        kept = shown.setdefault(f"{side} {number + 1}", {"class": name, "picture": as_png(image), "lit": {}})
        kept["lit"][subject.role] = as_png(lit(image, maps[row]))


def rank_correlations(one: Tensor, other: Tensor) -> Tensor:
    """Return Spearman's correlation of each row of (N, D) with the same row of another, (N,) in [-1, 1].

    0 where all values of a row are the same.
    """
    from scipy import stats  # half a second that only an audit shall take

    ranks = [torch.from_numpy(stats.rankdata(values.numpy(), axis=1)) for values in (one, other)]
    centred = [values - values.mean(1, keepdim=True) for values in ranks]
    norms = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return torch.where(norms > 0, (centred[0] * centred[1]).sum(1) / norms.clamp_min(1e-12), 0.0)


def map_layer(model: nn.Module, image: Tensor) -> str | None:
    """Return the last layer or block to finish whose output is at least SMALLEST places a side, to take Grad-CAM at.

    One that runs several times (a ReLU that is shared) has no one map and is passed over, and so is adaptive pooling,
    which spreads small maps out. None for a model with fewer than two convolutions, such as a vision transformer, whose
    only maps are its patches before it looked at any; and for one whose maps are all smaller.

    Args:
        image: (1, channels, H, W) model input.
    """
    ran: list[tuple[str, bool]] = []  # name of each module, in the order they finish, and whether its output is a map

    def note(name: str, output: Any) -> None:
        ran.append((name, isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= SMALLEST))

    modules = {name: module for name, module in model.named_modules() if name}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad(), evaluating(model), seeded(0):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(name for name, _ in ran)
    convolutions = [name for name in times if isinstance(modules[name], nn.Conv2d)]
    pooled = {name for name in times if isinstance(modules[name], nn.AdaptiveAvgPool2d)}
    maps = [name for name, is_map in ran if is_map and times[name] == 1 and name not in pooled]
    return maps[-1] if maps and len(convolutions) > 1 else None


def maps_of(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Return where each image speaks for its target class, (N, H, W) on the CPU; see `WHERE_IT_LOOKS`.

    Grad-CAM at `map_layer`, signed, so that places which speak against the class count too; for a model without such a
    layer the magnitude of the gradient of the input, averaged over squares.

    Args:
        model: it is not changed. images: (N, channels, H, W) model input. targets: (N,) classes.

    Raises:
        InputError: the maps are NaN or infinite.
    """
    from captum.attr import LayerGradCam, Saliency  # type: ignore[import-untyped]  # here: its import is slow

    layer = map_layer(model, images[:1])
    frozen = _Logits(copy.deepcopy(model).eval().requires_grad_(False))
    maps = []
    for batch, classes in zip(torch.split(images, BATCH), torch.split(targets, BATCH), strict=True):
        shown = batch.clone().requires_grad_()
        with torch.enable_grad(), seeded(0):
            if layer is not None:
                method = LayerGradCam(frozen, frozen.model.get_submodule(layer))
                found = method.attribute(shown, classes.to(shown.device))[:, 0]
            else:
                found = Saliency(frozen).attribute(shown, classes.to(shown.device)).amax(1)
                found = F.adaptive_avg_pool2d(found, (min(found.shape[1], LARGEST), min(found.shape[2], LARGEST)))
        maps.append(found.detach().float().cpu())
    whole = torch.cat(maps)
    if not bool(whole.isfinite().all()):
        raise InputError("the maps of the model are NaN or infinite: it looks nowhere that could be compared")
    return whole


class _Logits(nn.Module):
    """A model that answers with the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def _maps_once(subject: Subject, data: AuditData, chosen: Subset[Any], targets: Tensor) -> Tensor:
    """Return the maps of samples, computed once for each model."""
    key = ("maps", id(data.test), tuple(chosen.indices), tuple(targets.tolist()))
    maps: Tensor = subject.once(
        key, chosen, lambda: maps_of(subject.model, _images(chosen, range(len(chosen)), subject), targets)
    )
    return maps


def _images(dataset: Any, rows: Any, subject: Subject) -> Tensor:
    """Return samples as model input, on the model's device."""
    images = torch.stack([as_tensor(dataset[row][0]) for row in rows])
    return normalize(images.to(device_of(subject.model)), subject.preprocessing)


WHERE_IT_LOOKS = Audit(
    name="where_it_looks",
    says="How far the places that speak for a class are still those of the original model, as a rank correlation of "
    "Grad-CAM maps: of the forgotten class on its images, of the original's answer on retained ones; 1: the same.",
    source="Selvaraju et al., Grad-CAM, arXiv:1610.02391 (without maps Simonyan et al., arXiv:1312.6034); captum",
    needs=("forget test", "retain test"),
    targets={"forget": "retrained", "retain": "none"},
    run=attack_attention,
)

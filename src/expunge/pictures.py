"""Images as small PNG in base64, for a record and its page; and what two models call those that a method learned."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from expunge.data import TensorImages
from expunge.schema import LearnedImages, Preprocessing
from expunge.training import predict

LARGEST = 96  # pixels of the longer side; larger pictures are made smaller
NOISE_SIDE = 32  # pixels of a side of noise that are shown, from its middle: made smaller, noise would turn grey
DARKEST = 0.12  # of its brightness is left of a place that does not speak for a class


def eight_bits(image: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    """Return an image (channels, H, W), uint8 or model input, as uint8; what is beyond black and white is cut off."""
    if not image.is_floating_point():
        return image
    if preprocessing is not None:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        image = image * std + mean
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def as_png(image: Tensor) -> str:
    """Return an image (channels, H, W), uint8, as PNG in base64, no larger than LARGEST; grey unless 3 channels."""
    pixels = image if len(image) == 3 else image.float().mean(0, keepdim=True).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    picture.thumbnail((LARGEST, LARGEST))
    held = io.BytesIO()
    picture.save(held, "PNG", optimize=True)
    return base64.b64encode(held.getvalue()).decode()


def lit(image: Tensor, places: Tensor) -> Tensor:
    """Return an image (channels, H, W), uint8, bright where `places` (h, w) are high and dark where they are not.

    A place at zero or below, which does not speak for the class or speaks against it, is as dark as can be.
    """
    light = F.interpolate(places.clamp_min(0)[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0]
    share = DARKEST + (1 - DARKEST) * light / light.max().clamp_min(1e-12)
    return (image.float() * share).round().to(torch.uint8)


def noise_picture(image: Tensor, preprocessing: Preprocessing | None) -> str:
    """Return the middle of learned noise (channels, H, W), model input, as PNG in base64."""
    top, left = (max(0, (side - NOISE_SIDE) // 2) for side in image.shape[1:])
    return as_png(eight_bits(image, preprocessing)[:, top : top + NOISE_SIDE, left : left + NOISE_SIDE])


def learned_record(
    learned: Sequence[LearnedImages],
    original: nn.Module,
    unlearned: nn.Module,
    names: Sequence[str],
    preprocessing: Preprocessing | None,
    pictures: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return what both models call a handful of learned images, None where none was learned; see docs/record.md.

    Noise is shown: it began as Gaussian noise, and nobody's image went into it. Impressions begin as retained images:
    they and their starts go into `pictures`, if anywhere.
    """
    found: dict[str, Any] = {}
    for one in learned:
        rows = torch.arange(len(one.labels))
        shares = [
            predict(model, TensorImages(one.images, one.labels)).logits.double().softmax(1)[rows, one.labels].tolist()
            for model in (original, unlearned)
        ]
        told = found.setdefault(one.kind, [])
        for row, label in enumerate(one.labels.tolist()):
            image: dict[str, Any] = {"class": names[label], "before": shares[0][row], "after": shares[1][row]}
            if one.kind == "noise":
                image["picture"] = noise_picture(one.images[row], preprocessing)
            elif one.starts is not None and one.start_labels is not None:
                image["start"] = names[int(one.start_labels[row])]
                if pictures is not None:
                    start, end = (as_png(eight_bits(part[row], preprocessing)) for part in (one.starts, one.images))
                    pictures.setdefault("impressions", {})[str(len(told) + 1)] = {"start": start, "picture": end}
            told.append(image)
    return found or None

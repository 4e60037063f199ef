"""From a string to a model: torchvision, timm, transformers, the paper's All-CNN-C, or the user's own file."""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from expunge.errors import InputError, first_line
from expunge.randomness import seeded
from expunge.schema import Preprocessing
from expunge.training import check_plain, device_of, evaluating, logits_of


@dataclass(frozen=True)
class ModelSpec:
    """A model string taken apart: `family:name?argument=value&...`."""

    text: str
    family: str  # torchvision, timm, hf, allcnn or file
    name: str
    arguments: Mapping[str, Any]


def parse_model(text: str) -> ModelSpec:
    """Take a model string apart: `torchvision:NAME`, `timm:NAME`, `hf:NAME`, `allcnn` or `path/to/file.py:function`,
    each with constructor arguments after `?`.

    Raises:
        InputError: it is none of these.
    """
    body, _, query = text.partition("?")
    arguments = {key: _value(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    family, _, name = body.partition(":")
    if body == "allcnn":
        return ModelSpec(text, "allcnn", "allcnn", arguments)
    if family in ("torchvision", "timm", "hf") and name:
        return ModelSpec(text, family, name, arguments)
    path, _, function = body.rpartition(":")
    if path.endswith(".py"):
        return ModelSpec(text, "file", f"{path}:{function}", arguments)
    raise InputError(
        f"unknown model {text!r}: expected torchvision:NAME, timm:NAME, hf:NAME, allcnn or path/to/file.py:function"
    )


def build_model(spec: ModelSpec, *, num_classes: int, channels: int) -> nn.Module:
    """Build the model with fresh weights (or those its arguments name), `num_classes` outputs, on the CPU.

    Raises:
        InputError: there is no such model, it refuses its arguments, or the user's file fails.
    """
    builders: dict[str, Callable[[ModelSpec, int, int], nn.Module]] = {
        "torchvision": lambda spec, classes, _: _torchvision(spec, classes),
        "timm": lambda spec, classes, _: _timm(spec, classes),
        "hf": lambda spec, classes, _: _transformers(spec, classes),
        "allcnn": _allcnn,
        "file": _from_file,
    }
    try:
        model = builders[spec.family](spec, num_classes, channels)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a builder, the user's among them, may raise anything
        raise InputError(f"cannot build model {spec.text!r}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"expected {spec.text!r} to give a torch.nn.Module, got {type(model).__name__}")
    return model.float()


def takes_channels(spec: ModelSpec) -> int | None:
    """Return the number of input channels a model was built for, or None where it takes what the data has."""
    if spec.family == "torchvision":
        return 3
    if spec.family == "timm":
        return int(spec.arguments.get("in_chans", 3))
    if spec.family == "hf":
        return 3
    if spec.family == "allcnn":
        return None
    return None if "channels" in inspect.signature(_load_function(spec)).parameters else 3


def zoo_preprocessing(spec: ModelSpec, model: nn.Module) -> Preprocessing | None:
    """Return the preprocessing that the model's zoo states, or None where it states none.

    timm states one for each architecture, transformers for each saved model, torchvision for each set of weights
    (so only with `?weights=...`).
    """
    if spec.family == "timm":
        from timm.data import resolve_model_data_config

        stated = resolve_model_data_config(model)
        size = spec.arguments.get("img_size", stated["input_size"][1:])
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = stated["input_size"][0]
        mean, std = _per_channel(stated["mean"], channels), _per_channel(stated["std"], channels)
        return Preprocessing(size=size, mean=mean, std=std, source="timm")
    if spec.family == "torchvision" and spec.arguments.get("weights"):
        import torchvision

        weights = torchvision.models.get_weight(_weights_name(spec))
        stated = weights.transforms()
        side = stated.crop_size[0]
        return Preprocessing(size=(side, side), mean=tuple(stated.mean), std=tuple(stated.std), source="torchvision")
    if spec.family == "hf":
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(spec.name)
        except (OSError, ValueError):
            return None
        return _stated_by(processor, spec)
    return None


def _stated_by(processor: Any, spec: ModelSpec) -> Preprocessing:
    """Return what an image processor of transformers makes of images.

    Raises:
        InputError: it does what a `Preprocessing` cannot say.
    """

    def asked(what: str) -> Any:
        return getattr(processor, what, None)

    scale = asked("rescale_factor")
    other = "swaps their colours" if asked("do_flip_channel_order") else None
    if not asked("do_rescale") or (scale is not None and abs(255 * scale - 1) > 1e-6):
        other = "does not bring them to [0, 1]"
    if other is not None:
        raise InputError(
            f"the image processor of {spec.text} {other}, which is not supported: name a file with a model that does "
            "so itself, as path/to/file.py:function"
        )
    size = asked("crop_size") if asked("do_center_crop") and asked("crop_size") else processor.size
    height = size.get("height") or size.get("shortest_edge")
    width = size.get("width") or height
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if asked("do_normalize"):
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Preprocessing(size=(height, width), mean=mean, std=std, source="hf")


def check_model(model: nn.Module, preprocessing: Preprocessing, num_classes: int) -> None:
    """Try the model on two grey images.

    Raises:
        InputError: it refuses their shape, or does not give `num_classes` logits.
    """
    check_plain(model)
    shape = (preprocessing.channels, *preprocessing.size)
    try:
        with torch.no_grad(), evaluating(model):
            width = logits_of(model(torch.zeros((2, *shape), device=device_of(model)))).shape[1]
    except InputError:
        raise
    except Exception as error:  # the user's forward may raise anything
        raise InputError(
            f"the model does not take images of shape {shape}: {first_line(error)}; see --size and --channels"
        ) from error
    if width != num_classes:
        raise InputError(f"the model gives {width} logits, the data has {num_classes} classes")


@torch.no_grad()
def reinitialized(model: nn.Module, *, seed: int) -> nn.Module:
    """Return a copy of `model`, in eval mode, that knows nothing: each module draws its parameters anew from `seed`.

    Parameters that no module can draw (class tokens, positions) become normal with the deviation of their old values.
    """
    fresh = copy.deepcopy(model).eval()
    left = {id(parameter): parameter for parameter in fresh.parameters()}
    with seeded(seed):
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                for parameter in module.parameters(recurse=False):
                    left.pop(id(parameter), None)
        for parameter in left.values():
            deviation = parameter.std().item() if parameter.numel() > 1 else 0.0
            parameter.normal_(0.0, deviation if deviation > 0 else 0.02)
    return fresh


class AllCNN(nn.Module):
    """All-CNN-C: nine convolutions and no fully connected layer, for 32 x 32 images (any size from 8 x 8 on works).

    Source: Springenberg et al., Striving for Simplicity, arXiv:1412.6806, table 1. BatchNorm after each convolution,
    as the unlearning papers use it; `batch_norm=False` gives the original. `width` is that of the first stage, and the
    others have twice as many channels.
    """

    def __init__(
        self, num_classes: int, channels: int = 3, *, width: int = 96, batch_norm: bool = True, dropout: bool = True
    ) -> None:
        super().__init__()

        def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=not batch_norm)
            return [layer, *([nn.BatchNorm2d(outputs)] if batch_norm else []), nn.ReLU(inplace=True)]

        def drop(share: float) -> list[nn.Module]:
            return [nn.Dropout(share)] if dropout else []

        self.features = nn.Sequential(
            *drop(0.2),
            *convolution(channels, width, 3),
            *convolution(width, width, 3),
            *convolution(width, width, 3, 2),
            *drop(0.5),
            *convolution(width, 2 * width, 3),
            *convolution(2 * width, 2 * width, 3),
            *convolution(2 * width, 2 * width, 3, 2),
            *drop(0.5),
            *convolution(2 * width, 2 * width, 3),
            *convolution(2 * width, 2 * width, 1),
        )
        self.classifier = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.classifier(self.features(images))
        return maps.mean((2, 3))


def _torchvision(spec: ModelSpec, num_classes: int) -> nn.Module:
    import torchvision

    arguments = dict(spec.arguments)
    if not arguments.get("weights"):
        return torchvision.models.get_model(spec.name, num_classes=num_classes, **arguments)  # type: ignore[no-any-return]
    state = torchvision.models.get_weight(_weights_name(spec)).get_state_dict(progress=False, check_hash=True)
    del arguments["weights"]
    model: nn.Module = torchvision.models.get_model(spec.name, num_classes=num_classes, **arguments)
    fresh = model.state_dict()
    model.load_state_dict({k: v if v.shape == fresh[k].shape else fresh[k] for k, v in state.items() if k in fresh})
    return model


def _weights_name(spec: ModelSpec) -> str:
    import torchvision

    name = str(spec.arguments["weights"])
    return name if "." in name else f"{torchvision.models.get_model_weights(spec.name).__name__}.{name}"


def _timm(spec: ModelSpec, num_classes: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(spec.name, num_classes=num_classes, **spec.arguments)
    return model


def _transformers(spec: ModelSpec, num_classes: int) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise InputError("hf: models need transformers: pip install 'expunge[hf]'") from error
    arguments = dict(spec.arguments)
    pretrained = arguments.pop("pretrained", False)
    config = AutoConfig.from_pretrained(spec.name, num_labels=num_classes, **arguments)
    model: nn.Module
    if pretrained:
        model = AutoModelForImageClassification.from_pretrained(spec.name, config=config, ignore_mismatched_sizes=True)
    else:
        model = AutoModelForImageClassification.from_config(config)
    return model


def _allcnn(spec: ModelSpec, num_classes: int, channels: int) -> nn.Module:
    known = ("width", "batch_norm", "dropout")
    for name, value in spec.arguments.items():
        if name not in known:
            raise InputError(f"unknown argument {name!r} in {spec.text!r}: expected some of {', '.join(known)}")
        if name == "width" and (type(value) is not int or value < 1):
            raise InputError(f"expected width in {spec.text!r} as a whole number above 0, got {value!r}")
        if name != "width" and value not in (True, False):
            raise InputError(f"expected {name} in {spec.text!r} as true or false, got {value!r}")
    return AllCNN(num_classes, channels, **spec.arguments)


def _from_file(spec: ModelSpec, num_classes: int, channels: int) -> nn.Module:
    function = _load_function(spec)
    wanted = inspect.signature(function).parameters
    given = {"num_classes": num_classes, "channels": channels}
    arguments = {name: value for name, value in given.items() if name in wanted} | dict(spec.arguments)
    model: nn.Module = function(**arguments)
    return model


def _load_function(spec: ModelSpec) -> Callable[..., Any]:
    path, _, name = spec.name.rpartition(":")
    if not name:
        raise InputError(f"expected a function after the file: {path}:function")
    if not Path(path).is_file():
        raise InputError(f"no model file at {path!r}")
    module_spec = importlib.util.spec_from_file_location(f"expunge_model_{Path(path).stem}", path)
    assert module_spec is not None  # a .py file always has
    assert module_spec.loader is not None  # both
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # dataclasses and pickles look their module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise InputError(f"cannot load {path}: {type(error).__name__}: {first_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path} has no function {name!r}")
    loaded: Callable[..., Any] = function
    return loaded


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels

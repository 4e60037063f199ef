from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from expunge.errors import InputError
from expunge.models import build_model, check_model, parse_model, takes_channels, zoo_preprocessing
from expunge.schema import Preprocessing
from expunge.training import logits_of
from expunge.weights import apply_weights, load_weights
from expunge.workspace import DataOptions, open_workspace

VIT = "timm:vit_tiny_patch16_224?img_size=32&depth=1"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def saved_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


def write_model(tmp_path: Path, code: str) -> str:
    path = tmp_path / "net.py"
    path.write_text(code)
    return f"{path}:build"


def outputs(text: str, size: tuple[int, int], *, classes: int = 4, channels: int = 3) -> torch.Size:
    model = build_model(parse_model(text), num_classes=classes, channels=channels).eval()
    with torch.no_grad():
        return logits_of(model(torch.zeros(2, channels, *size))).shape


@pytest.mark.parametrize(
    ("text", "family", "name", "arguments"),
    [
        ("torchvision:resnet18", "torchvision", "resnet18", {}),
        ("timm:vit_tiny_patch16_224?img_size=32", "timm", "vit_tiny_patch16_224", {"img_size": 32}),
        ("hf:org/name", "hf", "org/name", {}),
        ("allcnn", "allcnn", "allcnn", {}),
        ("allcnn?batch_norm=false&dropout=True", "allcnn", "allcnn", {"batch_norm": False, "dropout": True}),
        ("my/net.py:build?widths=(8,16)&kind=small", "file", "my/net.py:build", {"widths": (8, 16), "kind": "small"}),
        ("C:/net.py:build", "file", "C:/net.py:build", {}),
    ],
)
def test_parse_model(text: str, family: str, name: str, arguments: dict[str, Any]) -> None:
    spec = parse_model(text)
    assert (spec.text, spec.family, spec.name, spec.arguments) == (text, family, name, arguments)


@pytest.mark.parametrize("text", ["", "resnet18", "keras:resnet", "timm:", "net.py", "net.txt:build", "allcnn:x"])
def test_parse_model_refuses(text: str) -> None:
    with pytest.raises(InputError, match=r"unknown model .*expected torchvision:NAME"):
        parse_model(text)


@pytest.mark.parametrize(
    ("text", "size", "channels"),
    [
        (VIT, (32, 32), 3),
        ("timm:vit_tiny_patch16_224?img_size=32&depth=1&in_chans=1", (32, 32), 1),
        ("torchvision:squeezenet1_1", (48, 40), 3),
        ("allcnn", (8, 8), 1),
        ("allcnn?batch_norm=False", (32, 24), 3),
    ],
)
def test_build(text: str, size: tuple[int, int], channels: int) -> None:
    assert outputs(text, size, channels=channels) == (2, 4)
    assert takes_channels(parse_model(text)) == (None if text.startswith("allcnn") else channels)


def test_allcnn_arguments() -> None:
    plain = build_model(parse_model("allcnn?batch_norm=False&dropout=False"), num_classes=2, channels=3)
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.Dropout)) for module in plain.modules())
    usual = build_model(parse_model("allcnn"), num_classes=2, channels=3)
    kinds = [type(module) for module in usual.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.BatchNorm2d), kinds.count(nn.Dropout)) == (9, 8, 3)


def test_hf(saved_vit: Path) -> None:
    spec = parse_model(f"hf:{saved_vit}")
    assert outputs(spec.text, (16, 16)) == (2, 4)
    model = build_model(spec, num_classes=4, channels=3)
    stated = zoo_preprocessing(spec, model)
    assert stated == Preprocessing(size=(16, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), source="hf")
    check_model(model, stated, 4)


@pytest.mark.parametrize(
    ("kind", "stated"),
    [
        ("MobileNetV2ImageProcessor", ((224, 224), (0.5,) * 3, (0.5,) * 3)),  # of 256, then cropped
        ("ConvNextImageProcessor", ((384, 384), (0.5,) * 3, (0.5,) * 3)),
    ],
)
def test_hf_processors(kind: str, stated: tuple[Any, ...], saved_vit: Path, tmp_path: Path) -> None:
    import transformers

    folder = shutil.copytree(saved_vit, tmp_path / "model")
    getattr(transformers, kind)().save_pretrained(folder)
    spec = parse_model(f"hf:{folder}")
    found = zoo_preprocessing(spec, nn.Identity())
    assert found is not None
    assert found.size == stated[0]
    assert found.mean == pytest.approx(stated[1])
    assert found.std == pytest.approx(stated[2])
    getattr(transformers, kind)(do_normalize=False).save_pretrained(folder)
    found = zoo_preprocessing(spec, nn.Identity())
    assert found is not None
    assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("MobileViTImageProcessor", {}, "swaps their colours, which is not supported"),
        ("ViTImageProcessor", {"rescale_factor": 1 / 127.5}, r"does not bring them to \[0, 1\]"),
    ],
)
def test_hf_processors_that_are_refused(
    kind: str, given: dict[str, Any], message: str, saved_vit: Path, tmp_path: Path
) -> None:
    import transformers

    folder = shutil.copytree(saved_vit, tmp_path / "model")
    getattr(transformers, kind)(**given).save_pretrained(folder)
    with pytest.raises(InputError, match=message):
        zoo_preprocessing(parse_model(f"hf:{folder}"), nn.Identity())


def test_hf_pretrained_body(saved_vit: Path) -> None:
    from transformers import ViTForImageClassification

    model = build_model(parse_model(f"hf:{saved_vit}?pretrained=True"), num_classes=4, channels=3)
    saved = ViTForImageClassification.from_pretrained(saved_vit).state_dict()
    own = model.state_dict()
    same = {key for key in saved if own[key].shape == saved[key].shape and torch.equal(own[key], saved[key])}
    assert set(saved) - same == {"classifier.weight", "classifier.bias"}


def test_weights_of_a_hub_folder_fit_its_model(saved_vit: Path) -> None:
    from transformers import ViTForImageClassification

    model = build_model(parse_model(f"hf:{saved_vit}"), num_classes=2, channels=3)
    apply_weights(model, load_weights(saved_vit)[0], "vit")
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(saved_vit).eval()(images).logits
        torch.testing.assert_close(logits_of(model.eval()(images)), expected)


FILE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Shape:
    width: int = 5

class Net(nn.Sequential):
    pass

def build(num_classes, channels=3, width=5):
    shape = Shape(width)
    body = nn.Conv2d(channels, shape.width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return Net(*body, nn.Linear(width, num_classes))
"""


def test_file(tmp_path: Path) -> None:
    text = write_model(tmp_path, FILE)
    assert outputs(text, (9, 9), channels=1) == (2, 4)
    assert takes_channels(parse_model(text)) is None
    wide: Any = build_model(parse_model(f"{text}?width=9"), num_classes=4, channels=3)
    assert wide[0].out_channels == 9


def test_file_of_fixed_outputs_and_channels(tmp_path: Path) -> None:
    text = write_model(tmp_path, "from torch import nn\nbuild = lambda: nn.Flatten()")
    assert takes_channels(parse_model(text)) == 3
    assert isinstance(build_model(parse_model(text), num_classes=4, channels=3), nn.Flatten)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def build(:", "cannot load .*SyntaxError"),
        ("raise KeyError('gone\\nfar')", "cannot load .*KeyError"),
        ("import sys; sys.exit('bye')", "cannot load .*SystemExit: bye"),
        ("import no_such_package", "cannot load .*No module named 'no_such_package'"),
        ("def other(): pass", "has no function 'build'"),
        ("build = 3", "has no function 'build'"),
        ("def build(): return 3", "to give a torch.nn.Module, got int"),
        ("def build(): raise ValueError('broken\\nat all')", "cannot build model .*ValueError: broken$"),
        ("def build(): import sys; sys.exit(3)", "cannot build model .*SystemExit"),
        ("def build(depth): pass", "cannot build model .*depth"),
    ],
)
def test_file_that_fails(tmp_path: Path, code: str, message: str) -> None:
    spec = parse_model(write_model(tmp_path, code))
    with pytest.raises(InputError, match=message) as caught:
        build_model(spec, num_classes=4, channels=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no/such/net.py:build", "no model file at 'no/such/net.py'"),
        ("net.py:", "expected a function after the file"),
        ("timm:no_such_model", "cannot build model 'timm:no_such_model'"),
        ("torchvision:no_such_model", "cannot build model"),
        ("torchvision:resnet18?depths=3", "cannot build model .*depths"),
        ("allcnn?depth=3", "unknown argument 'depth' in 'allcnn.*: expected some of width, batch_norm, dropout"),
        ("allcnn?width=abc", "expected width in 'allcnn.* as a whole number above 0, got 'abc'"),
        ("allcnn?width=0", "expected width in 'allcnn.* as a whole number above 0, got 0"),
        ("allcnn?dropout=maybe", "expected dropout in 'allcnn.* as true or false, got 'maybe'"),
        ("hf:/no/such/folder", "cannot build model"),
    ],
)
def test_models_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_model(parse_model(text), num_classes=4, channels=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        (
            "timm:resnet10t",
            None,
            ["images of 8 x 8 are enlarged to 176 x 176, as timm states for resnet10t: 484 times"],
        ),
        ("timm:resnet10t", (8, 8), []),
        ("timm:vit_tiny_patch16_224?img_size=8&depth=1&patch_size=4", None, []),
        ("allcnn", None, []),
    ],
)
def test_many_pixels_made_of_few_are_told(model: str, size: tuple[int, int] | None, said: list[str]) -> None:
    notes = open_workspace(DataOptions(spec="digits", size=size), model, None, seed=0).notes
    assert len(notes) == len(said)
    assert all(note.startswith(start) for note, start in zip(notes, said, strict=True))


def test_zoo_preprocessing_of_timm() -> None:
    spec = parse_model(VIT)
    stated = zoo_preprocessing(spec, build_model(spec, num_classes=4, channels=3))
    assert stated == Preprocessing(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, source="timm")


@pytest.mark.parametrize("text", ["allcnn", "torchvision:squeezenet1_1"])
def test_zoos_that_state_nothing(text: str) -> None:
    assert zoo_preprocessing(parse_model(text), nn.Identity()) is None


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((3, 16, 16), 4, r"does not take images of shape \(3, 16, 16\): .*--size and --channels"),
        ((1, 32, 32), 4, r"does not take images of shape \(1, 32, 32\)"),
        ((3, 32, 32), 5, "the model gives 4 logits, the data has 5 classes"),
    ],
)
def test_check_model_refuses(shape: tuple[int, int, int], classes: int, message: str) -> None:
    channels, *size = shape
    preprocessing = Preprocessing(size=(size[0], size[1]), mean=(0.5,) * channels, std=(0.5,) * channels)
    with pytest.raises(InputError, match=message) as caught:
        check_model(build_model(parse_model(VIT), num_classes=4, channels=3), preprocessing, classes)
    assert "\n" not in str(caught.value)


def test_check_model_refuses_what_is_no_logits_and_changes_nothing() -> None:
    preprocessing = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
    with pytest.raises(InputError, match="expected the model to return logits"):
        check_model(nn.Identity(), preprocessing, 4)
    model = build_model(parse_model("allcnn"), num_classes=4, channels=1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_model(model, preprocessing, 4)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

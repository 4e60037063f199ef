from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from expunge import weights
from expunge.errors import InputError
from expunge.schema import Preprocessing
from expunge.weights import Metadata, apply_weights, load_weights, save_weights


def network(width: int = 3) -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 5), norm=nn.BatchNorm1d(5), head=nn.Linear(5, width)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


def assert_same(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def load_into(path: Path, model: nn.Module) -> Metadata:
    state, metadata = load_weights(path)
    apply_weights(model, state, str(path))
    return metadata


def test_round_trip(tmp_path: Path) -> None:
    metadata = Metadata(
        model="allcnn",
        class_names=("cat", "dög"),
        preprocessing=Preprocessing(size=(4, 6), mean=(0.5,), std=(0.25,)),
        never_seen=("dög",),
        forgotten=("cat",),
        made_by="test",
        training={"config": {"lr": 0.5}, "seed": 3},
    )
    original, other = network(), network()
    path = tmp_path / "new" / "w.safetensors"
    save_weights(original, path, metadata)
    loaded = load_into(path, other)
    assert_same(original, other)
    assert loaded.preprocessing is not None
    assert loaded.preprocessing.source == "metadata"
    assert (loaded.preprocessing.size, loaded.preprocessing.mean) == ((4, 6), (0.5,))
    for name in ("model", "class_names", "never_seen", "forgotten", "made_by", "training"):
        assert getattr(loaded, name) == getattr(metadata, name)
    assert list(path.parent.iterdir()) == [path]


def test_channels_last_weights_come_back(tmp_path: Path) -> None:
    original: nn.Module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save_weights(original, tmp_path / "w.safetensors", Metadata())
    other = nn.Conv2d(3, 4, 3)
    load_into(tmp_path / "w.safetensors", other)
    assert_same(original, other)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    original, other = Tied(), Tied()
    path = tmp_path / "w.safetensors"
    save_weights(original, path, Metadata())
    assert set(load_weights(path)[0]) == {"first.weight", "first.bias", "second.bias"}
    load_into(path, other)
    assert_same(original, other)
    assert other.first.weight is other.second.weight


def test_safetensors_without_our_metadata(tmp_path: Path) -> None:
    original, other = network(), network()
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    assert load_into(tmp_path / "w.safetensors", other) == Metadata()
    assert_same(original, other)


@pytest.mark.parametrize("text", ["{", "[]", '{"surprise": 1}', '{"preprocessing": {"size": 3}}'])
def test_broken_metadata(tmp_path: Path, text: str) -> None:
    save_file(network().state_dict(), tmp_path / "w.safetensors", metadata={weights.METADATA_KEY: text})
    with pytest.raises(InputError, match="cannot read the metadata"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickled_state_dict(tmp_path: Path, wrapper: str | None, prefix: str, suffix: str) -> None:
    original, other = network(), network()
    state: Any = {prefix + key: value for key, value in original.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / f"w{suffix}")
    load_into(tmp_path / f"w{suffix}", other)
    assert_same(original, other)


def test_pickle_of_the_old_format(tmp_path: Path) -> None:
    original, other = network(), network()
    torch.save(original.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    load_into(tmp_path / "w.pt", other)
    assert_same(original, other)


@pytest.mark.parametrize("name", weights.FOLDER_FILES)
def test_hub_folder(tmp_path: Path, name: str) -> None:
    original, other = network(), network()
    if name.endswith(".safetensors"):
        save_file(original.state_dict(), tmp_path / name)
    else:
        torch.save(original.state_dict(), tmp_path / name)
    load_into(tmp_path, other)
    assert_same(original, other)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected model\.safetensors or .* found none of them"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), r"missing head\.bias$"),
        (lambda state: state.update(extra=torch.ones(1)), r"surplus extra$"),
        (lambda state: [state.pop(key) for key in list(state)], r"missing body\.bias, .* and 4 more$"),
        (
            lambda state: state.update({"head.weight": torch.ones(7, 5)}),
            r"head\.weight is \(7, 5\), the model expects \(3, 5\)",
        ),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state: dict[str, Tensor] = {key: value + 1 for key, value in model.state_dict().items()}
    change(state)
    with pytest.raises(InputError, match=f"in w.pt do not fit the model: .*{message}"):
        apply_weights(model, state, "w.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_old_and_foreign_checkpoints_look_like(tmp_path: Path) -> None:
    original, other = (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    state = {key: value for key, value in original.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save({"net": state, "acc": 93.1, "epoch": 3}, tmp_path / "named.pt")
    load_into(tmp_path / "named.pt", other)
    assert_same(original, other)
    torch.save({"net": state, "ema": state}, tmp_path / "two.pt")
    with pytest.raises(InputError, match=r"found a dict of net, ema: save model\.state_dict\(\) alone"):
        load_weights(tmp_path / "two.pt")


def test_lazy_layers_have_no_shape_to_load_into(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="lazy layers"):
        load_into(tmp_path / "w.pt", nn.LazyLinear(2))


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["torch", "torch old", "pickle 0", "pickle 4"])
def test_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "w.pt", tmp_path / "ran"
    content = {"head.weight": torch.ones(2), "bomb": Bomb(marker)}
    if form.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    else:
        path.write_bytes(pickle.dumps(Bomb(marker), protocol=int(form[-1])))
    with pytest.raises(InputError) as caught:
        load_weights(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    if form != "pickle 0":
        assert "could run code" in str(caught.value)
    torch.load(path, weights_only=False) if form.startswith("torch") else pickle.loads(path.read_bytes())
    assert marker.exists()  # the bomb was live


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"hello\nworld\n", b"\x80\x04", b"PK\x03\x04", b"\xff" * 100])
def test_no_weights_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_weights(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_truncated_weights(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "w.pt":
        torch.save(network().state_dict(), path)
    else:
        save_weights(network(), path, Metadata())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="is not a "):
        load_weights(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights file at"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [{}, [torch.ones(1)], {"lr": 0.1}, torch.ones(2)])
def test_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match="expected a state dict of tensors"):
        load_weights(tmp_path / "w.pt")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(network(), path, Metadata())
    before = path.read_bytes()

    def fail(where: Path) -> None:
        where.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "bytes_writer", lambda _: fail)
    with pytest.raises(OSError, match="No space"):
        save_weights(network(), path, Metadata())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_text("old")
    code = (
        "import sys; from pathlib import Path; from torch import nn; from expunge.weights import *\n"
        "try: save_weights(nn.Linear(300, 300), Path(sys.argv[1]), Metadata())\n"
        "except OSError as error: print('refused', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.safetensors")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("refused"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert (tmp_path / "w.safetensors").read_text() == "old"


def test_a_hub_folder_names_its_classes(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    for content, names in (
        ({"id2label": {"1": "dog", "0": "cat"}}, ("cat", "dog")),
        ({"label_names": ["a", "b"]}, ("a", "b")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ()),
        ({}, ()),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert load_weights(tmp_path)[1].class_names == names
        assert load_weights(tmp_path / "model.safetensors")[1].class_names == names  # the file named itself
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(InputError, match=r"config\.json"):
        load_weights(tmp_path)


def test_a_wrapper_is_told_from_a_part_of_the_model(tmp_path: Path) -> None:
    original, other = nn.Sequential(OrderedDict(model=network())), nn.Sequential(OrderedDict(model=network()))
    state = original.state_dict()
    for name, prefix in (("own", ""), ("wrapped", "model."), ("twice", "module.model.")):
        torch.save({prefix + key: value for key, value in state.items()}, tmp_path / f"{name}.pt")
        load_into(tmp_path / f"{name}.pt", other)
        assert_same(original, other)
    torch.save({"net." + key: value for key, value in network().state_dict().items()}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"surplus net\."):  # as the file has them
        load_into(tmp_path / "other.pt", other)

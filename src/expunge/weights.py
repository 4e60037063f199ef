"""Weights on disk: safetensors in and out; pickles only as data (`weights_only=True`); no code runs on load."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from expunge.errors import InputError, first_line
from expunge.files import bytes_writer, write_atomically
from expunge.schema import Preprocessing

METADATA_KEY = "expunge"  # one JSON text under this key of the safetensors header
UNLEARNED = "unlearned.safetensors"
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", UNLEARNED)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What weights say of themselves; fields are None or empty where the file does not say."""

    model: str | None = None  # the model string
    class_names: tuple[str, ...] = ()  # in the order of the logits
    preprocessing: Preprocessing | None = None
    never_seen: tuple[str, ...] = ()  # classes left out of training
    forgotten: tuple[str, ...] = ()  # classes unlearned so far
    made_by: str | None = None  # program and command
    training: Mapping[str, Any] | None = None  # recipe, seed and accuracy of the training
    trained_on: str | None = None  # the data that expunge trained on, also where classes were forgotten since


def save_weights(model: nn.Module, path: Path, metadata: Metadata) -> None:
    """Write the state of `model` as safetensors, atomically; tied tensors are stored once.

    Raises:
        OSError: no permission, disk full.
    """
    write_atomically({path: bytes_writer(weights_content(model, metadata))})


def weights_content(model: nn.Module, metadata: Metadata) -> bytes:
    """Return the state of `model` as the bytes of a safetensors file; tied tensors are stored once."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in untied(model.state_dict()).items()}
    return save(state, metadata={METADATA_KEY: json.dumps(asdict(metadata))})


def weights_file(path: Path) -> Path:
    """Return the file that `load_weights` reads: `path` itself, or the one in a folder.

    Raises:
        InputError: there is none.
    """
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise InputError(f"expected {' or '.join(FOLDER_FILES)} in {str(path)!r}, found none of them")
        return found[0]
    if not path.is_file():
        raise InputError(f"no weights file at {str(path)!r}")
    return path


def load_weights(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    """Read a `.safetensors` file, a `.pt`/`.pth`/`.bin`/`.ckpt` state dict, or a hub's or an erasure's folder with one.

    Raises:
        InputError: there is no such file, it is no weights file, or it would run code.
    """
    path = weights_file(path)
    hub = path.name in FOLDER_FILES  # named itself or by its folder
    said = Metadata(class_names=_hub_class_names(path.with_name("config.json")) if hub else ())
    if path.suffix != ".safetensors":
        return _load_pickle(path), said
    state, metadata = _load_safetensors(path)
    return state, metadata if metadata.class_names else replace(metadata, class_names=said.class_names)


def whole_weights(path: Path) -> bool:
    """Return whether there is a .safetensors file at `path` that is as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def apply_weights(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Copy `state` into `model`.

    Raises:
        InputError: keys are missing or surplus, or shapes differ; the message names them.
    """
    state = _adapted(model, state)
    own = model.state_dict()
    if any(isinstance(value, UninitializedParameter | UninitializedBuffer) for value in own.values()):
        raise InputError(
            "the model has lazy layers (nn.LazyLinear and others), which have no shape before they see an image: build "
            "it with their sizes, or let it answer one in the function that builds it"
        )
    tied: dict[int, list[str]] = {}
    for key, value in own.items():
        if value.numel():
            tied.setdefault(value.data_ptr(), []).append(key)
    given = set(state)
    covered = given | {key for group in tied.values() if given & set(group) for key in group}
    # which old and converted checkpoints lack, and torch fills in
    missing = sorted(key for key in set(own) - covered if not key.endswith("num_batches_tracked"))
    surplus = sorted(given - set(own))
    if missing or surplus:
        parts = [f"{kind} {_listed(keys)}" for kind, keys in (("missing", missing), ("surplus", surplus)) if keys]
        raise InputError(f"the weights in {name} do not fit the model: {'; '.join(parts)}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise InputError(
                f"the weights in {name} do not fit the model: {key} is {tuple(value.shape)}, "
                f"the model expects {tuple(own[key].shape)}"
            )
    model.load_state_dict(dict(state), strict=False)


def other_width(model: nn.Module, state: Mapping[str, Tensor], num_classes: int) -> int | None:
    """Return the number of outputs that `state` was made for, where that is the one thing that does not fit."""
    own = model.state_dict()
    state = _unwrapped(state, own)
    differing = {key for key in own if key in state and state[key].shape != own[key].shape}
    widths = {state[key].shape[0] for key in differing if own[key].ndim and own[key].shape[0] == num_classes}
    same_rest = all(own[key].shape[1:] == state[key].shape[1:] for key in differing if state[key].ndim)
    return widths.pop() if set(own) == set(state) and same_rest and len(widths) == 1 else None


def _adapted(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return `state` under the names of `model`: transformers saves some tensors under older names than it uses."""
    state = _unwrapped(state, model.state_dict())
    if set(state) == set(model.state_dict()) or not hasattr(model, "from_pretrained"):
        return state
    loaded, report = cast(Any, type(model)).from_pretrained(
        None, config=cast(Any, model).config, state_dict=dict(state), output_loading_info=True
    )
    complete = not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    return loaded.state_dict() if complete else state


def _unwrapped(state: Mapping[str, Tensor], names: Container[str]) -> Mapping[str, Tensor]:
    """Return `state` without what a wrapper put before all of its names, where some of `names` are left then.

    DataParallel puts `module.` there, torch.compile `_orig_mod.`, a LightningModule the attribute that holds the model.
    """
    bare = dict(state)
    while bare and not any(key in names for key in bare):
        wrapper = next(iter(bare)).partition(".")[0] + "."
        if not all(key.startswith(wrapper) for key in bare):
            return state
        bare = {key.removeprefix(wrapper): value for key, value in bare.items()}
    return bare


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file ({first_line(error)})") from error
    return state, _parse_metadata(header.get(METADATA_KEY), path)


def _hub_class_names(config: Path) -> tuple[str, ...]:
    """Return the class names that a hub folder's config.json states (transformers' or timm's key), if any."""
    if not config.is_file():
        return ()
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        names = content.get("label_names") or [
            name for _, name in sorted(content.get("id2label", {}).items(), key=lambda item: int(item[0]))
        ]
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"cannot read the class names in {config} ({first_line(error)})") from error
    placeholders = [f"LABEL_{label}" for label in range(len(names))]  # what transformers writes where nobody named them
    return () if names == placeholders else tuple(str(name) for name in names)


def _parse_metadata(text: str | None, path: Path) -> Metadata:
    if text is None:
        return Metadata()
    try:
        content = json.loads(text)
        stated = content.pop("preprocessing", None)
        preprocessing = None
        if stated is not None:
            lists = {key: tuple(stated[key]) for key in ("size", "mean", "std")}
            preprocessing = Preprocessing(**lists, source="metadata")
        for key in ("class_names", "never_seen", "forgotten"):
            content[key] = tuple(content.get(key, ()))
        return Metadata(**content, preprocessing=preprocessing)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"cannot read the metadata of {path} ({first_line(error)})") from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of old pickle protocols: refused below where they matter
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80":
            raise InputError(
                f"{path} holds more than tensors and loading it could run code: save its state_dict() instead"
            ) from error
        raise InputError(f"{path} is not a weights file: expected safetensors or a torch state dict") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not a weights file: expected safetensors or a torch state dict") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict) and not _are_tensors(content):  # a checkpoint may have its own name for them
        states = [part for part in content.values() if _are_tensors(part)]
        content = states[0] if len(states) == 1 else content
    if not _are_tensors(content):
        held = f"a dict of {_listed(list(map(str, content)))}" if isinstance(content, dict) else "another object"
        raise InputError(f"expected a state dict of tensors in {path}, found {held}: save model.state_dict() alone")
    return dict(content)


def _are_tensors(content: object) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with each tensor once, under the first of its names."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for key, value in state.items():
        identity = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and identity in seen:
            continue
        seen.add(identity)
        kept[key] = value
    return kept


def _listed(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")

"""Change single fields of a frozen configuration from text: `impair.lr=0.002`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from expunge.errors import InputError

Config = TypeVar("Config")


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Return `config` with each `name=value`, or `part.name=value`, applied in order.

    Raises:
        InputError: a name is unknown, or a value is not of the field's type.
    """
    for assignment in assignments:
        path, found, text = assignment.partition("=")
        if not found:
            raise InputError(f"expected name=value, got {assignment!r}")
        config = _set(config, path.strip().split("."), text.strip(), assignment)
    return config


def precision_settings(config: Mapping[str, Any], precision: str) -> list[str]:
    """Return the `name=value` changes by which every training of `config` (as JSON) is done in `precision`."""
    trainings = [name for name, part in config.items() if isinstance(part, Mapping) and "precision" in part]
    return [f"{name}.precision={precision}" for name in trainings]


def as_json(config: Any) -> Any:
    """Return a configuration as what JSON can hold: dataclasses as objects, sets as sorted lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: as_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): as_json(value) for key, value in config.items()}
    if isinstance(config, (set, frozenset)):
        return sorted(as_json(item) for item in config)
    if isinstance(config, (list, tuple)):
        return [as_json(item) for item in config]
    return config


def _set(config: Any, path: Sequence[str], text: str, assignment: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    name, rest = path[0], path[1:]
    if name not in names:
        raise InputError(f"no setting {name!r} in {assignment!r}: expected one of {', '.join(names)}")
    current = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(current):
            raise InputError(f"{name!r} in {assignment!r} has no parts")
        return dataclasses.replace(config, **{name: _set(current, rest, text, assignment)})
    hint = typing.get_type_hints(type(config))[name]
    if text.lower() == "none" and types.NoneType in typing.get_args(hint):
        return dataclasses.replace(config, **{name: None})
    if dataclasses.is_dataclass(current):
        parts = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(current))
        raise InputError(f"{name!r} in {assignment!r} has parts: expected one of {parts}")
    return dataclasses.replace(config, **{name: _parse(text, hint, assignment)})


def _parse(text: str, hint: Any, assignment: str) -> Any:
    """Return `text` as a value of a field's type: str or Literal, bool, int, float, frozenset of str, or None too."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if text.lower() == "none" and types.NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if kind is str:
        return text
    if typing.get_origin(kind) is typing.Literal:
        allowed = typing.get_args(kind)
        if text not in allowed:
            raise InputError(f"expected one of {', '.join(allowed)} in {assignment!r}, got {text!r}")
        return text
    if typing.get_origin(kind) is frozenset:
        return frozenset(part for part in text.split(",") if part)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise InputError(f"expected a value of type {kind.__name__} in {assignment!r}") from None

"""Gradient checkpointing: activations are not kept for the backward pass but computed anew there, block by block.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174. The weights that come out are the
same; a step takes about a third longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expunge.errors import InputError


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Have `model` compute its activations anew in the backward pass, as its library does it, else run by run.

    Raises:
        InputError: there is no way for this model.
    """
    zoo: Any = model
    if getattr(model, "supports_gradient_checkpointing", False):  # transformers
        undo = _transformers_does(zoo)
    elif _timm_does(zoo):
        undo = partial(zoo.set_grad_checkpointing, False)
    else:
        undo = _run_by_run(model)
    try:
        yield
    finally:
        undo()


def _transformers_does(model: Any) -> Callable[[], None]:
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    undo: Callable[[], None] = getattr(model, f"{name}_checkpointing_disable")
    return undo


def _timm_does(model: Any) -> bool:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # no model of timm's, or one for which it refuses
        return False
    return True


def _run_by_run(model: nn.Module) -> Callable[[], None]:
    runs = [run for run in outermost(model, nn.Sequential) if type(run).forward is nn.Sequential.forward]
    if not runs:
        raise InputError(
            f"gradient checkpointing needs a timm or transformers model that has it, or blocks in an nn.Sequential; "
            f"{type(model).__name__} has neither"
        )
    kinds = [type(run) for run in runs]
    for run, kind in zip(runs, kinds, strict=True):
        # another class and no wrapper: names in the state stay, and a copy of the model is its own
        run.__class__ = type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})

    def undo() -> None:
        for run, kind in zip(runs, kinds, strict=True):
            run.__class__ = kind

    return undo


class _Recomputed(nn.Sequential):
    """A sequence that keeps the input of every so many of its modules, and computes the rest anew."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _through(list(self), input)
        for modules in segments(list(self)):
            input = checkpoint(partial(_through, modules), input, use_reentrant=False)
        return input


def _through(modules: Sequence[nn.Module], images: Tensor) -> Tensor:
    for module in modules:
        images = module(images)
    return images


def segments(modules: Sequence[nn.Module]) -> list[Sequence[nn.Module]]:
    """Return n modules in about sqrt(n) stretches; none begins by changing its input, which is what is kept of it."""
    length = math.ceil(math.sqrt(len(modules)))
    bounds = [0]
    for place in range(1, len(modules)):
        if place - bounds[-1] >= length and not _in_place(modules[place]):
            bounds.append(place)
    return [modules[first:last] for first, last in zip(bounds, [*bounds[1:], len(modules)], strict=True)]


def _in_place(module: nn.Module) -> bool:
    first = next(part for part in module.modules() if not list(part.children()))
    return bool(getattr(first, "inplace", False))


def outermost(model: nn.Module, *kinds: type[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules of some kinds that have two children with parameters or more, and lie in no other such."""
    if isinstance(model, kinds) and sum(_has_parameters(child) for child in model.children()) > 1:
        yield model
        return
    for child in model.children():
        yield from outermost(child, *kinds)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model is made of: what has parameters in its outermost sequences and lists."""
    return [
        block
        for run in outermost(model, nn.Sequential, nn.ModuleList)
        for child in run.children()
        for block in _called(child)
    ]


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module with parameters, or, of a list of modules, which nobody calls, those in it."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for child in module.children():
            yield from _called(child)
    elif _has_parameters(module):
        yield module


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None

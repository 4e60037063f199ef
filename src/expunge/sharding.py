"""FSDP: while a model trains, each process holds a share of its weights, gradients and optimizer state.

torch's `fully_shard` (FSDP2), on GPUs and, over gloo, on CPUs. Outside of training every process holds the whole model,
as without it: it answers and learns images alone. What that saves: docs/scaling.md.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from expunge.errors import InputError, first_line
from expunge.processes import FSDP, ranks
from expunge.recompute import blocks


def sharding() -> bool:
    """Return whether training is to be sharded: asked for, and among several processes."""
    return ranks().size > 1 and os.environ.get(FSDP) == "1"


def shards_of(model: nn.Module) -> nn.Module:
    """Return a copy of `model` of which each process holds a share of every parameter; buffers are whole in all.

    The blocks of a model are put together one at a time, as they are needed, in the forward and in the backward pass.

    Raises:
        InputError: torch cannot shard this model: it has a scalar parameter, blocks share one, or gradients have hooks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # as long to import as the rest of torch

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (ranks().size,))
    # it takes contiguous parameters alone
    shards = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    owners = Counter(id(parameter) for block in blocks(shards) for parameter in set(block.parameters()))
    why = "a parameter is shared by several of its blocks" if max(owners.values(), default=1) > 1 else None
    if any(parameter._backward_hooks for parameter in model.parameters()):
        why = "something acts on its gradients, as a method's mask does, which shares would not see"
    try:
        for block in blocks(shards) if why is None else ():
            fully_shard(block, mesh=mesh)
        fully_shard(shards, mesh=mesh)  # changes it in place
    except ValueError as error:
        why = first_line(error)
    if why is not None:
        raise InputError(f"cannot shard {type(model).__name__} among processes ({why}): leave out --fsdp")
    return shards


@torch.no_grad()
def put_together(shards: nn.Module, model: nn.Module) -> None:
    """Write into `model` what the processes hold shares of. Every process must call it."""
    own = model.state_dict()
    for name, part in shards.state_dict().items():
        own[name].copy_(whole(part))


def whole(value: Any) -> Any:
    """Return a state with what is shared put together; every process must call it."""
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def share_out(model: nn.Module, shards: nn.Module, optimizer: Optimizer) -> None:
    """Give each process its share of `model`, which was changed since, and of a whole optimizer's state."""
    state = model.state_dict()
    for name, part in shards.state_dict().items():
        part.copy_(_share(state[name], part))
    for parameter, held in optimizer.state.items():
        for key, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                held[key] = _share(value, parameter)


@torch.no_grad()
def _share(value: Tensor, like: Tensor) -> Tensor:
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    shared = cast(DTensor, like)
    return distribute_tensor(value.detach(), shared.device_mesh, shared.placements)

"""How much memory is free, and how much a model keeps of an image."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

SHARE = 0.5  # of what is free that images may take: what libraries need beside it is not known


def free_bytes(device: torch.device) -> int:
    """Return how many bytes can still be taken on a device by this process; of a machine, each of its processes has a
    part."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    here = min(psutil.virtual_memory().available, _left_in_group(Path("/sys/fs/cgroup")))
    return int(here // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _left_in_group(folder: Path) -> float:
    """Return what a container may still take: its limit, less what it holds and cannot give back; infinite without."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return float("inf")
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return float("inf")


def kept_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return how many bytes `run`, a forward pass of `model`, keeps for the backward pass, beside the model itself."""
    own = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = run()  # alive, so that no storage takes the place of another
    del held
    return sum(size for place, size in kept.items() if place not in own)


def images_that_fit(model: nn.Module, device: torch.device, run: Callable[[], object]) -> int:
    """Return how many images may go through a model and back at once, where `run` takes one; 1 at least."""
    return max(1, int(SHARE * free_bytes(device)) // max(1, kept_bytes(model, run)))

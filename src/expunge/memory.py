"""How much memory is free, and how much a model keeps of an image."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

SHARE = 0.5  # of what is free that images may take: what libraries need beside it is not known
SHARERS = "EXPUNGE_SHARERS"
"""Environment variable, how many processes share this one's device without being ranks of one run: set by the workers
of a benchmark."""
LIMITS_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
LIMITS_V2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group: its limit and what it holds; and the line of `memory.stat` that it can give back."""


def free_bytes(device: torch.device) -> int:
    """Return how many bytes can still be taken on a device by this process: of what several share, its part."""
    sharers = int(os.environ.get(SHARERS) or 1)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // sharers + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    here = min(psutil.virtual_memory().available, _left_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))
    return int(here // (sharers * int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def _left_in_groups(root: Path, own: Path) -> float:
    """Return what this process's control group may still take: the least that it and those around it have left.

    Args:
        root: the folder of the groups; those of version 1 that limit memory are in its `memory`.
        own: the file that names this process's groups, a line each: number, what it limits (version 2: empty), path.
            In a container the path may be the host's, which is not there: `root` is then the container's own group.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return float("inf")
    least = float("inf")
    for _, limits, path in (line.split(":", 2) for line in lines):
        if limits and "memory" not in limits.split(","):
            continue
        top, names = (root / "memory", LIMITS_V1) if limits else (root, LIMITS_V2)
        parts = path.strip("/").split("/")
        for depth in range(len(parts) + 1):
            least = min(least, _left_in_group(top.joinpath(*parts[:depth]), *names))
    return least


def _left_in_group(folder: Path, limit_file: str, used_file: str, cache: str) -> float:
    """Return a group's limit, less what it holds and cannot give back; infinite without."""
    try:
        limit = (folder / limit_file).read_text().strip()
        if limit == "max":
            return float("inf")
        used = int((folder / used_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get(cache, 0)))
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

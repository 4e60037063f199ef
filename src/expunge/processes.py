"""Several processes that do one run together: who is who, what they tell each other, one batch normalized by all.

Started by `accelerate launch` or `torchrun`. Without either there is one process, and every function here does nothing.
What they do and do not make equal to one process: docs/scaling.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from expunge.errors import InputError

T = TypeVar("T")

FSDP = "EXPUNGE_FSDP"
"""Environment variable, "1" where training is to be sharded: set by `--fsdp` and by `accelerate launch --use_fsdp`."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of the run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0


def ranks() -> Ranks:
    """Return this process's place; of several, they are joined the first time that one asks.

    Raises:
        InputError: they are to share a model in a way that is not supported.
    """
    if not several():
        return Ranks()
    from accelerate import PartialState

    if not (dist.is_initialized() and PartialState._shared_state):  # else the caller made a group, which it takes over
        _join()
    return Ranks(dist.get_rank(), dist.get_world_size())


def several() -> bool:
    """Return whether a launcher started more than this process; joins nothing."""
    joined = dist.is_initialized() and dist.get_world_size() > 1
    return joined or int(os.environ.get("WORLD_SIZE") or 1) > 1


def _join() -> None:
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        # ours to do (sharding.py): Accelerate would have model and optimizer handed over together
        os.environ |= {FSDP: "1", "ACCELERATE_USE_FSDP": "false"}
    for name, what in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1"):
            raise InputError(f"{what} is not supported: leave it out of accelerate's options, or use FSDP")
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    # gloo beside NCCL carries what is on the CPU; without a GPU, Accelerate has to be told that there are processes
    PartialState(cpu=on_cpu, backend=None if on_cpu else "cuda:nccl,cpu:gloo")


def refuse_several(what: str) -> None:
    """Raise InputError where several processes were started to do `what` together."""
    if several():
        raise InputError(f"{what} runs in one process: start it without accelerate launch or torchrun")


# What they tell each other. Every process must call these, in the same order.


def gathered(mine: T) -> list[T]:
    """Return what each process has, in the order of their ranks."""
    size = ranks().size
    if size == 1:
        return [mine]
    everything: list[Any] = [None] * size
    dist.all_gather_object(everything, mine)
    return everything


def agreed(mine: T) -> T:
    """Return what the first process has, so that all go on alike."""
    if ranks().size == 1:
        return mine
    held: list[Any] = [mine]
    dist.broadcast_object_list(held, src=0)
    first: T = held[0]
    return first


def summed(*mine: float) -> list[float]:
    """Return the sums over all processes."""
    if ranks().size == 1:
        return list(mine)
    total = torch.tensor(mine, dtype=torch.float64, device=_meeting_place())
    dist.all_reduce(total)
    return [float(value) for value in total]


def _meeting_place() -> torch.device:
    """Return where tensors lie that the processes' group can send: a group that the caller made may have NCCL alone."""
    return torch.device("cpu" if "cpu:" in dist.get_backend_config() else "cuda")


@torch.no_grad()
def alike(model: nn.Module) -> nn.Module:
    """Give `model` the first process's weights and buffers in all.

    Loops that are no `train` run in each process for itself, and on GPUs sums may come out otherwise in each.
    """
    if ranks().size > 1:
        for value in model.state_dict().values():
            sent = value.contiguous()
            dist.broadcast(sent, src=0)
            value.copy_(sent)
    return model


def wait() -> None:
    """Wait until every process has come here."""
    gathered(None)


def leave(code: int) -> NoReturn:
    """End this process at once: threads of the connections, taken down with the interpreter, may abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# Failing


def tell_failure() -> bool:
    """Return whether this process is the first that fails, and so the one whose error is the cause."""
    if not dist.is_initialized():
        return int(os.environ.get("RANK") or 0) == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add("expunge/failed", 1)) == 1
    except RuntimeError:  # it died with the process that kept it
        return True


def is_lost_connection(error: BaseException) -> bool:
    """Return whether `error` came of another process that ended."""
    text = str(error)
    return isinstance(error, dist.DistError) or (  # the first kind also where it ended before all were joined
        dist.is_initialized()
        and isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo", "NCCL", "Connection", "peer"))
    )


# Normalization


@contextmanager
def shared_statistics(counted: bool) -> Iterator[None]:
    """Have BatchNorm in train mode normalize by the statistics of the batch over all processes, as one process does.

    torch's SyncBatchNorm does not run on the CPU, and layers of timm are no plain BatchNorm but call the same function,
    so that function is what is replaced.

    Args:
        counted: whether the samples of this process count; a process without any of a batch runs on a stand-in.
    """
    alone = F.batch_norm

    def batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return alone(input, running_mean, running_var, weight, bias, False, momentum, eps)
        answer: Tensor
        answer, mean, variance, count = _Normalize.apply(input, weight, bias, eps, counted)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
        return answer

    F.batch_norm = batch_norm
    try:
        yield
    finally:
        F.batch_norm = alone


class _Normalize(torch.autograd.Function):
    """weight (x - mean) / std + bias over all axes but the second and over all processes; also mean, variance, number.

    Sums are float32 whatever `x` is, and what comes out is as `x`, as in torch's own. Means of processes are joined as
    in Chan et al., 1979: sums of squares around each one's own mean do not cancel.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, counted: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        own = x.numel() // x.shape[1] if counted else 0
        around, mine = torch.var_mean(x.float(), axes, correction=0)
        parts = torch.stack([torch.full_like(mine, own), mine, around]).unsqueeze(0)
        everybody = [torch.empty_like(parts) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, parts)
        counts, means, variances = torch.cat(everybody).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        deviation = (variance + eps).rsqrt()
        answer = (x.float() - mean.view(shape)) * deviation.view(shape)
        if weight is not None:
            answer = answer * weight.view(shape)
        if bias is not None:
            answer = answer + bias.view(shape)
        # the input, which is alive anyway: what is normalized is worked out again
        ctx.save_for_backward(x, mean, deviation, total, *(() if weight is None else (weight,)))
        ctx.counted, ctx.axes, ctx.shape, ctx.biased = counted, axes, shape, bias is not None
        ctx.mark_non_differentiable(mean, variance, total)
        return answer.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, mean, deviation, total, *weights = ctx.saved_tensors
        given = gradients[0].float()
        normalized = (x.float() - mean.view(ctx.shape)) * deviation.view(ctx.shape)
        own = torch.stack([given.sum(ctx.axes), (given * normalized).sum(ctx.axes)])
        sums = own.clone() if ctx.counted else torch.zeros_like(own)
        dist.all_reduce(sums)
        offset, slope = ((part / total).view(ctx.shape) for part in sums)
        scale = deviation * weights[0] if weights else deviation
        passed = (given - offset - normalized * slope) * scale.view(ctx.shape)
        if not ctx.counted:
            passed = torch.zeros_like(passed)
        of_weight = own[1].to(weights[0].dtype) if weights else None
        return passed.to(x.dtype), of_weight, own[0] if ctx.biased else None, None, None

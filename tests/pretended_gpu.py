"""A GPU where there is none: tensors that say they lie on `cuda:0`, live on the CPU, and refuse what a GPU's refuse.

What runs in `pretended_gpu()` fails where a tensor of the GPU meets one of the CPU or is made a NumPy array. It shows
nothing of what only a real one has: its kernels and their rounding, streams, memory, autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
ATEN = torch.ops.aten
CROSSES = {ATEN.copy_.default, ATEN._to_copy.default}  # what may take tensors of both
PICKS = {ATEN.index.Tensor, ATEN._unsafe_index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}
MEMORY = 8 << 30


class OnGpu(Tensor):
    """A tensor on the pretended GPU; `inner` holds its numbers."""

    inner: Any  # a tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    device = GPU
    is_cuda = True
    is_cpu = False

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        copied: Tensor = ATEN._to_copy(self, device=CPU)
        return copied

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> Any:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made: Tensor = OnGpu(self.inner.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made.detach(), self.requires_grad)
            memo[id(self)] = made
        copied: Tensor = memo[id(self)]
        return copied

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _Everything(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees also what makes a tensor of the GPU from none."""

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation on the numbers, and say on which side its answer lies."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    if there and func not in CROSSES:
        _refuse_mixed(func, args, [tensor for tensor in tensors if not isinstance(tensor, OnGpu)])
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": CPU}
    plain, options = pytree.tree_map_only(OnGpu, lambda tensor: tensor.inner, (args, kwargs))
    answer = func(*plain, **options)
    if func is ATEN.copy_.default:
        return args[0]
    if (not there) if device is None else torch.device(device).type != "cuda":
        return answer
    known = {id(tensor.inner): tensor for tensor in there}  # in place: the same tensor comes out
    return pytree.tree_map_only(Tensor, lambda made: known[id(made)] if id(made) in known else OnGpu(made), answer)


def _refuse_mixed(func: Any, args: tuple[Any, ...], here: list[Tensor]) -> None:
    apart = [tensor for tensor in here if tensor.ndim]  # a number of the CPU may meet a tensor of the GPU
    if func in PICKS:  # so may indices
        apart = [values for values in args[2:] if isinstance(values, Tensor) and any(values is one for one in apart)]
        if not isinstance(args[0], OnGpu) and func is not ATEN.index_put.default:  # autograd's own zeros
            apart = [args[0]]
    if apart:
        shapes = [tuple(tensor.shape) for tensor in apart]
        raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu {shapes} in {func}")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Have torch believe in one GPU of 8 GiB, without bf16; yields its device."""
    answers = {
        "is_available": True,
        "is_bf16_supported": False,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "get_device_name": "a pretended GPU",
        "_lazy_init": None,
    }
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # the same parameter, of another class
    try:
        with contextlib.ExitStack() as stack:
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
            for name in ("tensor", "as_tensor", "arange", "linspace", "eye"):  # these ask the driver
                stack.enter_context(mock.patch.object(torch, name, _moved(getattr(torch, name))))
            stack.enter_context(mock.patch.object(torch.optim.Optimizer, "_accelerator_graph_capture_health_check"))
            stack.enter_context(mock.patch.object(Tensor, "to", _to(Tensor.to)))
            stack.enter_context(_Everything())  # type: ignore[no-untyped-call]
            yield GPU
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        answer = make(*args, **kwargs)
        return answer if device is None else answer.to(device)

    return made


def _to(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `Tensor.to` for tensors that torch itself takes for the CPU's, as all of them are."""

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        named = [kwargs.pop("device")] if kwargs.get("device") is not None else []
        devices = [torch.device(one) for one in (*args, *named) if isinstance(one, str | torch.device)]
        for dtype in (one for one in args if isinstance(one, torch.dtype)):
            kwargs["dtype"] = dtype
        kwargs = {name: kwargs[name] for name in ("dtype", "memory_format") if kwargs.get(name) is not None}
        if devices and (devices[0].type == "cuda") != isinstance(self, OnGpu):
            self = ATEN._to_copy(self, device=GPU if devices[0].type == "cuda" else CPU)
        if not kwargs:
            return self
        changed: Tensor = ATEN._to_copy(self, **kwargs) if isinstance(self, OnGpu) else plain(self, **kwargs)
        return changed

    return to

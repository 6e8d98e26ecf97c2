"""Bytes of tensors without the tensors: networks are called on fake ones, and their allocations are counted.

A fake tensor has a shape, a dtype and a storage of a size, but no numbers; autograd saves, frees and recomputes with
fake tensors just as with real ones.  So the peak of a forward and a backward at full size is found in seconds, without
the memory, and is exact for the tensors; it leaves out what kernels use inside.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["AllocationTracker", "count_flops", "cuda_autocast", "fake_mode", "make_fake", "tensor_bytes"]


class AllocationTracker(TorchDispatchMode):
    """Count the bytes of the storages that operations make inside of a `with` block, real or fake.

    Args:
        known: tensors that were there before; views of them are nothing new.

    Attributes:
        live: bytes that were made inside and are still held.
        peak: the most that `live` has been.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._known = list(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what came out."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Under autocast on the CPU, normalise in float32, as autocast on CUDA does; in backward passes too."""
    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(patch.object(nn.functional, name, _in_float32(vars(nn.functional)[name])))
        yield


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        given = [a.float() if isinstance(a, Tensor) else a for a in args]
        return function(*given, **{n: a.float() if isinstance(a, Tensor) else a for n, a in kwargs.items()})

    return call


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Tensors made inside are fake."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def make_fake(network: nn.Module) -> None:
    """Give a network of the meta device fake weights of the CPU; within `fake_mode`."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that share nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in `call` (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())

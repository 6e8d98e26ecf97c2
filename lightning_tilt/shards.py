"""Tensors of which each process holds a part: put together, dealt out, measured.

Under FSDP2 a parameter theta is a `DTensor`, cut along its first dimension: process i of n holds the rows theta_i, its
gradient likewise g_i, and everything that is kept beside it (averages, moments of the optimiser).  An ordinary tensor
is the same on every process.

    whole(theta)        all rows, on every process          dealt(value, theta)     value, cut as theta is
    |g|^2 = sum_sharded sum_i |g_i|^2 + sum_ordinary |g|^2

`whole` and `total_norm` are collective: all processes call them, in the same order.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

__all__ = ["clip_gradients", "dealt", "in_pieces", "is_sharded", "need_whole", "total_norm", "whole", "wholes"]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one of which this process holds a part."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def in_pieces(trainer: Trainer | None) -> bool:
    """Whether parameters are flat pieces without a name or shape: the classic FSDP's."""
    return trainer is not None and isinstance(trainer.strategy, FSDPStrategy)


def need_whole(trainer: Trainer | None, who: str) -> None:
    """Refuse the classic FSDP for somebody who needs whole parameters, or FSDP2's.

    Raises:
        TypeError: naming them.
    """
    if in_pieces(trainer):
        raise TypeError(f"{who} needs whole parameters, which the classic fsdp has only in flat pieces: use fsdp2")


def whole(value: Any) -> Any:
    """All of a sharded tensor, detached, where its shards are; whatever else is given comes back as it is."""
    if not is_sharded(value):
        return value
    home = value.device
    # An offloaded shard is on the CPU, and its processes talk through the devices of their mesh.
    return value.detach().to(value.device_mesh.device_type).full_tensor().to(home)


def wholes(values: Mapping[Any, Any], keep: bool = True) -> dict[Any, Any]:
    """`whole` of every value, one after the other.

    Args:
        values: sharded and other values.
        keep: False takes part in the collectives and forgets the sharded ones: only one process writes.
    """
    found = {}
    for name, value in values.items():
        full = whole(value)
        if keep or not is_sharded(value):
            found[name] = full.cpu() if is_sharded(value) else full
    return found


def dealt(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut and placed as `like` is; the dtype stays that of `value`.

    Args:
        value: the same on every process, or already cut.
        like: of the same shape, sharded or not.
    """
    if not is_sharded(like) or is_sharded(value):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh  # type: ignore[attr-defined]
    there = value.detach().to(mesh.device_type)
    return distribute_tensor(there, mesh, like.placements).to(like.device)  # type: ignore[attr-defined]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of sharded and ordinary tensors together, an ordinary float32 number."""
    ordinary, sharded, mesh = [], [], None
    for tensor in tensors:
        if is_sharded(tensor):
            mesh = tensor.device_mesh  # type: ignore[attr-defined]
            sharded.append(tensor.to_local())  # type: ignore[attr-defined]
        else:
            ordinary.append(tensor)
    squares = _norm(ordinary) ** 2
    if mesh is not None:
        parts = (_norm(sharded) ** 2).to(mesh.device_type)
        dist.all_reduce(parts, group=mesh.get_group(mesh.mesh_dim_names[-1]) if mesh.ndim > 1 else mesh.get_group())
        squares = squares.to(parts.device) + parts
    return squares.sqrt()


def clip_gradients(gradients: Iterable[Tensor], longest: float) -> None:
    """Scale gradients so that their 2-norm is at most `longest`, as torch's `clip_grad_norm_` does."""
    gradients = list(gradients)
    factor = (longest / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[attr-defined]
        local.mul_(factor.to(local))


def _norm(tensors: list[Tensor]) -> Tensor:
    some = [tensor.detach() for tensor in tensors if tensor.numel()]
    return torch.nn.utils.get_total_norm(some).float() if some else torch.zeros(())

"""Work that several processes share out by themselves: what all of them found, and where it is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor

from ..interfaces.not_finite import gathered

__all__ = ["collected", "distributed", "everywhere", "gathered", "moved"]


@contextmanager
def moved(module: LightningModule, device: torch.device) -> Iterator[None]:
    """The module on a device for the length of a block: when a fit ends, Lightning has moved it to the CPU."""
    home = module.device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def distributed() -> bool:
    """Whether processes are connected, be it one alone."""
    return dist.is_available() and dist.is_initialized()


def everywhere(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of all processes, on each of them, on the CPU if they are several; all must ask."""
    if not distributed() or dist.get_world_size() == 1:
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, _on_cpu(part))
    return parts


def collected(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of all processes, on process 0; all of them must ask."""
    if not distributed() or dist.get_world_size() == 1:
        return [part]
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(_on_cpu(part), parts)
    return [part] if parts is None else parts


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(v) for name, v in value.items()}
    return [_on_cpu(v) for v in value] if isinstance(value, list) else value

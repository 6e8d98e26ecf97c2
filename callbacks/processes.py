"""Work that several processes share out by themselves: what all of them found, and where it is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule

__all__ = ["gathered", "moved"]


def gathered(value: Any) -> list[Any]:
    """The value of every process, in their order; all of them must ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def moved(module: LightningModule, device: torch.device) -> Iterator[None]:
    """The module on a device for the length of a block: when a fit ends, Lightning has moved it to the CPU."""
    home = module.device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)

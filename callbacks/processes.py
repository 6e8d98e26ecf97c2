"""Work that several processes share out by themselves: what all of them found, and where it is done."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import LightningModule

from ..interfaces.not_finite import gathered

__all__ = ["gathered", "moved"]


@contextmanager
def moved(module: LightningModule, device: torch.device) -> Iterator[None]:
    """The module on a device for the length of a block: when a fit ends, Lightning has moved it to the CPU."""
    home = module.device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)

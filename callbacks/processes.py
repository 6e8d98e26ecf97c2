"""Work that several processes share out by themselves: one process's draws, what all of them found, the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule

from ..interfaces import Predictor, Reward
from ..process import Process

__all__ = ["alone", "gathered", "moved"]


@dataclass(frozen=True)
class _Trainer:
    """What a rollout asks of a trainer, as of a single process."""

    precision_plugin: Any
    world_size: int = 1
    global_rank: int = 0


@dataclass(frozen=True)
class _Host:
    """What a rollout asks of its host."""

    predictor: Predictor
    process: Process
    reward: Reward
    device: torch.device
    dtype: torch.dtype
    _trainer: _Trainer


def alone(host: Any) -> Any:
    """The host as a single process has it: a rollout draws the same noise whichever process makes it."""
    trainer = _Trainer(host.trainer.precision_plugin)
    return _Host(host.predictor, host.process, host.reward, host.device, host.dtype, trainer)


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

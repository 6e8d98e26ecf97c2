"""What surrounds a rollout: the user's batch, the ranks, the precision, the device, the global seed."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..condition import Prompts

__all__ = ["check_counts", "device_and_dtype", "global_numbers", "global_seed", "network_context", "prompts_of"]


def check_counts(**counts: int | None) -> None:
    """Refuse a setting of the sampler that counts something and is below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"sampler.{name} must be at least 1, not {value}")


def prompts_of(batch: Any) -> tuple[Prompts, int]:
    """Read the prompts of a user's batch.

    Args:
        batch: a sequence of strings; a mapping with the key "prompt" or "prompts"; or a tensor, whose length is the
            number of unconditional draws.

    Returns:
        The prompts (None without) and their number.
    """
    if isinstance(batch, Tensor):
        return None, len(batch)
    if isinstance(batch, dict):
        for key in ("prompt", "prompts"):
            if key in batch:
                return prompts_of(batch[key])
    if isinstance(batch, (list, tuple)) and all(isinstance(p, str) for p in batch) and len(batch) > 0:
        return list(batch), len(batch)
    raise TypeError(
        f"a batch is a list of prompts, a mapping with 'prompt', or a tensor of draws, not {type(batch).__name__} "
        "(a plain list is no loader: DataLoader(prompts, batch_size=4))"
    )


def global_numbers(host: Any, size: int, each: int, world: tuple[int, int] | None = None) -> list[int]:
    """Numbers of this process's samples among all: Lightning deals a batch's conditions out to the ranks in turn.

    Args:
        host: whose Trainer knows the processes.
        size: conditions of this process.
        each: samples of a condition.
        world: how many processes there are, and the number of this one; None: the Trainer's.
    """
    trainer = host._trainer
    processes, rank = world or ((1, 0) if trainer is None else (trainer.world_size, trainer.global_rank))
    return [(i * processes + rank) * each + j for i in range(size) for j in range(each)]


def network_context(host: Any) -> Callable[[], AbstractContextManager[Any]]:
    """The precision plugin's context: Lightning does not enter it outside of the training step."""
    trainer = host._trainer
    return nullcontext if trainer is None else trainer.precision_plugin.forward_context


def device_and_dtype(host: Any) -> tuple[torch.device, torch.dtype]:
    """Device of the host; states are float32, or float64 for a float64 host, whatever the network's dtype."""
    return host.device, torch.float64 if host.dtype == torch.float64 else torch.float32


def global_seed() -> int:
    """The seed that `seed_everything` left behind, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))

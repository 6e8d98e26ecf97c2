"""What the samples of all processes say together: statistics of a rollout do not depend on who drew it.

    group    the samples of one prompt, wherever they were drawn; without prompts all samples

Each prompt has a Z of its own: weights are normalised, advantages centred and ESS taken group by group.  A process
gathers the few numbers a sample that this needs, works out the groups of all, and keeps its own part, `mine`.
"""

from collections.abc import Sized
from hashlib import sha256
from typing import Any, cast

import torch
from torch import Tensor

from lightning_tilt.trajectory import Trajectory

__all__ = ["prompt_groups", "sample_rows", "together", "update_size"]


def together(host: Any, values: Tensor) -> tuple[Tensor, slice]:
    """The samples of all processes side by side, in the order of the processes; all of them must ask.

    Args:
        host: whose Trainer knows the processes.
        values: numbers of this process's samples, (..., n), without gradient; n may differ between processes.

    Returns:
        (..., n_all), and where this process's samples are in it.
    """
    n, world = values.shape[-1], host.trainer.world_size
    if world == 1:
        return values.detach(), slice(0, n)
    sizes = host.all_gather(torch.tensor(n, device=values.device)).reshape(-1).tolist()
    padded = torch.nn.functional.pad(values.detach(), (0, max(sizes) - n))
    everywhere = host.all_gather(padded).reshape(world, *padded.shape)
    first = sum(sizes[: host.trainer.global_rank])
    parts = [part[..., :size] for part, size in zip(everywhere, sizes, strict=True)]
    return torch.cat(parts, -1), slice(first, first + n)


def prompt_groups(host: Any, trajectory: Trajectory) -> tuple[Tensor, slice]:
    """The group of each sample of all processes.

    Args:
        host: whose Trainer knows the processes.
        trajectory: this process's n samples.

    Returns:
        Numbers 0 .. G - 1, (n_all,), and where this process's samples are among them.
    """
    prompts, device = trajectory.prompts, trajectory.reward.device
    number = {
        p: int.from_bytes(sha256(p.encode(errors="surrogatepass")).digest()[:7], "big")
        for p in dict.fromkeys(prompts or [])
    }
    keys = [0] * len(trajectory) if prompts is None else [number[p] for p in prompts]
    everywhere, mine = together(host, torch.tensor(keys, dtype=torch.long, device=device))
    return cast(Tensor, everywhere.unique(return_inverse=True)[1]), mine


def sample_rows(host: Any, trajectory: Trajectory) -> Tensor:
    """Which row of a table for the samples of all processes belongs to each of these: (n,), on the CPU.

    Those of one rollout are told by their global numbers, and so get the same row on any number of processes; samples
    that were drawn from a buffer of several by their place.
    """
    n, world = len(trajectory), int(host.trainer.world_size)
    if host.sampler.replay_samples is None:
        return trajectory.sample.cpu()
    return torch.arange(n) * world + int(host.trainer.global_rank)


def _uneven(loader: Any) -> bool:
    """Whether the last batch of a loader is smaller than the others."""
    size, mine = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)  # this process's share
    return isinstance(size, int) and isinstance(mine, Sized) and len(mine) % size > 0 and not loader.drop_last


def update_size(host: Any, trajectory: Trajectory) -> str:
    """How many samples one update trains on, and what they are made of; all processes must ask."""
    trainer = host.trainer
    counts = torch.tensor([[len(trajectory)], [len(trajectory.condition)]], device=host.device)
    samples, conditions = together(host, counts)[0].sum(1).tolist()
    kind = "draws" if trajectory.prompts is None else "prompts"
    parts = [f"{conditions} {kind}" + (f" x {samples // conditions} samples" if samples % conditions == 0 else "")]
    if host.sampler.replay_samples is not None:  # its conditions are those of the whole buffer
        parts = [f"{samples} replayed end points"]
    elif _uneven(trainer.train_dataloader):
        parts.append("(fewer where an epoch ends)")
    if trainer.world_size > 1:
        parts.append(f"over {trainer.world_size} processes")
    if trainer.accumulate_grad_batches > 1:
        parts.append(f"x {trainer.accumulate_grad_batches} accumulated batches")
    return f"One update trains on {samples * trainer.accumulate_grad_batches} samples: {' '.join(parts)}"

"""The replay buffer of rollouts: what the sampler trains on between two refreshes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..noise import keyed_choice
from ..trajectory import Trajectory
from .processes import everywhere

__all__ = ["ReplayBuffer", "dealt", "everybodys"]


class ReplayBuffer:
    """The last `size` rollouts, each good for `passes` batches.

    No bad sample is trained on again: a rollout without one good sample on any process is not kept, of several rollouts
    only good samples are drawn, and in a rollout that is drawn whole a bad one has weight 0 and zeros in place of its
    numbers, which keeps the groups of its prompt, and those of all processes, of one size.

    Args:
        size: rollouts kept; the oldest one leaves first.
        passes: batches that train on one rollout before it leaves; None: until newer ones push it out.
    """

    def __init__(self, size: int = 1, passes: int | None = None) -> None:
        self.size = size
        self.passes = passes
        self._rollouts: list[Trajectory] = []
        self._uses: list[int] = []
        self._whole: Trajectory | None = None  # all of them as one, once somebody asked

    def __len__(self) -> int:
        return len(self._rollouts)

    def add(self, trajectory: Trajectory, keep: bool = True) -> Trajectory:
        """Keep a fresh rollout, and use it once; without `keep`, hand it on alone."""
        if not keep:
            return trajectory
        self._rollouts, self._uses = [*self._rollouts, trajectory][-self.size :], [*self._uses, 0][-self.size :]
        self._whole = None
        return self._use(len(self._rollouts) - 1)

    def draw(self, seed: int, batch: int) -> Trajectory:
        """One of the rollouts, each as likely as any other, keyed by the number of the batch."""
        return self._use(keyed_choice(seed, "buffer", batch, range(len(self)), 1)[0])

    def draw_samples(self, seed: int, batch: int, samples: int, world: int = 1, rank: int = 0) -> Trajectory:
        """Different samples of all rollouts, as many as there are at most, keyed by the number of the batch.

        Args:
            seed: of the key.
            batch: of the key.
            samples: for each process.
            world: processes, all of which have the same buffer and share the draw out in turn.
            rank: the number of this one.
        """
        if self._whole is None:
            whole = Trajectory.cat(self._rollouts)
            good = whole.weight > 0
            self._whole = whole if bool(good.all()) or not bool(good.any()) else whole[good]
        n = len(self._whole)
        # All processes make as many network calls: what cannot be shared out evenly is left.
        drawn = keyed_choice(seed, "buffer", batch, range(n), min(samples, n // world) * world)
        if not drawn:  # fewer samples than processes: each trains on all, which is the same mean
            return self._whole
        return self._whole[torch.tensor(drawn[rank::world])]

    def to(self, device: torch.device) -> None:
        """Move what a checkpoint brought; numbers of samples and conditions stay on the CPU, as in a rollout."""
        self._rollouts = [replace(t.to(device), index=t.index, sample=t.sample) for t in self._rollouts]
        self._whole = None

    def clear(self) -> None:
        """Forget all rollouts."""
        self._rollouts, self._uses, self._whole = [], [], None

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain tensors and numbers, which load with `weights_only=True`."""
        return [{"uses": n, **t.as_dict()} for t, n in zip(self._rollouts, self._uses, strict=True)]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """What `state_dict` gave."""
        self._uses = [record["uses"] for record in state]
        self._rollouts = [Trajectory.from_dict({k: v for k, v in r.items() if k != "uses"}) for r in state]
        self._whole = None

    def _use(self, i: int) -> Trajectory:
        trajectory = self._rollouts[i]
        self._uses[i] += 1
        if self.passes is not None and self._uses[i] >= self.passes:
            del self._rollouts[i], self._uses[i]
        return trajectory


def dealt(parts: Sequence[Sequence[dict[str, Any]]], each: int, world: int, rank: int) -> list[dict[str, Any]]:
    """The buffers of all processes, dealt out to another number of them.

    Condition c of a rollout, whichever process had it, goes to process c mod world: as a loader that shares the
    same batches out among `world` processes would have dealt it.

    Args:
        parts: `state_dict` of each process that there was: parts of the same rollouts, in the same order.
        each: samples of a condition.
        world: processes that there are.
        rank: the number of this one.

    Returns:
        The `state_dict` of this process's buffer.

    Raises:
        ValueError: if the conditions of a rollout cannot be shared out evenly.
    """
    mine = []
    for records in zip(*parts, strict=True):
        uses = records[0]["uses"]
        whole = Trajectory.cat([Trajectory.from_dict({k: v for k, v in r.items() if k != "uses"}) for r in records])
        whole = whole[whole.sample.argsort()]
        conditions = whole.sample.div(each, rounding_mode="floor")
        if len(whole) % (each * world) != 0:
            raise ValueError(
                f"the checkpoint's buffer has rollouts of {len(whole) // each} conditions, which {world} processes "
                "cannot share evenly: go on with as many processes as before, or one that divides it"
            )
        own = whole[conditions % world == rank]
        wanted = own.index[::each]
        record = replace(own, condition=own.condition[wanted], index=torch.arange(len(wanted)).repeat_interleave(each))
        mine.append({"uses": uses, **record.as_dict()})
    return mine


def everybodys(trajectory: Trajectory, each: int) -> Trajectory:
    """One rollout of all processes, in the order of its samples: what one process would have drawn; all must ask."""
    parts = everywhere(trajectory.as_dict())
    if len(parts) == 1:
        return trajectory
    (record,) = dealt([[{"uses": 0, **part}] for part in parts], each, 1, 0)
    del record["uses"]
    whole = Trajectory.from_dict(record)
    return replace(whole.to(trajectory.end.device), index=whole.index, sample=whole.sample)

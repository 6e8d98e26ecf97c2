"""The replay buffer of rollouts: what the sampler trains on between two refreshes."""

from collections.abc import Sequence
from typing import Any

import torch

from ..noise import keyed_choice
from ..trajectory import Trajectory

__all__ = ["ReplayBuffer"]


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

    def draw_samples(self, seed: int, batch: int, samples: int) -> Trajectory:
        """Different samples of all rollouts, as many as there are at most, keyed by the number of the batch."""
        if self._whole is None:
            whole = Trajectory.cat(self._rollouts)
            good = whole.weight > 0
            # Of a process without any, what is left has weight 0: it still takes its part in the update.
            self._whole = whole if bool(good.all()) or not bool(good.any()) else whole[good]
        n = len(self._whole)
        return self._whole[torch.tensor(keyed_choice(seed, "buffer", batch, range(n), min(samples, n)))]

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

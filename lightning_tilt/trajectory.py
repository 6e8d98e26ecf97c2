"""`Trajectory`: what one rollout produced, the one currency between the sampler and the losses.

A rollout steps N states through the K Gaussian transitions of a chain, from noise (k = 0) to data (k = K):

    X_{k+1} = m_k(X_k) + std_k z_k,      z_k ~ N(0, I),      k = 0, ..., K - 1

The record is frozen: who needs more (a loss its adjoints) makes a new one with `dataclasses.replace`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tilt.condition import Condition

__all__ = ["Trajectory"]

_PER_SAMPLE = (
    "index",
    "sample",
    "reward",
    "reward_gradient",
    "weight",
    "log_w",
    "importance",
    "advantage",
    "end_score",
)
_STEP_MAJOR = ("states", "noise", "adjoint", "base_mean", "marginal_weight", "marginal_source")
_OF_WHOLE_PATHS = ("supervised", "adjoint", "base_mean", "marginal_weight", "marginal_source")


@dataclass(frozen=True)
class Trajectory:
    """N paths of K steps.

    Attributes:
        t: process times of the grid, noise first, (K + 1,), float64.
        states: X_0 ... X_K, (K + 1, N, *shape).
        noise: z_0 ... z_{K-1}, (K, N, *shape).
        condition: the C conditions of the rollout.
        index: which of them each sample has, (N,), integer.
        sample: the global number of each sample, the same on any number of processes, (N,), integer.
        reward: r(X_K), (N,).
        lam: the multiplier in force when the rollout was made.
        rollout: the number of the rollout, from 0.
        weight: 1 for a good sample, 0 for one whose reward or gradient was not finite and which is left out, (N,).
        reward_gradient: gradient of r at X_K, (N, *shape), if the loss asked for it.
        parts: what else the reward says of each sample, (N,) by name, until the sampler has read it.
        log_w: log path weight lam r - sum_k (u_k . z_k + |u_k|^2 / 2), (N,), where every step has been compared with
            the base.
        importance: path weights as a loss uses them, of mean 1 over the rollout's good samples, (N,); None: all 1.
        advantage: how much better a sample is than the others of its prompt, as a loss measures it, (N,).
        end_score: gradient of log p_base at X_K, (N, *shape), for losses that ask for it.
        supervised: the steps a loss looks at, (J,), integer, increasing.
        adjoint: a_{k+1} for each supervised k, (J, N, *shape).
        base_mean: the base's mean at X_k for each supervised k, (J, N, *shape).
        marginal_weight: weights of X_k for a path of marginals pi_{t_k}, of mean 1 for each prompt and k, (K, N).
        marginal_source: `rho - E_pi_t[rho]` at X_k, rho = d_t r_t + v.grad r_t, pi_t ~ p_t exp(r_t), (K, N).
    """

    t: Tensor
    states: Tensor
    noise: Tensor
    condition: Condition
    index: Tensor
    sample: Tensor
    reward: Tensor
    lam: float
    rollout: int
    weight: Tensor
    reward_gradient: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    log_w: Tensor | None = None
    importance: Tensor | None = None
    end_score: Tensor | None = None
    advantage: Tensor | None = None
    supervised: Tensor | None = None
    adjoint: Tensor | None = None
    base_mean: Tensor | None = None
    marginal_weight: Tensor | None = None
    marginal_source: Tensor | None = None

    def __post_init__(self) -> None:
        k, n = self.noise.shape[:2]
        if self.states.shape[0] != k + 1 or self.states.shape[1] != n or len(self.t) != k + 1:
            raise ValueError(
                f"{k} steps of {n} samples need states ({k + 1}, {n}, ...) and {k + 1} times; "
                f"got states {tuple(self.states.shape)} and {len(self.t)} times"
            )

    def __len__(self) -> int:
        return self.states.shape[1]

    @property
    def steps(self) -> int:
        """K."""
        return self.noise.shape[0]

    @property
    def end(self) -> Tensor:
        """The end points X_K, (N, *shape)."""
        return self.states[-1]

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of each sample, or None."""
        prompts = self.condition.prompts
        return None if prompts is None else [prompts[i] for i in self.index.tolist()]

    def __getitem__(self, samples: Tensor | slice) -> "Trajectory":
        """The same steps of some samples (a slice, integers or a mask)."""
        if isinstance(samples, Tensor):
            samples = samples.cpu()  # an index on the CPU serves tensors on every device
        changes: dict[str, Any] = {name: self._get(name, lambda v: v[samples]) for name in _PER_SAMPLE}
        changes |= {name: self._get(name, lambda v: v[:, samples]) for name in _STEP_MAJOR}
        changes["parts"] = self._parts(lambda v: v[samples])
        return replace(self, **changes)

    def between(self, first: int, last: int) -> "Trajectory":
        """The steps `first, ..., last - 1` of all samples: a path from X_first to X_last.

        What a loss added is dropped, since it belongs to the whole path, and so is `log_w`.
        """
        if not 0 <= first < last <= self.steps:
            raise IndexError(f"between({first}, {last}) of a trajectory of {self.steps} steps")
        t, states = self.t[first : last + 1], self.states[first : last + 1]
        dropped: dict[str, Any] = dict.fromkeys(("log_w", *_OF_WHOLE_PATHS))
        return replace(self, t=t, states=states, noise=self.noise[first:last], **dropped)

    def ends(self) -> "Trajectory":
        """The end points alone, as a record of no steps: what losses need that noise them again."""
        dropped: dict[str, Any] = dict.fromkeys(_OF_WHOLE_PATHS)
        return replace(self, t=self.t[-1:], states=self.states[-1:], noise=self.noise[:0], **dropped)

    @classmethod
    def cat(cls, records: Sequence["Trajectory"]) -> "Trajectory":
        """The samples of several records as one; `lam` and `rollout` are those of the last, `parts` is left out.

        Raises:
            ValueError: if their steps differ.
        """
        first, last = records[0], records[-1]
        if any(not torch.equal(r.t, first.t) for r in records):
            raise ValueError("only records of the same steps can be one")
        changes: dict[str, Any] = {"parts": None}
        for name in (*_PER_SAMPLE, *_STEP_MAJOR):
            values = [r.__dict__[name] for r in records]
            whole = all(v is not None for v in values)
            changes[name] = torch.cat(values, int(name in _STEP_MAJOR)) if whole else None
        offsets = torch.tensor([0, *(len(r.condition) for r in records[:-1])]).cumsum(0).tolist()
        changes["index"] = torch.cat([r.index + o for r, o in zip(records, offsets, strict=True)])
        return replace(last, condition=Condition.cat([r.condition for r in records]), **changes)

    def to(self, *args: Any, **kwargs: Any) -> "Trajectory":
        """The same trajectory on another device or in another dtype (times keep theirs)."""

        def move(value: Tensor) -> Tensor:
            moved: Tensor = value.to(*args, **kwargs)
            return moved if value.is_floating_point() else moved.to(value.dtype)

        names = [f.name for f in fields(self) if f.name not in ("t", "condition", "lam", "rollout", "parts")]
        changes: dict[str, Any] = {name: self._get(name, move) for name in names} | {"parts": self._parts(move)}
        return replace(self, condition=self.condition.to(*args, **kwargs), **changes)

    def save(self, path: str | Path) -> None:
        """Write the record to a file that `torch.load(..., weights_only=True)` reads."""
        torch.save(self.as_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> "Trajectory":
        """Read what `save` wrote; no pickled code is run."""
        return cls.from_dict(torch.load(path, weights_only=True))

    def as_dict(self) -> dict[str, Any]:
        """Plain tensors, strings and numbers."""
        record = {f.name: self.__dict__[f.name] for f in fields(self)}
        return record | {"condition": {**self.condition.__dict__, "tensors": dict(self.condition.tensors)}}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Trajectory":
        """What `as_dict` gave."""
        return cls(**{**record, "condition": Condition(**record["condition"])})

    def _parts(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor] | None:
        return None if self.parts is None else {name: change(v) for name, v in self.parts.items()}

    def _get(self, name: str, change: Callable[[Tensor], Tensor]) -> Tensor | None:
        value: Tensor | None = self.__dict__[name]
        return None if value is None else change(value)

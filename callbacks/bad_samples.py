"""Samples that are not finite: found after scoring and after the loss has prepared a rollout, weighed 0 or refused.

    scored      reward, reward gradient, end point          before `Loss.prepare`, so that nothing bad is swept
    prepared    everything else the loss will read          adjoints, path weights, advantages

A bad sample gets weight 0 and zeros in place of its numbers (NaN times 0 is NaN).  Of a training rollout the processes
agree once, when it is prepared, by one sum of a few numbers; with it come the means that a reward learns from.
Elsewhere a process raises by itself, and who shares work out (validation, reports) tells the others (`agree`).
"""

import math
import warnings
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ..interfaces import BadPolicy, Loss, Sampler
from ..interfaces.not_finite import named, stop_together, where_of
from ..noise import Stream
from ..trajectory import Trajectory

__all__ = ["BadSamples", "tolerant_rollout"]

_LEFT_OUT = "; they are left out."
_MEND = "Mend the reward, or pass sampler.on_bad_reward: skip."
_STEP_MAJOR = ("adjoint", "base_mean", "marginal_weight", "marginal_source", "states")
_PER_SAMPLE = ("reward_gradient", "log_w", "importance", "advantage", "end_score", "reward")


class BadSamples:
    """Applies the policy to rollouts.

    Args:
        policy: "stop" or "skip".

    Attributes:
        good: the good samples of the last training rollout, over all processes.

    Raises:
        ValueError: for another policy.
    """

    def __init__(self, policy: BadPolicy) -> None:
        if policy not in get_args(BadPolicy):
            raise ValueError(f"sampler.on_bad_reward is one of {get_args(BadPolicy)}, not {policy!r}")
        self.policy: BadPolicy = policy
        self.good = 0.0
        self._found: list[str] = []

    def scored(self, host: Any, path: Trajectory, stream: Stream) -> Trajectory:
        """A scored rollout with weight 0 for what is not finite; of training, the verdict follows in `prepared`.

        Raises:
            FloatingPointError: under "stop" for any stream but training.
        """
        if stream == "train":
            self._found = []
        parts = {"a reward": path.reward, "a reward gradient": path.reward_gradient, "a state": path.end}
        path, found = _without(host, path, {k: v for k, v in parts.items() if v is not None}, stream)
        self._note(found)
        if found and self.policy == "stop" and stream != "train":
            raise FloatingPointError(f"{found}. {_MEND}")
        return path

    def prepared(self, loss: Loss, path: Trajectory) -> tuple[Trajectory, dict[str, Tensor]]:
        """A training rollout as the loss has prepared it, and what is to be logged of its reward's parts.

        Here the processes agree, and here the reward learns.

        Raises:
            FloatingPointError: under "stop", on all processes, if one of them has a sample that is not finite.
        """
        stages = {name: path.__dict__[name].movedim(1, 0) for name in _STEP_MAJOR if path.__dict__[name] is not None}
        stages |= {name: path.__dict__[name] for name in _PER_SAMPLE if path.__dict__[name] is not None}
        path, found = _without(loss, path, {f"the {k.replace('_', ' ')}": v for k, v in stages.items()}, "train")
        self._note(found)
        good, parts = path.weight > 0, path.parts or {}
        sums = [torch.where(good, part, 0.0).double().sum() for part in parts.values()]
        counts = [good.double().sum(), (~good).double().sum()]
        total = cast(Tensor, loss.trainer.strategy.reduce(torch.stack([*counts, *sums]), reduce_op="sum"))
        self.good, bad = total[:2].tolist()
        if bad and self.policy == "stop":
            stop_together(self._found, _MEND)
        logged = {"bad_samples": total[1]}
        if self.good > 0:
            means = dict(zip(parts, total[2:] / total[0], strict=True))
            logged |= means | loss.reward.learn(means)
        return replace(path, parts=None), logged

    def _note(self, found: str) -> None:
        if found and self.policy == "skip":
            warnings.warn(found + _LEFT_OUT, stacklevel=3)
        elif found:
            self._found.append(found)


def tolerant_rollout(sampler: Sampler, host: Any, batch: Any, **how: Any) -> tuple[Trajectory, list[str]]:
    """A rollout to its end, whatever the policy, and what "stop" has to say of it.

    Where a sharded network is called by all processes together, none of them may stop at a sample of its own.

    Args:
        sampler: a variant that nobody else uses.
        host: see `Sampler.rollout`.
        batch: see `Sampler.rollout`.
        how: its further arguments.
    """
    policy, sampler.on_bad_reward = sampler.on_bad_reward, "skip"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path = sampler.rollout(host, batch, **how)
    bad = []
    for warning in told:
        text = str(warning.message)
        if policy == "stop" and text.endswith(_LEFT_OUT):
            bad.append(f"{text.removesuffix(_LEFT_OUT)}. {_MEND}")
        else:
            warnings.warn(text, warning.category, stacklevel=2)
    return path, bad


def _without(host: Any, path: Trajectory, stages: dict[str, Tensor], stream: Stream) -> tuple[Trajectory, str]:
    """The rollout with weight 0 and zeros for the good samples that have become bad, and a message ("" without)."""
    was_good = path.weight > 0
    fine = {
        name: torch.isfinite(value).reshape(len(path), math.prod(value.shape[1:])).all(1)
        for name, value in stages.items()
    }
    good = was_good & torch.stack(list(fine.values())).all(0)
    bad = (was_good & ~good).nonzero().flatten().tolist()
    if not bad:
        return path, ""
    kinds = " or ".join(name for name, ok in fine.items() if not bool(ok[was_good].all()))
    message = (
        f"{len(bad)} of {len(path)} samples of {stream} rollout {path.rollout} have {kinds} that is not finite"
        f"{where_of(host)}: {named(bad, path.prompts)}"
    )
    changes: dict[str, Any] = {"weight": torch.where(good, path.weight, 0.0)}
    for name in (*_PER_SAMPLE, *_STEP_MAJOR):
        value = path.__dict__[name]
        if value is not None:
            shape = (1, -1) if name in _STEP_MAJOR else (-1,)
            keep = good.reshape(*shape, *(1,) * (value.ndim - len(shape)))
            if stream != "train":  # nobody trains on it, and an image whose reward is bad is still an image
                keep = torch.isfinite(value)
            changes[name] = torch.where(keep, value, 0.0)
    return replace(path, **changes), message

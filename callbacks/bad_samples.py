"""Samples that are not finite: found after scoring and after the loss has prepared a rollout, weighed 0 or refused.

    scored      reward, reward gradient, end point          before `Loss.prepare`, so that nothing bad is swept
    prepared    everything else the loss will read          adjoints, path weights, advantages

A bad sample gets weight 0 and zeros in place of its numbers (NaN times 0 is NaN).  Of a training rollout the processes
agree once, when it is prepared, by one sum of a few numbers; with it come the means that a reward learns from.
Elsewhere whoever shares work out (validation, prediction, reports) asks what was found, and the processes agree on it.
"""

import math
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ..interfaces import BadPolicy, Loss
from ..interfaces.not_finite import MEND, agree, judge, named, where_of
from ..noise import Stream
from ..trajectory import Trajectory

__all__ = ["BadSamples"]

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

    def scored(self, host: Any, path: Trajectory, stream: Stream, bad: list[str] | None) -> Trajectory:
        """A scored rollout with weight 0 for what is not finite.

        Args:
            host: see `Sampler.rollout`.
            path: the rollout.
            stream: of the rollout.
            bad: takes what was found, of which the caller judges; None: judge here.

        Raises:
            FloatingPointError: under "stop", if something was found and nobody else judges.
        """
        parts = {"a reward": path.reward, "a reward gradient": path.reward_gradient, "a state": path.end}
        path, found = _without(host, path, {k: v for k, v in parts.items() if v is not None}, stream)
        judge(self.policy, found, bad)
        return path

    def prepared(self, loss: Loss, path: Trajectory, bad: list[str]) -> tuple[Trajectory, dict[str, Tensor]]:
        """A training rollout as the loss has prepared it, and what is to be logged of its reward's parts.

        Here the processes agree, and here the reward learns.

        Args:
            loss: what has prepared it.
            path: the rollout.
            bad: what was found when it was scored.

        Raises:
            FloatingPointError: under "stop", on all processes, if one of them has a sample that is not finite.
        """
        stages = {name: path.__dict__[name].movedim(1, 0) for name in _STEP_MAJOR if path.__dict__[name] is not None}
        stages |= {name: path.__dict__[name] for name in _PER_SAMPLE if path.__dict__[name] is not None}
        path, found = _without(loss, path, {f"the {k.replace('_', ' ')}": v for k, v in stages.items()}, "train")
        bad = bad + found
        good, parts = path.weight > 0, path.parts or {}
        sums = [torch.where(good, part, 0.0).double().sum() for part in parts.values()]
        counts = [good.double().sum(), (~good).double().sum()]
        total = cast(Tensor, loss.trainer.strategy.reduce(torch.stack([*counts, *sums]), reduce_op="sum"))
        self.good, count = total[:2].tolist()
        if count and self.policy == "stop":
            agree(loss, bad, MEND)
        judge(self.policy, bad)
        logged = {"bad_samples": total[1]}
        if self.good > 0:
            means = dict(zip(parts, total[2:] / total[0], strict=True))
            logged |= means | loss.reward.learn(means)
        return replace(path, parts=None), logged


def _without(host: Any, path: Trajectory, stages: dict[str, Tensor], stream: Stream) -> tuple[Trajectory, list[str]]:
    """The rollout with weight 0 and zeros for the good samples that have become bad, and a message if there are any."""
    was_good = path.weight > 0
    fine = {
        name: torch.isfinite(value).reshape(len(path), math.prod(value.shape[1:])).all(1)
        for name, value in stages.items()
    }
    good = was_good & torch.stack(list(fine.values())).all(0)
    bad = (was_good & ~good).nonzero().flatten().tolist()
    if not bad:
        return path, []
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
    return replace(path, **changes), [message]

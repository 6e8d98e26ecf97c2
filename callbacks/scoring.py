"""Scoring of end points: decode, reward, gradient, and what becomes of samples that are not finite."""

import warnings
from dataclasses import replace
from typing import Any, Literal

import torch

from ..chain import slices
from ..trajectory import Trajectory

__all__ = ["BadRewardPolicy", "score_end_points", "without_bad"]

BadRewardPolicy = Literal["stop", "skip"]
"""What to do with a sample whose reward, gradient or state is not finite."""


def score_end_points(host: Any, trajectory: Trajectory, gradient: bool, micro_batch: int | None) -> Trajectory:
    """Decode and score the end points, with the gradient of the reward if it is asked for.

    Args:
        host: what offers `predictor` and `reward`.
        trajectory: a rollout of N samples.
        gradient: bring the gradient of r at X_K, through the decoder.
        micro_batch: samples at once; None: all.

    Returns:
        The trajectory with `reward` (N,) and, if asked for, `reward_gradient` (N, *shape).

    Raises:
        ValueError: if the reward does not return one number a sample.
        TypeError: if the reward has no gradient though it says so.
    """
    prompts = trajectory.prompts
    rewards, gradients = [], []
    for i in slices(len(trajectory), micro_batch):
        x = trajectory.end[i].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            reward = host.reward.score(host.predictor.decode(x), None if prompts is None else prompts[i])
        if reward.shape != (len(x),):
            raise ValueError(
                f"{type(host.reward).__name__}.score returned shape {tuple(reward.shape)} for {len(x)} samples; "
                f"it should be ({len(x)},): one number a sample"
            )
        if gradient and not reward.requires_grad:
            raise TypeError(
                f"{type(host.reward).__name__}.score has no gradient in the images although is_differentiable is True: "
                "remove no_grad, detach or numpy from it, or set is_differentiable = False"
            )
        rewards.append(reward.detach().to(x.dtype))
        if gradient:
            gradients.append(torch.autograd.grad(reward.sum(), x)[0])
    reward_gradient = torch.cat(gradients) if gradient else None
    return replace(trajectory, reward=torch.cat(rewards), reward_gradient=reward_gradient)


def without_bad(trajectory: Trajectory, stream: str, policy: BadRewardPolicy) -> Trajectory:
    """Stop at a sample that is not finite, or give it weight 0.

    Args:
        trajectory: a scored rollout.
        stream: what the rollout is for, named in the message.
        policy: "stop" raises, "skip" warns.

    Raises:
        FloatingPointError: under "stop", naming rollout and prompts.
    """
    good = torch.isfinite(trajectory.reward) & torch.isfinite(trajectory.end).flatten(1).all(1)
    gradient = trajectory.reward_gradient
    if gradient is not None:
        good &= torch.isfinite(gradient).flatten(1).all(1)
    if bool(good.all()):
        return trajectory
    bad = (~good).nonzero().flatten().tolist()
    prompts = trajectory.prompts
    named = sorted({repr(prompts[i]) for i in bad}) if prompts else [f"sample {i}" for i in bad]
    message = (
        f"{len(bad)} of {len(trajectory)} samples of {stream} rollout {trajectory.rollout} have a reward, a reward "
        f"gradient or a state that is not finite: {', '.join(named[:3])}{', ...' if len(named) > 3 else ''}"
    )
    if policy == "stop":
        raise FloatingPointError(message + ". Mend the reward, or pass sampler.on_bad_reward: skip.")
    warnings.warn(message + "; they are left out.", stacklevel=2)
    keep = good.reshape(-1, *(1,) * (trajectory.end.ndim - 1))
    return replace(
        trajectory,
        weight=good.to(trajectory.weight.dtype),
        reward=torch.where(good, trajectory.reward, 0.0),
        reward_gradient=None if gradient is None else torch.where(keep, gradient, 0.0),
        states=torch.where(keep, trajectory.states, 0.0),
    )

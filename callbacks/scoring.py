"""Scoring of end points: decode, reward, gradient, and what the reward tells besides."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..chain import slices
from ..interfaces import Reward
from ..trajectory import Trajectory

__all__ = ["check_one_a_sample", "score_end_points"]


def score_end_points(host: Any, trajectory: Trajectory, gradient: bool, micro_batch: int | None) -> Trajectory:
    """Decode and score the end points, with the gradient of the reward if it is asked for.

    Args:
        host: what offers `predictor` and `reward`.
        trajectory: a rollout of N samples.
        gradient: bring the gradient of r at X_K, through the decoder.
        micro_batch: samples at once; None: all.

    Returns:
        The trajectory with `reward` (N,), the reward's `parts`, and, if asked for, `reward_gradient` (N, *shape).

    Raises:
        ValueError: if the reward does not return one number a sample.
        TypeError: if the reward has no gradient though it says so.
    """
    prompts = trajectory.prompts
    rewards, gradients, told = [], [], []
    for i in slices(len(trajectory), micro_batch):
        x = trajectory.end[i].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            reward, parts = host.reward.measure(host.predictor.decode(x), None if prompts is None else prompts[i])
        check_one_a_sample(host.reward, reward, len(x))
        if gradient and not reward.requires_grad:
            raise TypeError(
                f"{type(host.reward).__name__}.score has no gradient in the images although is_differentiable is True: "
                "remove no_grad, detach or numpy from it, or set is_differentiable = False"
            )
        rewards.append(reward.detach().to(x.dtype))
        told.append(parts)
        if gradient:
            gradients.append(torch.autograd.grad(reward.sum(), x)[0])
    reward_gradient = torch.cat(gradients) if gradient else None
    parts = {name: torch.cat([p[name].detach() for p in told]) for name in told[0]}
    return replace(trajectory, reward=torch.cat(rewards), reward_gradient=reward_gradient, parts=parts)


def check_one_a_sample(reward: Reward, score: Tensor, n: int) -> None:
    """Refuse what would be spread over a batch in silence: a mean of it, or several columns.

    Args:
        reward: which has just judged.
        score: what it returned.
        n: samples in the batch.

    Raises:
        ValueError: if `score` is not of shape (n,).
    """
    if score.shape != (n,):
        raise ValueError(
            f"{type(reward).__name__}.score returned shape {tuple(score.shape)} for {n} samples; "
            f"it should be ({n},): one number a sample"
        )

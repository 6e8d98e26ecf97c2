"""Path weights for the losses that can use them: `log w = lam r - log dP_theta/dP_base`, of mean 1 over a rollout.

What may be done to them, and the bias of each, is said in `identities.treatment`.  Each prompt has a Z of its own, so
weights are normalised prompt by prompt, and all prompts keep equal mass; a density has one Z.  Groups span
the processes.  Under gradient accumulation every batch is normalised in itself.
"""

from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_tilt.identities import Treatment, treat_weights
from lightning_tilt.interfaces import LamSchedule, Loss
from lightning_tilt.interfaces.groups import prompt_groups, together
from lightning_tilt.trajectory import Trajectory

__all__ = ["PathWeighted", "good_weights"]


def good_weights(log_w: Tensor, kind: Treatment, clip: float, group: Tensor | None = None) -> Tensor:
    """Weights of mean 1 over the good samples of each group, 0 for the others.

    Args:
        log_w: log weights, (n,); -inf for a sample that is left out.
        kind: what is done to them.
        clip: largest weight of "clipped", in units of their mean.
        group: which prompt a sample belongs to, (n,), integer; None: one group.
    """
    good = torch.isfinite(log_w)
    weights = torch.zeros_like(log_w)
    if bool(good.any()):
        group = None if group is None else group.to(log_w.device)[good]
        weights[good] = treat_weights(log_w[good], kind, group=group, clip=clip)
    return weights


class PathWeighted(Loss):
    """A loss that can weigh its samples by their path weights.

    Args:
        path_weights: "none"; or "self_normalised", "clipped", "truncated", which ask for a chain with noise whose steps
            of std = 0 the base makes, and cost one base evaluation a state.
        weight_clip: largest weight of "clipped", in units of their mean.
    """

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        path_weights: Treatment = "none",
        weight_clip: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if path_weights not in get_args(Treatment):
            raise ValueError(f"path_weights is one of {get_args(Treatment)}, not {path_weights!r}")
        if weight_clip < 1:
            raise ValueError(f"weight_clip is in units of the mean weight and at least 1, not {weight_clip}")
        self.path_weights: Treatment = path_weights
        self.weight_clip = weight_clip

    def setup(self, stage: str) -> None:
        """Refuse weights that mean nothing: of deterministic chains, or where the model makes steps of std = 0."""
        super().setup(stage)
        if stage != "fit" or self.path_weights == "none":
            return
        if not self.sampler.weighted or not self.sampler.chain(self, count=False).noisy_steps:
            raise ValueError(
                f"{type(self).__name__}: path_weights: {self.path_weights} needs a chain with noise and "
                "sampler.base_last_step: true; paths of an ODE have no weights. Use DDIM with ddim_eta: 1, or "
                "path_weights: none."
            )

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """Weigh the paths, if asked to."""
        if self.path_weights == "none":
            return trajectory
        sampler = self.sampler
        log_w = sampler.chain(self).log_weights(
            self.predictor, trajectory, trajectory.lam, sampler.guidance_scale, sampler.rollout_micro_batch
        )
        importance = self._normalised(trajectory, torch.where(trajectory.weight > 0, log_w.double(), -torch.inf))
        return replace(trajectory, log_w=log_w, importance=importance.to(trajectory.reward))

    def _normalised(self, trajectory: Trajectory, log_w: Tensor) -> Tensor:
        everywhere, mine = together(self, log_w)
        group, _ = prompt_groups(self, trajectory)
        return good_weights(everywhere, self.path_weights, self.weight_clip, group)[mine]

"""Path weights for the losses that can use them: `log w = lam r - log dP_theta/dP_base`, of mean 1 over a rollout.

    none             1: the samples as they are
    self_normalised  w/mean(w): unbiased up to O(1/n), as noisy as 1/ESS says
    clipped          min(w/mean(w), clip), then of mean 1 again: less noise, pulls the fixed point towards the model
    truncated        the same with clip = sqrt(n) (Ionides 2008): its bias vanishes with n

Each prompt has a Z of its own, so weights are normalised prompt by prompt, and all prompts keep equal mass; a density
has one Z for the samples of all processes.  Under gradient accumulation every batch is normalised in itself.
"""

import math
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from lightning_tilt.interfaces import LamSchedule, Loss
from lightning_tilt.trajectory import Trajectory

__all__ = ["PathWeighted", "PathWeights", "weights_of_mean_one"]

PathWeights = Literal["none", "self_normalised", "clipped", "truncated"]


def weights_of_mean_one(log_w: Tensor, kind: PathWeights, clip: float) -> Tensor:
    """The weights of one group of samples.

    Args:
        log_w: log weights, (n,); -inf for a sample that is left out.
        kind: what is done to them; see above.
        clip: largest weight of `clipped`, in units of their mean.

    Returns:
        (n,), of mean 1 over the samples that are not left out.
    """
    n = int(torch.isfinite(log_w).sum())
    if kind == "none" or n == 0:
        return torch.isfinite(log_w).to(log_w.dtype)
    w = n * torch.softmax(log_w, 0)
    if kind == "self_normalised":
        return w
    w = w.clamp(max=clip if kind == "clipped" else math.sqrt(n))
    return w * (n / w.sum())


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
        path_weights: PathWeights = "none",
        weight_clip: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if path_weights not in get_args(PathWeights):
            raise ValueError(f"path_weights is one of {get_args(PathWeights)}, not {path_weights!r}")
        if weight_clip < 1:
            raise ValueError(f"weight_clip is in units of the mean weight and at least 1, not {weight_clip}")
        self.path_weights: PathWeights = path_weights
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
        log_w = sampler.chain(self).log_weights(self.predictor, trajectory, trajectory.lam, sampler.guidance_scale)
        importance = self._normalised(trajectory, torch.where(trajectory.weight > 0, log_w.double(), -torch.inf))
        return replace(trajectory, log_w=log_w, importance=importance.to(trajectory.reward))

    def _normalised(self, trajectory: Trajectory, log_w: Tensor) -> Tensor:
        if trajectory.prompts is None:  # one Z for all processes
            everywhere = cast(Tensor, self.all_gather(log_w)).reshape(-1)  # type: ignore[attr-defined]
            first = self.trainer.global_rank * len(log_w)
            return weights_of_mean_one(everywhere, self.path_weights, self.weight_clip)[first : first + len(log_w)]
        weights = torch.zeros_like(log_w)
        for group in trajectory.index.unique():
            mine = (trajectory.index == group).to(log_w.device)
            weights[mine] = weights_of_mean_one(log_w[mine], self.path_weights, self.weight_clip)
        return weights

"""Cross-entropy on weighted paths (2005.05409, section 3; Rubinstein's method on path space).

KL(P* | P_theta) up to a constant, from paths of any law v with weights w = dP*/dv:

    L = -E_v[ w sum_k log N(X_{k+1}; m_k, std_k^2) ] = -E_v[ w sum_k l_k ] + const

    log w = lam r(X_K) - log dv/dP_base + const      self-normalised: over a prompt's samples, or a density's batch

Its minimiser does not depend on v: m_k(x) = E*[X_{k+1} | X_k = x], the mean of the tilted kernel.  On policy and for a
Gaussian problem this is the best control with the std held; in general the two KLs have different minimisers at finite
K (this one covers modes, the other seeks them), and one limit.  Self-normalised weights leave a bias of order 1/n, and
noise as 1/ESS: far from the target a few paths carry all weight, and `clipped` or `truncated` weights, or a smaller lam
to begin with (`LamSchedule`), are what helps.
"""

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lightning_tilt.identities import Treatment
from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.losses.path_controls import PathControls
from lightning_tilt.losses.path_weights import PathWeighted
from lightning_tilt.trajectory import Trajectory

__all__ = ["CrossEntropy", "cross_entropy_terms"]


def cross_entropy_terms(log_ratio: Tensor, importance: Tensor) -> Tensor:
    """`-w_i sum_k l_k`, up to a constant: (N,).

    Args:
        log_ratio: l_k with gradient, (J, N).
        importance: weights of mean 1 over a group, (N,).
    """
    return -importance * log_ratio.sum(0)


class CrossEntropy(PathControls, PathWeighted):
    """KL(P* | P_theta) from weighted paths, of the current model or replayed ones.

    Consistent on and off policy as the samples of a group grow in number (self-normalised weights: a bias of order
    1/n). Needs memoryless transitions, at least two samples a prompt (many, for the weights to say much), no reward
    gradient. Costs 2 forwards and 1 backward a pair beside the rollout, 1 forward more if checkpointed.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        path_weights: "self_normalised"; "clipped" or "truncated" trade noise for a pull towards the present model.
        args: passed on to the host.
        kwargs: passed on to the host.

    Raises:
        ValueError: for weights "none": the model's own cross-entropy has no gradient but noise.
    """

    sources: ClassVar[tuple[str, ...]] = ("nusken2020solving",)
    on_policy: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        path_weights: Treatment = "self_normalised",
        **kwargs: Any,
    ) -> None:
        if path_weights == "none":
            raise ValueError("CrossEntropy learns from the weights alone: path_weights: self_normalised, not none")
        super().__init__(*args, lam=lam, path_weights=path_weights, **kwargs)

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """The path weights, normalised group by group."""
        path = super().prepare(trajectory)
        log_w = torch.where(path.weight > 0, cast(Tensor, path.log_w).double(), -torch.inf)
        return replace(path, importance=self._normalised(path, log_w).to(path.reward))

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples; `weight_max` is the largest weight in units of their mean."""
        chain, weight = self.sampler.chain(self), trajectory.weight
        good = self.mean_good(weight)
        steps, importance = self.model_terms(chain, trajectory), cast(Tensor, trajectory.importance)
        terms = cross_entropy_terms(steps.log_ratio, importance)
        kl = (weight * steps.kl.detach().sum(0)).sum() / good
        return (weight * terms).sum() / good, {"kl": kl, "weight_max": importance.max()}

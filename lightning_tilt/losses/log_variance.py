"""Log-variance and trajectory balance: second moments of one path functional (2005.05409; 2201.13259).

With l_k = u_k . xi_k - |u_k|^2/2 on recorded paths (`path_controls`), drawn by a law v,

    W = sum_k l_k - lam r(X_K) = log dP_theta/dP* - log Z

    log-variance          L = Var_v[W]                                the gradient flows through l alone, not the path
    trajectory balance    L = E_v[(W + log Z_theta)^2]                with a learned log Z_theta

W is constant where P_theta = P*.  **On policy** both have twice the gradient of the relative entropy E_theta[W] in
expectation, and so its fixed point, AM's too: grad W is the score of the path, of mean zero, so neither the mean nor
log Z_theta moves the expectation; they are baselines.  What is gained: the noise vanishes with the variance of W.

**Off policy** (replayed paths) the minimiser depends on v.  It would not if the family held P*, which it does not at
finite K, with the std of every step tied to the base's.  One step from x = 0, base N(0, s^2), r = -(x - 1)^2/2, paths
with the constant control c: the minimiser is lam s (1 - s c), which is the best control only where c is.

Trajectory balance whose log Z is the mean of -W over the group is the log-variance (VarGrad, 2010.10436).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.losses.path_controls import PathControls
from lightning_tilt.trajectory import Trajectory

__all__ = ["LogVariance", "TrajectoryBalance", "log_variance_terms", "trajectory_balance_terms"]


def log_variance_terms(W: Tensor, mean: Tensor, n: Tensor) -> Tensor:
    """`(W_i - mean)^2 n/(n - 1)`: their mean over a group is its unbiased variance, their gradient its gradient.

    Args:
        W: path functionals, (N,), with gradient.
        mean: of each sample's group, (N,), without gradient (it cancels: deviations sum to zero).
        n: sizes of the groups, (N,).
    """
    return (W - mean) ** 2 * (n / (n - 1).clamp(min=1))


def trajectory_balance_terms(W: Tensor, log_z: Tensor) -> Tensor:
    """`(W_i + log Z)^2`, (N,)."""
    return (W + log_z) ** 2


class LogVariance(PathControls):
    """The variance of `log dP_theta/dP*` over the paths of a prompt (a density: of the batch).

    Consistent on policy; off policy the minimiser depends on the law of the paths. Needs memoryless transitions, at
    least two samples a prompt, no reward gradient. Costs 2 forwards and 1 backward a pair beside the rollout, 1 forward
    more if checkpointed.
    """

    sources: ClassVar[tuple[str, ...]] = ("nusken2020solving", "richter2020vargrad")

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples; `kl` is the mean of sum_k |u_k|^2/2."""
        chain, weight = self.sampler.chain(self), trajectory.weight
        good = self.mean_good(weight)
        steps = self.model_terms(chain, trajectory)
        W = steps.log_ratio.sum(0) - trajectory.lam * trajectory.reward
        mean, n = self.group_means(trajectory, W.detach())
        terms = log_variance_terms(W, mean, n)
        return (weight * terms).sum() / good, {"kl": (weight * steps.kl.detach().sum(0)).sum() / good}


class TrajectoryBalance(PathControls):
    """Trajectory balance with a learned log Z, for one target: a density, or a model without prompts.

    Consistent on policy, whatever log Z is (it is a baseline); off policy as `LogVariance`. Every prompt has a Z of its
    own, which no scalar holds: prompts are refused, and `LogVariance` is what to take. Costs as `LogVariance`.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        log_z_scale: log Z is this times the parameter that is learned, so that an optimiser with steps of a given size
            (Adam) moves log Z this much faster than the network.
        args: passed on to the host.
        kwargs: passed on to the host, whose optimiser takes `loss_parameters()` along.

    Raises:
        ValueError: if `log_z_scale` is not positive; at the first rollout, for prompts.
    """

    sources: ClassVar[tuple[str, ...]] = ("malkin2022trajectory",)
    compares: ClassVar[bool] = False

    def __init__(self, *args: Any, lam: float | LamSchedule = 1.0, log_z_scale: float = 10.0, **kwargs: Any) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if log_z_scale <= 0:
            raise ValueError(f"log_z_scale must be positive, not {log_z_scale}")
        self.log_z_scale = log_z_scale
        self.scaled_log_z = nn.Parameter(torch.zeros(()))

    def loss_parameters(self) -> list[nn.Parameter]:
        """Log Z in units of `log_z_scale`."""
        return [self.scaled_log_z]

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """Refuse prompts; then as all losses on paths."""
        if trajectory.prompts is not None:
            raise ValueError(
                f"{type(self).__name__} learns one log Z, and every prompt has its own: use LogVariance, which takes "
                "each prompt's mean for it"
            )
        return super().prepare(trajectory)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples; `log_z_learned` is log Z_theta, `kl` the mean of sum_k |u_k|^2/2."""
        chain, weight = self.sampler.chain(self), trajectory.weight
        good = self.mean_good(weight)
        steps = self.model_terms(chain, trajectory)
        log_z = self.log_z_scale * self.scaled_log_z
        terms = trajectory_balance_terms(steps.log_ratio.sum(0) - trajectory.lam * trajectory.reward, log_z)
        logged = {"kl": (weight * steps.kl.detach().sum(0)).sum() / good, "log_z_learned": log_z.detach()}
        return (weight * terms).sum() / good, logged

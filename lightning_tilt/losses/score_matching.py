"""Score matching of the tilted law: three unbiased targets for one regression, and their mixes.

    pi = p* ~ p_base exp(lam r),      g = grad log pi(X_1) = grad log p_base(X_1) + lam grad r(X_1)

With X_t = alpha X_1 + beta eps and X_1 ~ pi, all of these have E[y | X_t] = x1_hat*(X_t); beside them the target of the
score, s_y = (alpha y - X_t)/beta^2:

    conditional (CSM)    y = X_1                                 s_y = -(X_t - alpha X_1)/beta^2     Vincent 2011
    target (TSM)         y = (X_t + beta^2 g/alpha)/alpha        s_y = g/alpha                       2402.08667
    novel (NSM)          y = slope X_t + Var (g + m X_1)         s_y = (alpha (g + m X_1) - m X_t)/D     2402.06320

    D = alpha^2 + m beta^2      slope = alpha/D      Var = beta^2/D = Var(X_1 | X_t) under N(0, I/m)

The variance of s_y grows as 1/beta^2 towards the data for CSM, and as 1/alpha^2 towards the noise for TSM.
NSM mixes the two with weights m beta^2/D and alpha^2/D and is finite at both ends; m is the precision of a Gaussian
reference, and with a base N(mu, I/m) of that precision NSM is Adjoint Sampling.  Any mix is unbiased,

    y = y_CSM + c (y_TSM - y_CSM) = X_1 + rho (y_NSM - X_1),        c = rho alpha^2/D

and c (0: CSM, 1: TSM) may be chosen, time by time, for the least variance:

    rho* = E[(x1_hat - X_1).(y_NSM - X_1)] / E|y_NSM - X_1|^2,      c* = rho* alpha^2/D, in [0, 1]

**What X_1 is.**  E[y | X_t] is the tilted prediction for X_1 ~ p*.  End points of the current model are not there yet:
path weights make them so.  Without weights TSM, NSM and every mix with c > 0 keep p* as their only fixed point, but the
weights of modes that lie apart move very slowly; CSM's target is then the model's own prediction, and every law is a
fixed point.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_tilt.identities import Treatment
from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.losses.base_score import EndScoreRegression, tilted_score
from lightning_tilt.losses.end_points import EndPointRegression, NoisedEnds
from lightning_tilt.losses.mixing import LeastVariance
from lightning_tilt.process import Process, expand
from lightning_tilt.trajectory import Trajectory

__all__ = [
    "ConditionalScoreMatching",
    "MixedScoreMatching",
    "NovelScoreMatching",
    "TargetScoreMatching",
    "novel_target",
]


def novel_target(process: Process, x: Tensor, x1: Tensor, g: Tensor, t: Tensor, precision: float) -> Tensor:
    """NSM's target `slope X_t + Var (g + m X_1)`; that of TSM for m = 0.

    Args:
        process: the interpolant.
        x: noised states X_t, (P, *shape).
        x1: their end points, (P, *shape).
        g: grad log p* at the end points, (P, *shape).
        t: times, (P,).
        precision: m; 0 is infinite at alpha = 0.

    Returns:
        (P, *shape)
    """
    slope, variance = process.posterior_slope(t, precision), process.posterior_variance(t, precision)
    return expand(slope, x) * x + expand(variance, x) * (g + precision * x1)


class ConditionalScoreMatching(EndPointRegression):
    """Denoising score matching on weighted samples: y = X_1.

    Consistent with path weights, up to O(1/n) of their normalisation; without them every law is a fixed point. Needs no
    gradient of the reward. Its target is noisy next to the data, where path weights are most sensitive. A supervised
    pair costs one forward and one backward, a state of a rollout one forward of the base for its weight.

    Args:
        path_weights: see `PathWeighted`; "none" is refused.
        allow_unweighted: accept `path_weights: none`; what is trained then is the model on its own samples.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("vincent2011connection",)
    needs_reward_gradient = False
    needs_memoryless = False
    on_policy = False

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        path_weights: Treatment = "self_normalised",
        allow_unweighted: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, path_weights=path_weights, **kwargs)
        _refuse_unweighted(self, allow_unweighted)

    def target(self, points: NoisedEnds) -> Tensor:
        """X_1."""
        return points.x1


class TargetScoreMatching(EndScoreRegression):
    """Target score matching: y = (X_t + beta^2 g/alpha)/alpha.

    Consistent, with and without path weights; see the module for what they change. Needs the reward's gradient. Its
    variance is infinite at pure noise: `t_min` bounds it. A supervised pair costs one forward and one backward, an end
    point one forward of the base where its law is not known.

    Args:
        t_min: the noisiest time that is drawn.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("debortoli2024target",)

    def __init__(self, *args: Any, lam: float | LamSchedule = 1.0, t_min: float = 0.02, **kwargs: Any) -> None:
        super().__init__(*args, lam=lam, t_min=t_min, **kwargs)

    def setup(self, stage: str) -> None:
        """Refuse times at which the target is infinite."""
        super().setup(stage)
        _refuse_pure_noise(self)

    def target(self, points: NoisedEnds) -> Tensor:
        """The prediction that belongs to the score g/alpha."""
        return novel_target(self.process, points.x, points.x1, tilted_score(points), points.t, 0.0)


class NovelScoreMatching(EndScoreRegression):
    """Novel score matching: y = slope X_t + Var (g + m X_1), of finite variance at all times.

    Consistent, with and without path weights; see the module for what they change. Needs the reward's gradient. A
    supervised pair costs one forward and one backward, an end point one forward of the base where its law is not known.

    Args:
        precision: m of the Gaussian reference, one over a variance of the data.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("phillips2024particle",)

    def __init__(self, *args: Any, lam: float | LamSchedule = 1.0, precision: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if precision <= 0:
            raise ValueError(f"precision must be positive, not {precision}; TargetScoreMatching is its limit 0")
        self.precision = precision

    def target(self, points: NoisedEnds) -> Tensor:
        """The prediction that the reference and the tilted law's gradient make."""
        return novel_target(self.process, points.x, points.x1, tilted_score(points), points.t, self.precision)


class MixedScoreMatching(NovelScoreMatching):
    """A convex mix of the conditional and the target score: y = X_1 + c(t) (y_TSM - X_1).

    Consistent, with and without path weights, for c > 0. Needs the reward's gradient. Costs what NSM costs.

    Args:
        mixing: c(t). "novel" is NSM's; "variance_optimal" has the least variance around the model's own prediction, of
            all samples seen so far, in bins of time (that takes the model for the tilted law: with path weights it is
            about right from the start, without them it sees the way still to go as variance); or a number in [0, 1].
        allow_unweighted: accept the number 0, which is CSM, without path weights.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("vincent2011connection", "debortoli2024target")

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        mixing: Literal["novel", "variance_optimal"] | float = "variance_optimal",
        allow_unweighted: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if mixing not in ("novel", "variance_optimal") and not (isinstance(mixing, int | float) and 0 <= mixing <= 1):
            raise ValueError(f"mixing is 'novel', 'variance_optimal' or a number in [0, 1], not {mixing!r}")
        if mixing == 0:
            _refuse_unweighted(self, allow_unweighted)
        self.mixing = mixing
        self.least_variance = LeastVariance(self.times)

    def setup(self, stage: str) -> None:
        """Refuse a constant mix at times at which it is infinite."""
        super().setup(stage)
        if isinstance(self.mixing, float | int) and self.mixing > 0:
            _refuse_pure_noise(self)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples and noisings of the weighted terms; what is learnt of c serves the next batch."""
        self.least_variance.forget_batch()
        loss, logged = super().loss(trajectory)
        if self.mixing == "variance_optimal":
            sums = self.least_variance.batch.to(loss.device)
            self.least_variance.learn(self.trainer.strategy.reduce(sums, reduce_op="sum"))
            logged["mixing"] = self.least_variance.rho().mean()
        return loss, logged

    def target(self, points: NoisedEnds) -> Tensor:
        """X_1 + rho (y_NSM - X_1)."""
        novel = super().target(points)
        if self.mixing == "novel":
            return novel
        most = self._most(points.t)
        rho = self.least_variance(points.t, most) if self.mixing == "variance_optimal" else float(self.mixing) * most
        return points.x1 + expand(rho, novel) * (novel - points.x1)

    def completed(self, points: NoisedEnds, y: Tensor, x1_hat: Tensor) -> Tensor:
        """The target itself; the model's prediction beside it says how it should have been mixed."""
        if self.mixing == "variance_optimal":
            novel = super().target(points)
            self.least_variance.see(points.t, x1_hat - points.x1, novel - points.x1, points.weight)
        return y

    def _most(self, t: Tensor) -> Tensor:
        """The rho of TSM, D/alpha^2, (P,)."""
        alpha, beta = self.process.alpha(t), self.process.beta(t)
        return 1 + self.precision * (beta / alpha) ** 2


def _refuse_unweighted(loss: EndPointRegression, allowed: bool) -> None:
    if loss.path_weights == "none" and not allowed:
        raise ValueError(
            f"{type(loss).__name__}: without path weights the target y = X_1 is the model's own prediction, and any "
            "law is a fixed point: set path_weights: self_normalised, or say allow_unweighted: true"
        )


def _refuse_pure_noise(loss: EndPointRegression) -> None:
    if float(loss.process.alpha(torch.tensor(loss.times.t_min, dtype=torch.float64))) == 0:
        raise ValueError(f"{type(loss).__name__}: the target is infinite at pure noise (alpha = 0): take t_min above 0")

"""Adjoint Sampling (2504.11713): Adjoint Matching from a Gaussian base, whose adjoint needs no simulation.

The lean adjoint of a base N(mu, I/m) is `a_t = slope a_1`, a_1 = -lam grad r(X_1), slope = alpha/(alpha^2 + m beta^2)
(section 3 there; constant for the driftless base).  Given the end points alone, X_t can be drawn
again and again, and the regression of the score on `s_base(X_t) - a_t` is in x1_hat

    y = x1_hat_base(X_t) + Var(X_1 | X_t) lam grad r(X_1),       Var = beta^2/(alpha^2 + m beta^2)

which is finite at both ends, for every interpolant.  One simulation and one gradient of the energy serve many updates:
that is what the sampler's buffer is for (`rollout_every`, `buffer_size`, `replay_samples`).

Of a density exp(-E), lam r = -E - log p_base.  Energies of particles have gradients without bound where two of them
meet; `energy_clip` shortens grad E before the base's score joins it,

    lam grad r  ->  -clip(grad E(X_1)) - grad log p_base(X_1),       -grad E = lam grad r + grad log p_base
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_tilt.interfaces import LamSchedule, Predictor
from lightning_tilt.losses.end_points import EndPointRegression, NoisedEnds
from lightning_tilt.models import GaussianBase
from lightning_tilt.process import Process, expand
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import Brownian, ExactGaussian

__all__ = ["AdjointSampling", "adjoint_sampling_target", "clipped"]


def adjoint_sampling_target(
    process: Process, x1_hat_base: Tensor, lam_gradient: Tensor, t: Tensor, precision: float
) -> Tensor:
    """`x1_hat_base(X_t) + Var(X_1 | X_t) lam grad r(X_1)`.

    Args:
        process: the interpolant.
        x1_hat_base: the base's prediction at X_t, (P, *shape).
        lam_gradient: lam grad r at X_1, (P, *shape).
        t: times, (P,).
        precision: m of the base.

    Returns:
        (P, *shape)
    """
    return x1_hat_base + expand(process.posterior_variance(t, precision), lam_gradient) * lam_gradient


def clipped(gradient: Tensor, longest: float) -> Tensor:
    """Vectors (..., d) of at most the length `longest`: one a sample (P, d), or one a particle (P, n, d)."""
    length: Tensor = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return gradient * (longest / length.clamp(min=longest))


class AdjointSampling(EndPointRegression):
    """Adjoint Sampling as a mixin, for a predictor whose base is a `GaussianBase`.

    Consistent, with and without path weights. Needs the reward's gradient at the end points, once a rollout. Modes that
    lie apart get their weights slowly without path weights (`path_weights: self_normalised`, at one evaluation of the
    closed-form base a state). A supervised pair costs one forward and one backward.

    Args:
        energy_clip: longest gradient of the energy, of a sample (d,) or of each particle (n, d); longer ones are
            shortened, which biases the target where it happens (published: 100). None: none.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("havens2025adjoint",)
    needs_reward_gradient = True
    needs_memoryless = False
    on_policy = False

    def __init__(
        self, *args: Any, lam: float | LamSchedule = 1.0, energy_clip: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if energy_clip is not None and energy_clip <= 0:
            raise ValueError(f"energy_clip is a length and positive, not {energy_clip}; null clips nothing")
        self.energy_clip = energy_clip

    def setup(self, stage: str) -> None:
        """Refuse a base that is no `GaussianBase`."""
        super().setup(stage)
        with self.predictor.base() as base:
            gaussian = self._gaussian(base)
        if stage != "fit":
            return
        transition = self.sampler.chain(self, count=False).transition
        if self.path_weights != "none" and not isinstance(transition, ExactGaussian | Brownian):
            rank_zero_info(
                f"Path weights of {transition!r} carry its discretisation: of a Gaussian base there is an exact step, "
                f"sampler.transition: ExactGaussian with precision: {gaussian.precision:.6g} (Brownian for Driftless)."
            )

    def target(self, points: NoisedEnds) -> Tensor:
        """The base's prediction, moved by the reward's gradient."""
        with self.predictor.base() as base:
            gaussian = self._gaussian(base)
            # A closed form, so it is not counted as a network's evaluation.
            x1_hat_base = gaussian.predict(points.x, points.t.to(points.x.device), points.condition)
        assert points.reward_gradient is not None
        gradient = points.lam * points.reward_gradient
        if self.energy_clip is not None:
            end_score = _end_score(gaussian, points.x1)
            gradient = self.predictor.project(clipped(gradient + end_score, self.energy_clip)) - end_score
        return adjoint_sampling_target(self.process, x1_hat_base, gradient, points.t, gaussian.precision)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples and noisings of the weighted terms; how many gradients were clipped is logged."""
        loss, logged = super().loss(trajectory)
        if self.energy_clip is not None:
            assert trajectory.reward_gradient is not None
            with self.predictor.base() as base:
                end_score = _end_score(self._gaussian(base), trajectory.end)
            length = torch.linalg.vector_norm(trajectory.lam * trajectory.reward_gradient + end_score, dim=-1)
            longer = (length > self.energy_clip)[trajectory.weight > 0]
            logged["clipped_fraction"] = longer.double().sum() / max(longer.numel(), 1)
        return loss, logged

    def _gaussian(self, base: Predictor) -> GaussianBase:
        if not isinstance(base, GaussianBase):
            raise TypeError(
                f"{type(self).__name__} needs a GaussianBase, whose adjoint is known in closed form, and the "
                f"predictor's base is {type(base).__name__}: use NovelScoreMatching or AdjointMatching for it, or a "
                "NeuralTilt of a GaussianBase"
            )
        return base


def _end_score(gaussian: GaussianBase, x1: Tensor) -> Tensor:
    """`grad log p_base(X_1) = -m (X_1 - mu)`, without the mean over particles where the base has none."""
    return -gaussian.precision * gaussian.project(x1 - gaussian.mean)

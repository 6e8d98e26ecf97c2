"""Efficient Adjoint Matching (2605.11480): the base moves into the terminal cost, and the sweep is gone.

Seen from a reference process whose end law is Gaussian, N(0, I/m), p* is the tilt by

    lam r + log p_base - log N(0, I/m)

The lean adjoint of that reference is known in closed form, so end points drawn by any sampler - a few steps of an ODE -
and noised again are all that is needed.  Its target in x1_hat is that of novel score matching,

    y = slope X_t + Var (grad log p_base(X_1) + lam grad r(X_1) + m X_1)

with grad log p_base(X_1) from the base's own prediction near the data.  One implementation serves both names; here are
the defaults of a fine-tuning run.
"""

from typing import Any, ClassVar

from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.losses.score_matching import NovelScoreMatching

__all__ = ["EfficientAdjointMatching"]


class EfficientAdjointMatching(NovelScoreMatching):
    """Efficient Adjoint Matching as a mixin: novel score matching with many noisings of an end point.

    Consistent as novel score matching is; without path weights, which an ODE's paths do not have, the weights of modes
    that lie apart move slowly, and the fixed point is that of the rollout's own sampler: a coarse ODE's error is in it.
    An ODE's end points must be the model's own: `sampler.base_last_step: false`. A supervised pair costs one forward
    and one backward, an end point one forward of the base and the few of the rollout.

    Args:
        noisings: times and noises that each end point is given in an update.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("shin2026efficient",)

    def __init__(self, *args: Any, lam: float | LamSchedule = 1.0, noisings: int = 8, **kwargs: Any) -> None:
        super().__init__(*args, lam=lam, noisings=noisings, **kwargs)

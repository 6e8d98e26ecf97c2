"""A Gaussian as the base: what an unnormalised density is tilted from.

    X_1 ~ N(mu, I/m),     x1_hat = E[X_1 | X_t = x] = mu + alpha/(alpha^2 + m beta^2) (x - alpha mu)

Exact for every process; with `ExactGaussian` (or `Brownian`, for `Driftless`) the chain ends in this law at any number
of steps, so that path weights give log Z of the density without a bias of discretisation.

n particles in d dimensions, whose centre is of no interest, live on the mean-free subspace of dimension (n - 1) d: the
law is the Gaussian on that subspace,

    log p(x) = -m |x|^2/2 + (n - 1) d/2 log(m/(2 pi))

With the process `Driftless` the base is its Brownian motion: mu = 0, 1/m = nu_1, x1_hat = x (2504.11713).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_tilt.interfaces import Condition, KnownLaw, Predictor
from lightning_tilt.process import Driftless, Process, RectifiedFlow, expand

__all__ = ["GaussianBase"]


class GaussianBase(Predictor, KnownLaw):
    """The exact posterior mean of N(mean, scale^2 I), differentiable in `x`; it has no parameters.

    Args:
        shape: of one state: (d,), or (n, d) for n particles.
        scale: standard deviation of each coordinate; None is 1, and with `Driftless` what that process ends in.
        mean: of each coordinate.
        mean_free: the states are particles (n, d) without their mean.
        process: the interpolant; None is `RectifiedFlow()`.

    Raises:
        ValueError: for a scale that is not positive, a mean that the process or `mean_free` excludes, a shape that has
            no particles, or a process whose start (noise of variance 1) is not this base's.

    Example:
        >>> base = GaussianBase([2], scale=3.0)
        >>> x, t = torch.tensor([[3.0, 0.0]]), torch.tensor([0.5])
        >>> base.predict(x, t, base.encode(None, 1))  # x = X_1/2 + eps/2, so 9/10 of it is data
        tensor([[5.4000, 0.0000]])
    """

    def __init__(
        self,
        shape: Sequence[int],
        scale: float | None = None,
        mean: float = 0.0,
        mean_free: bool = False,
        process: Process | None = None,
    ) -> None:
        super().__init__()
        self.process = RectifiedFlow() if process is None else process
        self.prediction_type = "sample"
        self.state_shape = tuple(shape)
        self.scale = _scale(scale, mean, self.process)
        self.mean = mean
        self.mean_free = mean_free
        if not self.state_shape or min(self.state_shape) < 1:
            raise ValueError(f"shape is that of one state, [d] or [n, d], not {list(shape)}")
        if mean_free and (len(self.state_shape) != 2 or self.state_shape[0] < 2 or mean != 0):
            raise ValueError(
                f"mean_free is for states of at least two particles, shape [n, d], around mean 0; not for shape "
                f"{list(shape)} and mean {mean}"
            )

    @property
    def precision(self) -> float:
        """`m = 1/scale^2`: what `ExactGaussian` is told."""
        return 1 / self.scale**2

    @property
    def dimension(self) -> int:
        """Of the space that the states live on."""
        size = math.prod(self.state_shape)
        return size - self.state_shape[1] if self.mean_free else size

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The exact `x1_hat` at `x` (B, *shape) and times (B,)."""
        t = t.double()
        slope = self.process.posterior_slope(t, self.precision)
        return expand(slope, x) * x + expand(self.mean * (1 - slope * self.process.alpha(t)), x)

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p(x)` of states (B, *shape), normalised (on the mean-free subspace): (B,), in float32 at least.

        The mean of particles is taken off first, so that the density does not depend on where they are.
        """
        x = self.project(x if x.dtype == torch.float64 else x.float())
        z = (x - self.mean) / self.scale
        return -z.square().flatten(1).sum(1) / 2 - self.dimension * math.log(self.scale * math.sqrt(2 * math.pi))

    def project(self, noise: Tensor) -> Tensor:
        """The noise (..., *shape) itself, or without the mean over its particles."""
        return noise - noise.mean(-2, keepdim=True) if self.mean_free else noise

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        """Itself: there is nothing to tune."""
        yield self


def _scale(scale: float | None, mean: float, process: Process) -> float:
    """The standard deviation of the base, if the process can start in it."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, not {scale}")
    if isinstance(process, Driftless):
        own = math.sqrt(process.end_variance)
        if mean != 0 or (scale is not None and not math.isclose(scale, own, rel_tol=1e-6)):
            raise ValueError(
                f"the base of {process!r} is N(0, {own:.6g}^2), not N({mean}, {scale}^2): leave scale and mean out, "
                "or choose sigma_max"
            )
        return own
    scale = 1.0 if scale is None else scale
    if not process.is_memoryless_start and (mean != 0 or scale != 1):
        raise ValueError(
            f"{process!r} starts in N(0, 1) with a little data in it, which is not where N({mean}, {scale}^2) starts: "
            "take mean 0 and scale 1, or a process that starts at pure noise (zero_terminal_snr, Cosine, RectifiedFlow)"
        )
    return scale

"""A model whose prediction is exact: the Gaussian mixture as a `Predictor`.

    predict(x, t) = x1_hat = E[X_1 | X_t = x]

It is both the tests' oracle and the base of the toy configs, where the tilted law is known in closed form.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_tilt.interfaces import Condition, KnownLaw, Predictor
from lightning_tilt.models.gaussian_mixture import GaussianMixture
from lightning_tilt.process import Process, RectifiedFlow
from lightning_tilt.rewards.quadratic import QuadraticReward

__all__ = ["GaussianMixture", "GaussianMixturePredictor", "the_mixture"]


class GaussianMixturePredictor(Predictor, KnownLaw):
    """The exact posterior mean of a Gaussian mixture, differentiable in `x`; it has no parameters.

    Args:
        weights: M positive numbers; they are normalised.
        means: M points of dimension d.
        covariances: M matrices (d, d).
        process: the interpolant; None is `RectifiedFlow()`.

    Example:
        >>> predictor = GaussianMixturePredictor([1.0], [[2.0]], [[[1.0]]])
        >>> x, t = torch.tensor([[0.0]]), torch.tensor([0.0])
        >>> predictor.predict(x, t, predictor.encode(None, 1))  # at pure noise: the mean of the data
        tensor([[2.]])
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        covariances: Sequence[Sequence[Sequence[float]]] | Tensor,
        process: Process | None = None,
    ) -> None:
        super().__init__()
        # Float64 on the CPU: neither `.to` nor `.half` of a host can spoil the constants; see `_at`.
        self.mixture = GaussianMixture(
            *(torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covariances))
        )
        self.process = RectifiedFlow() if process is None else process
        self.prediction_type = "sample"
        self.state_shape = (self.mixture.means.shape[-1],)
        self._copies: dict[tuple[torch.device, torch.dtype], GaussianMixture] = {}

    @classmethod
    def of(cls, mixture: GaussianMixture, process: Process | None = None) -> "GaussianMixturePredictor":
        """The predictor of a mixture that is at hand."""
        return cls(mixture.weights, mixture.means, mixture.covariances, process)

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The exact `x1_hat` at `x` (B, d) and times (B,); computed in float32 at least."""
        work = x if x.dtype == torch.float64 else x.float()
        return self._at(work).x1_posterior(self.process, work, t).mean.to(x.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of the mixture at `x` (B, d): (B,), in float32 at least."""
        work = x if x.dtype == torch.float64 else x.float()
        return self._at(work).log_prob(work)

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        """Itself: there is nothing to tune."""
        yield self

    def _at(self, x: Tensor) -> GaussianMixture:
        key = (x.device, x.dtype)
        if key not in self._copies:
            # Validation may be the first to ask; tensors made in its inference mode could never see a backward.
            with torch.inference_mode(False):
                self._copies[key] = self.mixture.to(x)
        return self._copies[key]


def the_mixture() -> tuple[GaussianMixture, QuadraticReward]:
    """The two-dimensional problem of this project's figures: three components and a quadratic reward, in float64.

    At lam = 1: log Z = -1.3756, the mean moves from (.35, .35) to (-.01, .70).

    Example:
        >>> mixture, reward = the_mixture()
        >>> tilted, log_z = mixture.tilt(reward, 1.0)
        >>> round(float(log_z), 4)
        -1.3756
    """
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    means = torch.tensor([[-2.0, 0.0], [1.5, 1.5], [1.0, -2.0]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.3, 0.1], [0.1, 0.4]], [[0.5, -0.2], [-0.2, 0.3]], [[0.2, 0.0], [0.0, 0.2]]], dtype=torch.float64
    )
    return GaussianMixture(weights, means, covariances), QuadraticReward([[0.6, 0.2], [0.2, 0.5]], [-0.5, 1.0])

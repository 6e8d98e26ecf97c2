"""The driftless base of Adjoint Sampling: Brownian motion, started at a point, whose noise dies out towards the data.

    dX = sigma_t dB,   X_0 = 0        sigma_t^2 = 2 log(1/q) smax^2 q^(2t),   q = smin/smax
    nu_t = int_0^t sigma^2 = smax^2 (1 - q^(2t))                              X_1 ~ N(0, nu_1 I)

The noise has a geometric schedule between `smin` and `smax` (2504.11713, section 4 and appendix).  Seen from its end it
is an interpolant, the Brownian bridge, with no noise at either end:

    X_t | X_1 ~ N(alpha_t X_1, beta_t^2 I)        alpha = nu_t/nu_1        beta^2 = nu_t (1 - nu_t/nu_1)

    eta = beta (kappa beta - beta') = nu'/2        so its memoryless noise is its own, sigma^2 = nu'

At t = 0 both alpha and beta are 0: `X_0` says nothing about `eps`, so of the four predictions only x1_hat ("sample")
has a meaning there, and of the transitions only `Brownian`.
"""

import math

import torch
from torch import Tensor

from lightning_tilt.process.base import Prediction, PredictionType, Process, expand

__all__ = ["Driftless"]


class Driftless(Process):
    """`X_t = nu_t/nu_1 X_1 + sqrt(nu_t (1 - nu_t/nu_1)) eps`, from the point `X_0 = 0`.

    Args:
        sigma_min: `smin`, in units of the states; the smaller, the finer the steps next to the data.
        sigma_max: `smax`; the base's end law is `N(0, (smax^2 - smin^2) I)`.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"Driftless needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self._log_q2 = 2 * math.log(sigma_min / sigma_max)

    def __repr__(self) -> str:
        return f"Driftless(sigma_min={self.sigma_min}, sigma_max={self.sigma_max})"

    @property
    def end_variance(self) -> float:
        """`nu_1`, the variance of the base's end law."""
        return -(self.sigma_max**2) * math.expm1(self._log_q2)

    def nu(self, t: Tensor) -> Tensor:
        """The variance that the noise has brought until `t`; any shape."""
        return -(self.sigma_max**2) * torch.expm1(self._log_q2 * t)

    def alpha(self, t: Tensor) -> Tensor:
        """`nu_t/nu_1`."""
        return 1 - self._rest(t)

    def beta(self, t: Tensor) -> Tensor:
        """`sqrt(nu_t (1 - nu_t/nu_1))`, 0 at both ends."""
        return (self.nu(t) * self._rest(t)).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        """`nu'/nu_1`."""
        return 2 * self.eta(t) / self.end_variance

    def d_beta(self, t: Tensor) -> Tensor:
        """`nu' (1 - 2 alpha)/(2 beta)`, infinite at both ends."""
        return self.eta(t) * (1 - 2 * self.alpha(t)) / self.beta(t)

    def eta(self, t: Tensor) -> Tensor:
        """`nu'/2`: what `beta (kappa beta - beta')` is, and finite at both ends."""
        return -self._log_q2 / 2 * self.sigma_max**2 * torch.exp(self._log_q2 * t)

    def grid(self, steps: int) -> Tensor:
        """Uniform times, (steps + 1,) float64, from 0 to 1."""
        if steps < 1:
            raise ValueError(f"a chain needs at least 1 step, not {steps}")
        return torch.arange(steps + 1, dtype=torch.float64) / steps

    def timestep(self, t: Tensor) -> Tensor:
        """`1000 (1 - t)`, the convention of flow models."""
        return 1000 * (1 - t)

    def initial(self, noise: Tensor) -> Tensor:
        """`X_0 = 0`."""
        return torch.zeros_like(noise)

    def posterior_slope(self, t: Tensor, precision: float) -> Tensor:
        """`1/(alpha + m nu_1 (1 - alpha))`, finite at t = 0; 1 for the process's own base, m = 1/nu_1."""
        rest = self._rest(t)
        return 1 / (1 - rest + precision * self.end_variance * rest)

    def posterior_variance(self, t: Tensor, precision: float) -> Tensor:
        """`nu_1 (1 - alpha) slope`, finite at t = 0; `nu_1 - nu_t` for the process's own base, m = 1/nu_1."""
        return self.end_variance * self._rest(t) * self.posterior_slope(t, precision)

    def interpret(self, output: Tensor, prediction_type: PredictionType, x: Tensor, t: Tensor) -> Prediction:
        """As `Process.interpret`, for x1_hat alone; `eps_hat` is set to 0 at t = 0, where nothing is known of it.

        Raises:
            ValueError: for another prediction type than "sample".
        """
        self._refuse_all_but_sample(prediction_type)
        t = t.double()
        beta = self.beta(t)
        inverse = torch.where(beta > 0, 1 / torch.where(beta > 0, beta, 1.0), 0.0)
        return Prediction(output, expand(inverse, x) * (x - expand(self.alpha(t), x) * output))

    def express(self, prediction: Prediction, prediction_type: PredictionType, x: Tensor, t: Tensor) -> Tensor:
        """As `Process.express`, for x1_hat alone.

        Raises:
            ValueError: for another prediction type than "sample".
        """
        self._refuse_all_but_sample(prediction_type)
        return prediction.x1_hat

    def _rest(self, t: Tensor) -> Tensor:
        """`1 - alpha = q^2 (q^(2(t - 1)) - 1)/(1 - q^2)`: exactly 0 at t = 1, exactly 1 at t = 0."""
        rest = -math.exp(self._log_q2) / math.expm1(self._log_q2) * torch.expm1(-self._log_q2 * (1 - t))
        return torch.where(t > 0, rest.clamp(min=0), 1.0)

    def _refuse_all_but_sample(self, prediction_type: str) -> None:
        if prediction_type != "sample":
            raise ValueError(
                f"Driftless starts at a point, where a prediction of type {prediction_type!r} says nothing about the "
                "data: use a model that predicts x1_hat (prediction_type 'sample')"
            )

"""What every interpolant shares: schedules derived from `alpha, beta`, and the conversions of predictions.

    X_t = alpha_t X_1 + beta_t eps,   eps ~ N(0, I),   t from 0 (noise) to 1 (data)

    kappa = alpha'/alpha      eta = beta (kappa beta - beta')      sigma = sqrt(2 eta)     (the memoryless noise)

A network says one of four things about `(x, t)`; each is a linear map of the two currencies `x1_hat` and `eps_hat`:

    x            = alpha  x1_hat + beta  eps_hat        (always)
    sample       = x1_hat
    epsilon      = eps_hat
    v_prediction = alpha  eps_hat - beta x1_hat         (diffusers' sign)
    velocity     = alpha' x1_hat + beta' eps_hat        = dX/dt; diffusers' flow models return its negative
    score        = -eps_hat / beta

`interpret` solves the pair of equations (the first and the one of the type), `express` evaluates the second.  All
coefficients are computed in float64 and cast to the dtype of `x` as the last thing, so that a half-precision state
never spoils `alpha beta' - alpha' beta`.  Source: 2409.08861, section 2 and appendix; 2210.02747 for the velocity.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["PREDICTION_TYPES", "Prediction", "PredictionType", "Process", "expand"]

PredictionType = Literal["epsilon", "v_prediction", "sample", "velocity"]
"""What a network returns; the names are diffusers', and "velocity" is `dX/dt` towards the data."""

PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
"""The same, to be iterated over."""


@dataclass(frozen=True)
class Prediction:
    """The two currencies that everything else is made of.

    Attributes:
        x1_hat: `E[X_1 | X_t = x]` as the model sees it, (B, ...).
        eps_hat: `E[eps | X_t = x]`, (B, ...); `x = alpha x1_hat + beta eps_hat`.
    """

    x1_hat: Tensor
    eps_hat: Tensor


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Make `coefficient` multiply `x`: shape (B, 1, ...), dtype and device of `x`.

    Args:
        coefficient: one number a sample, (B,), or one for all, ().
        x: states, (B, ...).

    Returns:
        (B, 1, ...) or (1, 1, ...), with as many dimensions as `x`.
    """
    return coefficient.to(x).reshape(-1, *(1,) * (x.ndim - 1))


class Process(ABC):
    """An interpolant; a subclass gives `alpha`, `beta`, their derivatives, the grid and the network's timestep.

    Times are tensors of any shape in [0, 1]; keep them in float64 (they are tiny), the states may have any dtype.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """How much of the data is in `X_t`; rises to 1 at t = 1."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """How much noise is in `X_t`; falls to 0 at t = 1."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative `alpha'` in t."""

    @abstractmethod
    def d_beta(self, t: Tensor) -> Tensor:
        """Derivative `beta'` in t."""

    @abstractmethod
    def grid(self, steps: int) -> Tensor:
        """Times of a chain of `steps` steps.

        Args:
            steps: K >= 1.

        Returns:
            (K + 1,) float64, increasing: the noisiest time first, exactly 1.0 last.

        Raises:
            ValueError: if `steps` is below 1, or above the number of nodes of a discrete schedule.
        """

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """What a network trained with this process calls the time `t` (same shape)."""

    def node(self, t: Tensor) -> Tensor:
        """The nearest time in [0, 1) that a network of this process can be asked at: `t` itself, unless discrete."""
        return t

    def kappa(self, t: Tensor) -> Tensor:
        """`alpha'/alpha`, infinite where alpha = 0."""
        return self.d_alpha(t) / self.alpha(t)

    def eta(self, t: Tensor) -> Tensor:
        """`beta (kappa beta - beta')`, with `velocity = kappa x + eta score`; infinite where alpha = 0."""
        return self.beta(t) * (self.kappa(t) * self.beta(t) - self.d_beta(t))

    def sigma(self, t: Tensor) -> Tensor:
        """The memoryless noise `sqrt(2 eta)` (2409.08861)."""
        return (2 * self.eta(t)).sqrt()

    @property
    def is_memoryless_start(self) -> bool:
        """Whether `alpha_0 = 0`: only then does the memoryless noise leave `X_0` and `X_1` independent."""
        return bool(self.alpha(torch.zeros((), dtype=torch.float64)) == 0)

    def interpret(self, output: Tensor, prediction_type: PredictionType, x: Tensor, t: Tensor) -> Prediction:
        """Turn a network's output into `x1_hat` and `eps_hat`.

        Args:
            output: what the network returned, (B, ...).
            prediction_type: what that is.
            x: the states it was asked at, (B, ...).
            t: their times in [0, 1), (B,) or ().

        Returns:
            The prediction, in the dtype of `x`; finite at alpha = 0 for all types but "epsilon".

        Raises:
            ValueError: for an "epsilon" prediction where alpha = 0 (it says nothing about the data there), and for an
                unknown prediction type.
        """
        t = t.double()
        alpha, beta = self.alpha(t), self.beta(t)
        if prediction_type == "sample":
            return Prediction(output, (x - expand(alpha, x) * output) / expand(beta, x))
        if prediction_type == "epsilon":
            self._refuse_pure_noise(alpha)
            return Prediction((x - expand(beta, x) * output) / expand(alpha, x), output)
        if prediction_type == "v_prediction":
            square = alpha**2 + beta**2
            x1_hat = expand(alpha / square, x) * x - expand(beta / square, x) * output
            eps_hat = expand(beta / square, x) * x + expand(alpha / square, x) * output
            return Prediction(x1_hat, eps_hat)
        if prediction_type == "velocity":
            d_alpha, d_beta = self.d_alpha(t), self.d_beta(t)
            det = alpha * d_beta - d_alpha * beta
            x1_hat = expand(d_beta / det, x) * x - expand(beta / det, x) * output
            eps_hat = expand(alpha / det, x) * output - expand(d_alpha / det, x) * x
            return Prediction(x1_hat, eps_hat)
        raise _unknown(prediction_type)

    def express(self, prediction: Prediction, prediction_type: PredictionType, x: Tensor, t: Tensor) -> Tensor:
        """The inverse of `interpret`: what a network of type `prediction_type` would have returned.

        Args:
            prediction: `x1_hat` and `eps_hat` at `x`, (B, ...).
            prediction_type: the wanted type.
            x: states, (B, ...).
            t: their times, (B,) or ().

        Returns:
            (B, ...), in the dtype of `x`.

        Raises:
            ValueError: for an unknown prediction type.
        """
        if prediction_type == "sample":
            return prediction.x1_hat
        if prediction_type == "epsilon":
            return prediction.eps_hat
        if prediction_type == "v_prediction":
            t = t.double()
            return expand(self.alpha(t), x) * prediction.eps_hat - expand(self.beta(t), x) * prediction.x1_hat
        if prediction_type == "velocity":
            return self.velocity(prediction, t)
        raise _unknown(prediction_type)

    def velocity(self, prediction: Prediction, t: Tensor) -> Tensor:
        """`v = alpha' x1_hat + beta' eps_hat`, (B, ...)."""
        t, x1_hat = t.double(), prediction.x1_hat
        return expand(self.d_alpha(t), x1_hat) * x1_hat + expand(self.d_beta(t), x1_hat) * prediction.eps_hat

    def score(self, prediction: Prediction, t: Tensor) -> Tensor:
        """`s = -eps_hat / beta`, the gradient of `log p_t`, (B, ...)."""
        return -prediction.eps_hat / expand(self.beta(t.double()), prediction.eps_hat)

    def add_noise(self, x1: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`X_t = alpha x1 + beta eps`.

        Args:
            x1: data, (B, ...).
            eps: standard normal noise, (B, ...).
            t: times, (B,) or ().
        """
        t = t.double()
        return expand(self.alpha(t), x1) * x1 + expand(self.beta(t), x1) * eps

    def initial(self, noise: Tensor) -> Tensor:
        """`X_0` from standard normal noise, (B, ...): the noise itself, for alpha_0 = 0 (or nearly) and beta_0 = 1."""
        return noise

    def posterior_slope(self, t: Tensor, precision: float) -> Tensor:
        """The slope `alpha/(alpha^2 + m beta^2)` of `x1_hat = mu + slope (x - alpha mu)` for a base N(mu, I/m).

        It is also the lean adjoint of that base in closed form, `a_t = slope a_1` (2504.11713).

        Args:
            t: times, any shape.
            precision: m.
        """
        alpha, beta = self.alpha(t), self.beta(t)
        return alpha / (alpha**2 + precision * beta**2)

    def posterior_variance(self, t: Tensor, precision: float) -> Tensor:
        """`Var(X_1 | X_t) = beta^2/(m beta^2 + alpha^2)` of a base N(mu, I/m), per coordinate.

        A tilt moves `x1_hat` by that times `E*[lam grad r(X_1) | X_t]` (Stein's identity).

        Args:
            t: times, any shape.
            precision: m.
        """
        alpha, beta = self.alpha(t), self.beta(t)
        return beta**2 / (precision * beta**2 + alpha**2)

    def score_gain(self, t: Tensor) -> Tensor:
        """`alpha/beta^2`: how the score moves with x1_hat at fixed x; infinite at t = 1."""
        return self.posterior_slope(t, 1.0) / self.posterior_variance(t, 1.0)

    def _refuse_pure_noise(self, alpha: Tensor) -> None:
        # The check reads the tensor back from the device: only schedules that reach alpha = 0 pay for it.
        if self.is_memoryless_start and bool((alpha == 0).any()):
            raise ValueError(
                f"an epsilon prediction says nothing about the data at pure noise (alpha = 0 at t = 0 for "
                f"{type(self).__name__}); use a model that predicts velocity, v_prediction or sample, or start later"
            )


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"unknown prediction type {prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}")

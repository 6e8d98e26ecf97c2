"""Gaussian transitions `x_t -> x_s` from noisier `t` to cleaner `s`, built from a prediction.

    x_s = mean(x_t) + std z,   z ~ N(0, I)

The DDIM family (2010.02502, equation 12), written for any interpolant:

    a = alpha_t/alpha_s      b2 = beta_t^2 - a^2 beta_s^2      std = ddim_eta sqrt(b2) beta_s/beta_t
    mean = alpha_s x1_hat + sqrt(beta_s^2 - std^2) eps_hat

`ddim_eta = 1` is the exact memoryless kernel: its mean is `E[x_s | x_t]`, its std that of `q(x_s | x_t, x_1)`.  Nothing
in it is infinite at pure noise (alpha_t = 0), and its step to s = 1 has std = 0.

That std leaves out what is not known of X_1.  For a base N(mu, I/m) this is known too, and with it the step is exact
at any length (`ExactGaussian`; `Brownian` where the base is Brownian motion):

    var = std^2 + c1^2 Var(X_1 | X_t)    c1 = alpha_s b2/beta_t^2    Var(X_1 | X_t) = beta_t^2/(m beta_t^2 + alpha_t^2)

Euler-Maruyama of `dX = (v + sigma^2/2 score) dt + sigma dB`:

    mean = x + h (v + sigma^2/2 score)      std = sigma sqrt(h)      h = s - t

Two transitions from the same state differ by the **control** `u = (mean - mean_base)/std`; with the step's noise `z`

    log dP/dP_base = sum_k ( u_k . z_k + |u_k|^2/2 )

along a path of the controlled process.  This is the only place where path weights come from.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_tilt.process import Driftless, Prediction, Process, expand

__all__ = ["DDIM", "Brownian", "EulerMaruyama", "ExactGaussian", "Gaussian", "Transition", "control", "path_log_ratio"]


@dataclass(frozen=True)
class Gaussian:
    """`N(mean, std^2 I)`, one a sample.

    Attributes:
        mean: (B, ...).
        std: (B, 1, ...) or (1, 1, ...), not negative; 0 where the step is deterministic.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std noise`, (B, ...)."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at `x` (B, ...), summed over the state: (B,).

        Raises:
            ValueError: where std = 0: a deterministic step has no density; leave it out of the sum.
        """
        if bool((self.std == 0).any()):
            raise ValueError("a step with std = 0 has no density; leave it out of the sum of log probabilities")
        z = (x - self.mean) / self.std
        return (-0.5 * z**2 - self.std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


class Transition(ABC):
    """A family of Gaussian steps; stateless."""

    @property
    @abstractmethod
    def memoryless(self) -> bool:
        """Whether the noise is the memoryless one, so that a control tilts the end law (where also alpha_0 = 0)."""

    @abstractmethod
    def __call__(self, process: Process, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Gaussian:
        """The law of `x_s` given `x_t = x`.

        Args:
            process: the interpolant.
            x: states at `t`, (B, ...).
            prediction: the model's prediction at (x, t), (B, ...).
            t: times, (B,) or ().
            s: later (less noisy) times, (B,) or ().

        Returns:
            The transition; its mean carries the gradient of the prediction.
        """


class DDIM(Transition):
    """The DDIM family.

    Args:
        ddim_eta: 1 is the exact memoryless (ancestral) step, 0 the deterministic sampler; in [0, 1].
    """

    def __init__(self, ddim_eta: float = 1.0) -> None:
        if not 0 <= ddim_eta <= 1:
            raise ValueError(f"ddim_eta must lie in [0, 1], not {ddim_eta}")
        self.ddim_eta = ddim_eta

    def __repr__(self) -> str:
        return f"DDIM(ddim_eta={self.ddim_eta})"

    @property
    def memoryless(self) -> bool:
        """True for `ddim_eta = 1` alone."""
        return self.ddim_eta == 1

    def __call__(self, process: Process, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Gaussian:
        """See `Transition`; legal at alpha_t = 0 and at s = 1 (std = 0, mean = x1_hat)."""
        _refuse_driftless(self, process)
        t, s = t.double(), s.double()
        alpha_s, beta_s, beta_t = process.alpha(s), process.beta(s), process.beta(t)
        a = process.alpha(t) / alpha_s
        b2 = (beta_t**2 - a**2 * beta_s**2).clamp(min=0)
        std = self.ddim_eta * b2.sqrt() * beta_s / beta_t
        # sqrt(beta_s^2 - std^2), without the cancellation
        rest = beta_s * (1 - self.ddim_eta**2 + self.ddim_eta**2 * (a * beta_s / beta_t) ** 2).sqrt()
        mean = expand(alpha_s, x) * prediction.x1_hat + expand(rest, x) * prediction.eps_hat
        return Gaussian(mean, expand(std, x))


class ExactGaussian(Transition):
    """The exact step of a base N(mu, I/m): the base's chain ends in its law at any number of steps.

    Its mean is that of `DDIM(ddim_eta=1.0)`; its std is positive at s = 1 too, so no step is deterministic.  The chain
    must start in the base's law at t = 0: alpha_0 = 0, or mu = 0 and m = 1 with a variance-preserving process.

    Args:
        precision: m, one over the variance of the base.
    """

    memoryless: bool = True

    def __init__(self, precision: float = 1.0) -> None:
        if not 0 < precision < math.inf:
            raise ValueError(f"precision must be positive, not {precision}")
        self.precision = precision
        self._ancestral = DDIM()

    def __repr__(self) -> str:
        return f"ExactGaussian(precision={self.precision})"

    def __call__(self, process: Process, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Gaussian:
        """See `Transition`; legal at alpha_t = 0 and at s = 1 (mean = x1_hat)."""
        _refuse_driftless(self, process)
        t, s = t.double(), s.double()
        alpha_s, beta_s, beta_t = process.alpha(s), process.beta(s), process.beta(t)
        share = (1 - (process.alpha(t) / alpha_s * beta_s / beta_t) ** 2).clamp(min=0)  # b2/beta_t^2
        var = share * beta_s**2 + (alpha_s * share) ** 2 * process.posterior_variance(t, self.precision)
        return Gaussian(self._ancestral(process, x, prediction, t, s).mean, expand(var.sqrt(), x))


class Brownian(Transition):
    """The exact step of `Driftless`, of x1_hat alone: `mean = x + (nu_s - nu_t)/(nu_1 - nu_t) (x1_hat - x)`.

    Its std is `sqrt(nu_s - nu_t)`; the base has `x1_hat = x`.
    """

    memoryless: bool = True

    def __repr__(self) -> str:
        return "Brownian()"

    def __call__(self, process: Process, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Gaussian:
        """See `Transition`.

        Raises:
            TypeError: for another process than `Driftless`.
        """
        if not isinstance(process, Driftless):
            raise TypeError(f"Brownian steps the process Driftless, not {process!r}: use DDIM() or ExactGaussian()")
        t, s = t.double(), s.double()
        var = process.nu(s) - process.nu(t)
        share = var / (process.end_variance - process.nu(t))
        return Gaussian(x + expand(share, x) * (prediction.x1_hat - x), expand(var.sqrt(), x))


class EulerMaruyama(Transition):
    """First-order steps of the SDE with noise `sigma`.

    Args:
        sigma: "memoryless" is `sqrt(2 eta_t)`, infinite at alpha = 0; a number is a constant noise (0: the ODE).
    """

    def __init__(self, sigma: Literal["memoryless"] | float = "memoryless") -> None:
        if isinstance(sigma, str):
            if sigma != "memoryless":
                raise ValueError(f"sigma must be 'memoryless' or a number, not {sigma!r}")
        elif sigma < 0:
            raise ValueError(f"sigma must not be negative, not {sigma}")
        self.sigma = sigma

    def __repr__(self) -> str:
        return f"EulerMaruyama(sigma={self.sigma!r})"

    @property
    def memoryless(self) -> bool:
        """True for the memoryless noise alone."""
        return self.sigma == "memoryless"

    def __call__(self, process: Process, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Gaussian:
        """See `Transition`.

        Raises:
            ValueError: where a coefficient is infinite: at alpha = 0 with the memoryless noise.
        """
        _refuse_driftless(self, process)
        t, s = t.double(), s.double()
        sigma = process.sigma(t) if isinstance(self.sigma, str) else torch.full_like(t, self.sigma)
        h = s - t
        # h drift = h alpha' x1_hat + h (beta' - sigma^2/(2 beta)) eps_hat
        along_x1 = h * process.d_alpha(t)
        along_eps = h * (process.d_beta(t) - sigma**2 / (2 * process.beta(t)))
        if not bool(torch.isfinite(along_eps).all()):
            raise ValueError(
                f"{self!r} is singular at t = {float(t.min()):.4g} of {type(process).__name__} (the noise or the drift "
                "is infinite there): use DDIM(ddim_eta=1.0), which is finite, a bounded sigma, or start later"
            )
        mean = x + expand(along_x1, x) * prediction.x1_hat + expand(along_eps, x) * prediction.eps_hat
        return Gaussian(mean, expand(sigma * h.sqrt(), x))


def _refuse_driftless(transition: Transition, process: Process) -> None:
    if isinstance(process, Driftless):
        raise TypeError(f"{transition!r} is 0/0 at the start of {process!r}, a point: use the transition Brownian()")


def control(mean: Tensor, mean_base: Tensor, std: Tensor) -> Tensor:
    """`u = (mean - mean_base)/std`, and 0 where std = 0 (such a step is the base's).

    Args:
        mean: means of the controlled transition, (B, ...).
        mean_base: means of the base's transition from the same states, (B, ...).
        std: their common standard deviation, broadcastable.
    """
    noisy = std > 0
    # The inner `where` keeps the gradient of the unused branch finite.
    return torch.where(noisy, (mean - mean_base) / torch.where(noisy, std, torch.ones_like(std)), 0.0)


def path_log_ratio(u: Tensor, z: Tensor) -> Tensor:
    """`log dP/dP_base` of one step: `u . z + |u|^2/2`, summed over the state.

    Args:
        u: control, (B, ...).
        z: the step's noise under the controlled process, (B, ...).

    Returns:
        (B,)
    """
    return (u * z + u**2 / 2).flatten(1).sum(1)

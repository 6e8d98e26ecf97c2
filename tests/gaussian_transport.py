"""A Gaussian base, a quadratic and linear reward, and everything along the path of marginals in closed form.

One dimension, float64.  X_t = alpha X_1 + beta eps, X_1 ~ N(mu, v), r = -q (x - c)^2/2 + l x, lam = 1, level c_t:

    p_t = N(m, S),   m = alpha mu,  S = alpha^2 v + beta^2
    pi_t = N(n, T),  1/T = 1/S + c_t q,   n/T = m/S + c_t (q c + l)
    w_t(x) = n' + T'/(2T) (x - n) - m' - S'/(2S) (x - m),      F_t = log Z_t

Derivatives in t by autograd of these scalars; of the package only the process is used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from toys import gaussian

from lightning_tilt.interfaces import Condition, Predictor, Prompts, Reward
from lightning_tilt.process import Process
from lightning_tilt.transport import BoundedNoise, KnownTransport, MarginalPath, TransportChain


def slope(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    with torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        return torch.autograd.grad(f(t).sum(), t)[0]


@dataclass(frozen=True)
class GaussianTransport:
    process: Process
    mu: float = 0.4
    v: float = 0.6
    q: float = 1.5
    c: float = 1.2
    l: float = -0.3  # noqa: E741
    end: float = 1.0
    """The time where the path has reached the whole reward; the levels are linear."""

    def base(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.process.alpha(t), self.process.beta(t)
        return alpha * self.mu, alpha**2 * self.v + beta**2

    def tilted(self, t: Tensor) -> tuple[Tensor, Tensor]:
        (m, S), level = self.base(t), t / self.end
        T = 1 / (1 / S + level * self.q)
        return T * (m / S + level * (self.q * self.c + self.l)), T

    def moving(self, law: Callable[[Tensor], tuple[Tensor, Tensor]], t: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and intercept of the velocity that moves a Gaussian law."""
        n, T = law(t)
        a = slope(lambda t: law(t)[1], t) / (2 * T)
        return a, slope(lambda t: law(t)[0], t) - a * n

    def w(self, t: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (a0, b0) = self.moving(self.tilted, t), self.moving(self.base, t)
        return a - a0, b - b0

    def free_energy(self, t: Tensor) -> Tensor:
        """Log E_{p_t}[exp(level r)]."""
        (m, S), level = self.base(t), t / self.end
        P, Q = level * self.q, level * (self.q * self.c + self.l)
        grow = 1 + P * S
        return -level * self.q * self.c**2 / 2 - grow.log() / 2 + (2 * Q * m + Q**2 * S - P * m**2) / (2 * grow)

    def end_log_z(self, t: Tensor) -> Tensor:
        """Log E[exp(r(x1_hat(X_t)))]: of the law that a chain tilts whose last noisy time is t."""
        _, S = self.base(t)
        gain = self.process.alpha(t) * self.v / S
        law = GaussianTransport(self.process, self.mu, float(gain**2 * S), self.q, self.c, self.l)
        return law.free_energy(torch.ones_like(t))

    def chain(self, steps: int, **kwargs: object) -> TransportChain:
        grid = self.process.grid(steps)
        path = MarginalPath(lambda x, c: QuadraticAndLinear(self).score(x, None), 1.0, end=float(grid[-2]))
        return TransportChain(process=self.process, transition=BoundedNoise(1.0), t=grid, path=path, **kwargs)


class QuadraticAndLinear(Reward):
    def __init__(self, problem: GaussianTransport) -> None:
        super().__init__()
        self.problem = problem

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        x, p = images.flatten(1), self.problem
        return (-p.q / 2 * (x - p.c) ** 2 + p.l * x).sum(1)


class AffineTransport(Predictor, KnownTransport):
    """w = (factor of the exact transport) + a x + b, with (a, b) trained."""

    def __init__(self, problem: GaussianTransport, exact: float = 1.0, more: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self._base = [gaussian(problem.mu, problem.v, problem.process)]
        self.process, self.prediction_type, self.state_shape = problem.process, "velocity", (1,)
        self.problem, self.exact = problem, exact
        self.more = nn.Parameter(torch.tensor(more).double())

    def w(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        a, b = self.problem.w(t.double())
        return (self.exact * a + self.more[0])[:, None] * x + (self.exact * b + self.more[1])[:, None]

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prediction = self.process.interpret(self._base[0].predict(x, t, condition), "sample", x, t)
        return self.process.velocity(prediction, t) + self.w(x, t, condition)

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        yield self._base[0]

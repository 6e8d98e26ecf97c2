"""Reference samples of an unnormalised density by many parallel chains, and the numbers that say whether they mixed.

    y = x - h grad E(x) + sqrt(2 h) z,  z ~ N(0, I)                          the proposal, q(y | x)
    accept with probability  min(1, exp(E(x) - E(y)) q(x | y) / q(y | x))

MALA: the Metropolis-adjusted Langevin algorithm (Roberts and Tweedie, Bernoulli 2, 1996), of which exp(-E) is invariant
for every step size h.  Particles live on the mean-free subspace: `project` is applied to the noise, and the gradient of
an energy that translations leave alone is in the subspace by itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MALARun", "integrated_autocorrelation", "mala", "relaxed", "split_r_hat", "tuned_step_size"]

Energy = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MALARun:
    """What the chains did.

    Attributes:
        x: (C, *state_shape), where each of the C chains ended.
        energies: (T, C), the energy after each step.
        acceptance: the fraction of proposals that were accepted.
    """

    x: Tensor
    energies: Tensor
    acceptance: float


def mala(
    energy: Energy,
    x0: Tensor,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    project: Callable[[Tensor], Tensor] | None = None,
) -> MALARun:
    """Run C independent chains.

    Args:
        energy: `E(x)`, (C, *state_shape) -> (C,), differentiable; what is not finite is never accepted.
        x0: (C, *state_shape), where the chains start, with finite energies.
        steps: T.
        step_size: h; the noise of a step has standard deviation sqrt(2 h).
        generator: of the noise, on the device of `x0`.
        project: a linear orthogonal projection of (C, *state_shape) onto the subspace in which the chains stay. The
            gradient of `energy` must lie in it.

    Raises:
        ValueError: if a chain starts where the energy is not finite.
    """
    x, h = x0, step_size
    e, gradient = _energy_and_gradient(energy, x)
    if not e.isfinite().all():
        raise ValueError(f"{int((~e.isfinite()).sum())} of {len(e)} chains start where the energy is not finite")
    energies, accepted = [], 0
    for _ in range(steps):
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        z = z if project is None else project(z)
        y = x - h * gradient + math.sqrt(2 * h) * z
        e_y, gradient_y = _energy_and_gradient(energy, y)
        log_q_forward = -_square(z) / 2
        log_q_backward = -_square(x - y + h * gradient_y) / (4 * h)
        log_ratio = e - e_y + log_q_backward - log_q_forward
        u = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        accept = u.log() < log_ratio  # False where the ratio is NaN
        rows = accept.view(-1, *[1] * (x.ndim - 1))
        x, gradient, e = torch.where(rows, y, x), torch.where(rows, gradient_y, gradient), torch.where(accept, e_y, e)
        energies.append(e)
        accepted += int(accept.sum())
    series = torch.stack(energies) if energies else e.new_empty(0, len(x))
    return MALARun(x, series, accepted / max(steps * len(x), 1))


def relaxed(energy: Energy, x0: Tensor, steps: int, rate: float, length: float) -> Tensor:
    """Gradient descent of each state, by steps of `rate` times the gradient but never longer than `length`.

    Far outside, where the gradient is steep, MALA accepts nothing: chains start from here.
    """
    x = x0
    for _ in range(steps):
        _, gradient = _energy_and_gradient(energy, x)
        norm = _square(gradient).sqrt().view(-1, *[1] * (x.ndim - 1))
        x = x - gradient * (length / norm.clamp(min=1e-12)).clamp(max=rate)
    return x


def tuned_step_size(
    energy: Energy,
    x0: Tensor,
    step_size: float,
    generator: torch.Generator,
    project: Callable[[Tensor], Tensor] | None = None,
    blocks: int = 20,
    block_steps: int = 20,
    target: float = 0.6,
) -> tuple[Tensor, float]:
    """Warm the chains up, and make `step_size` larger or smaller after each block until `target` is accepted.

    Returns:
        The states after the last block and the step size. Freeze it for the run that counts: while it adapts, exp(-E)
        is not invariant.
    """
    x, h = x0, step_size
    for _ in range(blocks):
        run = mala(energy, x, block_steps, h, generator, project)
        x, h = run.x, h * math.exp(run.acceptance - target)
    return x, h


def split_r_hat(series: Tensor) -> float:
    """Gelman and Rubin's scale reduction of chains cut in halves: near 1 if they mixed, above 1.01 is suspect.

    Args:
        series: (T, C), one number a step and chain; T >= 4.

    Of T steps and autocorrelation time tau it is about sqrt(1 + 2 tau / T) where chains have mixed: many chains of
    which only the ends are kept can be sound with an R-hat well above 1.01.

    Source: Gelman et al., Bayesian Data Analysis, 3rd edition, section 11.4.
    """
    n = len(series) // 2
    if n < 2:
        raise ValueError(f"split_r_hat needs at least 4 steps, not {len(series)}")
    halves = torch.cat([series[:n], series[n : 2 * n]], dim=1).double()
    within = halves.var(0).mean()
    between = n * halves.mean(0).var()
    return float((((n - 1) * within + between) / (n * within)).sqrt())


def integrated_autocorrelation(series: Tensor, window: float = 5.0) -> float:
    """`tau = 1 + 2 sum_k rho_k`: a chain of T steps is worth T / tau independent samples.

    `rho_k` is averaged over the chains, about their common mean (about its own mean a chain that is stuck looks mixed).
    The sum ends at the first lag k >= `window` tau (Sokal, Monte Carlo Methods in Statistical Mechanics, 1996).

    Args:
        series: (T, C), one number a step and chain.
        window: how many tau the sum takes.

    Returns:
        tau; of a series shorter than that many tau, a lower bound.
    """
    centred = series.double() - series.double().mean()
    steps = len(centred)
    spectrum = torch.fft.rfft(centred, 2 * steps, dim=0).abs().square()
    counts = torch.arange(steps, 0, -1, dtype=torch.float64)
    covariance = torch.fft.irfft(spectrum, dim=0)[:steps].mean(1).cpu() / counts
    taus = 2 * (covariance / covariance[0]).cumsum(0) - 1
    enough = (torch.arange(steps) >= window * taus).nonzero()
    return float(taus[enough[0, 0]] if len(enough) else taus[-1])


def _energy_and_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """`E(x)`, (C,), and its gradient, shaped as x; without history."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        e = energy(x)
        (gradient,) = torch.autograd.grad(e.sum(), x)
    return e.detach(), gradient


def _square(v: Tensor) -> Tensor:
    """The squared norm of each row, (C,)."""
    return v.flatten(1).square().sum(1)

"""A regression at noised end points, one point at a time by plain autograd: rectified flow, `PromptedNet`, float64."""

from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback
from torch import Tensor, nn
from toys import PromptedNet, fit

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.noise import keyed_normal_rows, keyed_uniform_rows
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.transition import DDIM

PROMPTS = ["a", "four"]
Target = Callable[[int, Tensor, Tensor, Callable[[nn.Module], Tensor]], Tensor]


class Weights(Callback):
    """Keeps the network as it was at each update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({n: p.detach().clone() for n, p in pl_module.predictor.network.named_parameters()})


def net() -> PromptedNet:
    """A model that has moved away from its base already."""
    torch.manual_seed(3)
    predictor = PromptedNet(RectifiedFlow()).double()
    for p in predictor.network.parameters():
        nn.init.normal_(p, std=0.5)
    return predictor


def task_of(cls: Any, predictor: Any = None, reward: Any = None, lr: float = 0.0, **loss: Any) -> Any:
    """The loss on a small network, with plain gradient descent."""
    from toys import SumReward

    return cls(
        predictor=net() if predictor is None else predictor,
        reward=reward or SumReward(),
        optimizer=lambda p: torch.optim.SGD(p, lr=lr),
        **({"t_min": 0.1, "t_max": 0.9, "noisings": 3, "time_sampling": "uniform"} | loss),
    ).double()


def ode(**kwargs: Any) -> TrajectorySampler:
    """Four steps of the model's ODE."""
    settings: dict[str, Any] = {"steps": 4, "samples_per_condition": 4, "seed": 5, "base_last_step": False}
    return TrajectorySampler(transition=DDIM(ddim_eta=0.0), **(settings | kwargs))


def naive_gradient(
    path: Any, network: nn.Module, target: Target, number: int, noisings: int = 3, factor: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradient of 1/(N noisings) sum of (alpha/beta)^2 |x1_hat - y|^2/2, times `factor` a sample.

    `target(n, x1, x1_hat, of)` gives y; `of(network)` is the x1_hat of another network at the same point.
    """
    n_samples = len(path)
    u = keyed_uniform_rows(5, "times", number, range(n_samples * noisings + 1))[1:]
    eps = keyed_normal_rows(5, "renoise", number, range(n_samples * noisings), (2,)).double()
    good = [i for i in range(n_samples) if path.weight[i] > 0]
    loss = torch.zeros((), dtype=torch.float64)
    for p in range(n_samples * noisings):
        n = p % n_samples
        if n not in good:
            continue
        t = 0.1 + 0.8 * u[p]
        x1 = path.states[-1, n]
        x = t * x1 + (1 - t) * eps[p]
        length = torch.tensor(len(PROMPTS[n // (n_samples // 2)]) / 10).double()

        def of(model: nn.Module, x: Tensor = x, t: Tensor = t, length: Tensor = length) -> Tensor:
            found: Tensor = x + (1 - t) * model(torch.cat([x, torch.stack([t, length])]))
            return found

        x1_hat = of(network)
        y = target(n, x1, x1_hat, of).detach()
        term = (t / (1 - t)) ** 2 * ((x1_hat - y) ** 2).sum() / 2
        loss = loss + (term if factor is None else factor[n] * term)
    gradients = torch.autograd.grad(loss / (len(good) * noisings), list(network.parameters()))
    return dict(zip([f"predictor.network.{n}" for n, _ in network.named_parameters()], gradients, strict=True))


def others(values: Tensor, n: int) -> float:
    """The mean over the other samples of the prompt, by a loop."""
    half = len(values) // 2
    group = range(0, half) if n < half else range(half, 2 * half)
    rest = [float(values[j]) for j in group if j != n]
    return sum(rest) / len(rest)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    """Equal gradients, and not all zero."""
    assert set(found) == set(expected) and sum(float(g.abs().sum()) for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)


def gradients(cls: Any, sampler: TrajectorySampler | None = None, **loss: Any) -> dict[str, Tensor]:
    """The gradients of one update on both prompts."""
    return fit(task_of(cls, **loss), sampler or ode(), [PROMPTS]).gradients[0]

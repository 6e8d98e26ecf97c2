"""What the tests of the losses on whole paths share: one update, naive loops, gradients with their standard errors."""

from dataclasses import dataclass
from typing import Any

import oracles
import torch
from torch import Tensor
from toys import AffineControl, PromptedNet, SumReward, fit, gaussian

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.interfaces import Predictor, Prompts, Reward
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards.quadratic import QuadraticReward

MU, V, LAM, C, STEPS = 0.3, 0.2, 2.0, 1.0, 8
PROMPTS = ["one", "three", "seven"]


class Jagged(Reward):
    """A reward without gradient; NaN where it is told to be."""

    is_differentiable = False

    def __init__(self, nan_at: list[int] | None = None) -> None:
        super().__init__()
        self.nan_at = nan_at or []

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        reward = (images > 0.2).flatten(1).double().sum(1)
        reward[self.nan_at] = torch.nan
        return reward


class SmoothWithNaN(SumReward):
    """A reward with a gradient, NaN at some places of the batch."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        hole = torch.zeros(len(images), dtype=images.dtype)
        hole[[1]] = torch.nan
        return super().score(images, prompts) + hole


def update(
    kind: type, predictor: Predictor, reward: Reward, batch: Any, steps: int, sampler: Any = None, **loss: Any
) -> tuple[Any, Any, dict[str, Tensor]]:
    """One rollout in float64 and its gradient, without moving anything."""
    task = kind(predictor=predictor, reward=reward, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **loss).double()
    recorder = fit(task, TrajectorySampler(**({"steps": steps, "samples_per_condition": 1} | (sampler or {}))), [batch])
    return task, recorder.trajectories[0], recorder.gradients[0]


def net() -> PromptedNet:
    torch.manual_seed(3)
    predictor = PromptedNet(RectifiedFlow())
    predictor.network[2].weight.data += 0.3
    return predictor


def net_update(kind: type, reward: Reward | None = None, **kwargs: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """An update of the conditional network on three prompts, three samples each, guided by 2."""
    sampler = {"samples_per_condition": 3, "guidance_scale": 2.0} | kwargs.pop("sampler", {})
    return update(kind, net(), reward or SumReward(), PROMPTS, 5, sampler, **({"lam": 2.0} | kwargs))


@dataclass
class Naive:
    """Numbers of one sample's path, a list entry a step with noise."""

    u: list[Tensor]
    xi: list[Tensor]
    z: list[Tensor]
    after: Tensor

    @property
    def W(self) -> Tensor:
        return sum(((u * xi).sum() - (u**2).sum() / 2 for u, xi in zip(self.u, self.xi, strict=True)), torch.zeros(()))


def naive_path(
    predictor: PromptedNet, path: Any, n: int, simulate: bool = False, first: int = 0, scale: float = 2.0
) -> Naive:
    """One sample, one step at a time: on its recorded states, or simulated again from `first` with gradient."""
    t, prompt, steps = path.t, "" if path.prompts is None else path.prompts[n], path.steps
    out = Naive([], [], [], path.states[first, n])

    def mean(network: torch.nn.Module, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        def ask(p: str) -> Tensor:
            return network(torch.cat([x, torch.stack([t[k], torch.tensor(len(p) / 10).double()])]))

        v = ask("") + scale * (ask(prompt) - ask(""))
        x1, eps = x + (1 - t[k]) * v, x - t[k] * v
        s, a = t[k + 1], t[k] / t[k + 1]
        std = ((1 - t[k]) ** 2 - a**2 * (1 - s) ** 2) ** 0.5 * (1 - s) / (1 - t[k])
        return s * x1 + ((1 - s) ** 2 - std**2).clamp(min=0) ** 0.5 * eps, std

    for k in range(first, steps):
        x = out.after if simulate else path.states[k, n]
        base, std = mean(predictor._twin[0], x, k)
        if std == 0:
            out.after = base
            continue
        tuned, _ = mean(predictor.network, x, k)
        z = path.noise[k, n]
        out.after = tuned + std * z if simulate else path.states[k + 1, n]
        out.u.append((tuned - base) / std)
        out.xi.append((out.after - base.detach()) / std if not simulate else out.u[-1] + z)
        out.z.append(z)
    return out


def same_gradient(gradient: dict[str, Tensor], total: Tensor, predictor: PromptedNet) -> None:
    """The gradient of an update is that of the naive total, to 1e-8."""
    names = [name for name in gradient if name.startswith("predictor.")]
    expected = torch.autograd.grad(total, list(predictor.network.parameters()))
    assert len(names) == len(expected)
    for name, value in zip(names, expected, strict=True):
        assert value.abs().max() > 1e-6
        torch.testing.assert_close(gradient[name], value, rtol=1e-8, atol=1e-9)


def same_whatever_the_micro_batches(kind: type, **kwargs: Any) -> None:
    """Micro-batches and checkpoints change neither gradient nor path; what is counted is what was called."""
    _, path, whole = net_update(kind, checkpoint=False, **kwargs)
    cut_sampler = {"rollout_micro_batch": 4, "reward_micro_batch": 2}
    _, other, cut = net_update(kind, checkpoint=True, loss_micro_batch=4, sampler=cut_sampler, **kwargs)
    assert whole.keys() == cut.keys() and len(whole) >= 4
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-10, atol=1e-10)
        assert whole[name].abs().max() > 0
    torch.testing.assert_close(other.states, path.states, rtol=1e-12, atol=1e-12)


# The Gaussian problem ------------------------------------------------------------------------------------------------


def problem(steps: int = STEPS) -> tuple[oracles.Chain, oracles.Tilt]:
    return oracles.ddim_chain(oracles.flow_schedule(steps), MU, V), oracles.Tilt(lam=LAM, q=1.0, c=C)


def at_control(
    kind: type, control: list[tuple[float, float]], n: int = 20_000, **loss: Any
) -> tuple[Any, Any, dict[str, Tensor]]:
    """An update with n samples of the Gaussian problem at an affine control."""
    predictor = AffineControl(gaussian(MU, V, RectifiedFlow()), len(control), control)
    return update(
        kind, predictor, QuadraticReward([[1.0]], [C]), torch.zeros(n), len(control), lam=LAM, checkpoint=False, **loss
    )


def gradient_with_error(task: Any, path: Any, batches: int = 40) -> tuple[Tensor, Tensor]:
    """The loss's gradient in (g_k, h_k) at the noisy steps: a mean over batches of the path, and its standard error."""
    size = len(path) // batches
    parts = []
    for i in range(batches):
        value, _ = task.loss(path[slice(i * size, (i + 1) * size)])
        parts.append(torch.autograd.grad(value, task.predictor.control)[0][:-1])
    stack = torch.stack(parts)
    return stack.mean(0), stack.std(0) / batches**0.5


def relative_entropy_gradient(
    chain: oracles.Chain, control: list[tuple[float, float]], tilt: oracles.Tilt, h: float = 1e-4
) -> Tensor:
    """Gradient of KL(P_theta | P*) in (g_k, h_k) at the noisy steps, by central differences of the oracle's cost."""
    out = torch.zeros(len(control) - 1, 2, dtype=torch.float64)
    for k in range(len(control) - 1):
        for i in range(2):
            cost = []
            for sign in (1, -1):
                moved = [list(pair) for pair in control]
                moved[k][i] += sign * h
                cost.append(oracles.control_cost(chain, [(g, b) for g, b in moved], tilt))
            out[k, i] = (cost[0] - cost[1]) / (2 * h)
    return out

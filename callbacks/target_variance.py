"""`TargetVariance`: bias and variance of a loss's target, and of its gradient, over the time of the process.

    E|x1_hat - y|^2 = E|x1_hat - E[y | X_t]|^2 + E Var(y | X_t)

The first term is what training removes, the second what it cannot, and what noises the gradient.  Both are measured at
states of the current model by nested samples (`nested`), in two metrics (`interfaces.targets`): `control`, in which a
sum over steps is the KL between path laws, and `score`, the plain error of the score.

    gradient of one sample at t      g = d/dtheta  1/2 f |x1_hat_theta(X_t) - y|^2          f: the control metric
    noise to signal                  E|g - E g|^2 / |E g|^2                                 samples until they are equal
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..chain import Chain, slices
from ..interfaces import find_sampler
from ..interfaces.targets import control_factor, score_factor, x1_target
from ..trajectory import Trajectory
from .diagnostic import Diagnostic
from .nested import bias_and_variance, continued, gradient_noise
from .pictures import BASE, EXACT, TUNED, tidy

__all__ = ["TargetVariance", "draw"]


class TargetVariance(Diagnostic):
    """Measure a regression's bias and variance by nested samples: `target_variance.json`, `target_variance.png`.

    A look costs, for each time, `samples x inner` continuations from there to the end, their rewards (with gradients
    where the loss asks for them), and their targets: with Adjoint Matching one more base evaluation and VJP a step.

    Args:
        samples: outer states X_t.
        inner: continuations of each, at least 2.
        times: where, between noise (0) and data (1); each is taken to the nearest step with noise.
        gradient_batches: batches that the outer states are cut into for the variance of the gradient, at least 2.
        every_n_updates: see `Diagnostic`.
        prompts: see `Diagnostic`.
        micro_batch: see `Diagnostic`.
    """

    name: ClassVar[str] = "target_variance"

    def __init__(
        self,
        samples: int = 128,
        inner: int = 8,
        times: Sequence[float] = (0.02, 0.1, 0.3, 0.6, 0.9, 0.98),
        gradient_batches: int = 8,
        every_n_updates: int | None = None,
        prompts: list[str] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(samples, every_n_updates, prompts, micro_batch)
        if min(inner, gradient_batches) < 2:
            raise ValueError(f"inner ({inner}) and gradient_batches ({gradient_batches}) must be at least 2")
        if not times or not all(0 <= t <= 1 for t in times):
            raise ValueError(f"times lie between noise (0) and data (1), not {list(times)}")
        self.inner = inner
        self.times = tuple(times)
        self.gradient_batches = gradient_batches

    def look(self, host: Any) -> tuple[dict[str, Any], Figure]:
        """The numbers at all times, and their picture."""
        chain = find_sampler(host).chain(host, count=False)
        if not chain.control_form:
            raise TypeError(f"TargetVariance looks at chains of the control form, not at {type(chain).__name__}")
        outer, rows = self.paths(host), []
        for k in _steps(chain, self.times):
            path = replace(continued(host, outer, k, self.inner, k, self.micro_batch), lam=outer.lam)
            y = x1_target(host, path, k, self.micro_batch)
            rows.append(self._row(host, chain, outer, y.unflatten(0, (len(outer), self.inner)), k))
        numbers = {"loss": type(host).__name__, "outer": len(outer), "inner": self.inner, "times": rows}
        return numbers, draw(rows, len(outer))

    def _row(self, host: Any, chain: Chain, outer: Trajectory, y: Tensor, k: int) -> dict[str, Any]:
        with torch.no_grad():
            x1_hat = torch.cat([_x1_hat(host, chain, outer[i], k) for i in slices(len(outer), self.micro_batch)])
        row: dict[str, Any] = {"t": float(chain.t[k]), "step": k}
        factors = {"control": float(control_factor(chain)[k]), "score": float(score_factor(chain)[k])}
        for metric, factor in factors.items():
            bias, variance = bias_and_variance(x1_hat, y, factor)
            row[metric] = {"bias2": bias.as_dict(), "variance": variance.as_dict()}
        signal, noise = self._gradient(host, chain, outer, y[:, 0], k, factors["control"])
        ratio = noise / signal if signal > 0 else None
        row["gradient"] = {"squared_mean": signal, "variance": noise, "noise_to_signal": ratio}
        return row

    @torch.enable_grad()
    def _gradient(
        self, host: Any, chain: Chain, outer: Trajectory, y: Tensor, k: int, factor: float
    ) -> tuple[float, float]:
        """|E g|^2 and E|g - E g|^2 of a single sample's gradient."""
        size = max(len(outer) // self.gradient_batches, 1)
        trained = list(host.predictor.trained_parameters().values())
        if len(outer) < 2 or not trained:
            return 0.0, 0.0
        gradients = []
        for i in slices(len(outer) // size * size, size):
            error = _x1_hat(host, chain, outer[i], k) - y[i]
            loss = factor / 2 * (error**2).flatten(1).sum(1).mean()
            parts = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat([g.detach().flatten() for g in parts]))
        return gradient_noise(torch.stack(gradients), size)


def draw(rows: Sequence[dict[str, Any]], samples: int) -> Figure:
    """Bias^2 and variance over t in both metrics, and the gradient's noise.

    A bias^2 within two standard errors of 0 is drawn as the upper limit that it is: hollow, pointing down.

    Args:
        rows: as `target_variance.json` has them under `times`.
        samples: states behind each gradient.
    """
    figure, t = Figure(figsize=(10.5, 3.4), layout="constrained"), [row["t"] for row in rows]
    axes = figure.subplots(1, 3)
    for axis, metric in zip(axes, ("control", "score"), strict=False):
        for key, label, colour in (("variance", "variance", TUNED), ("bias2", "bias² (hollow: at most)", EXACT)):
            _estimates(axis, t, [row[metric][key] for row in rows], label, colour, key == "bias2")
        axis.set_title(f"target, {metric} metric", fontsize=10)
    variance = [row["gradient"]["variance"] for row in rows]
    signal = [row["gradient"]["squared_mean"] for row in rows]
    axes[2].plot(t, variance, color=TUNED, label="one sample's variance", marker="o", ms=3.5, lw=1.2)
    known = [(x, y) for x, y in zip(t, signal, strict=True) if y > 0]
    axes[2].plot(*zip(*known, strict=True) if known else ([], []), "o-", color=EXACT, label="|mean|²", ms=3.5, lw=1.2)
    axes[2].plot(t, [v / samples for v in variance], ":", color=BASE, label="its noise", lw=1.2)
    axes[2].set_title("gradient, control metric", fontsize=10)
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xlim(-0.03, 1.03)
        axis.set_xlabel("t  (noise 0, data 1)")
        axis.legend(
            frameon=False, fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=3, columnspacing=1.0
        )
        tidy(axis)
    return figure


def _estimates(
    axis: Axes, t: Sequence[float], values: Sequence[dict[str, float]], label: str, colour: str, limited: bool
) -> None:
    """Points with their standard errors; if `limited`, what is not above two of them as an upper limit."""
    limits = [v["mean"] + 2 * v["se"] for v in values]
    sure = [not limited or v["mean"] > 2 * v["se"] for v in values]
    heights = [v["mean"] if s else h for v, s, h in zip(values, sure, limits, strict=True)]
    axis.plot(t, heights, color=colour, lw=1.0, alpha=0.6)
    for x, y, v, s in zip(t, heights, values, sure, strict=True):
        face = colour if s else "white"
        axis.errorbar(x, y, v["se"] if s else None, color=colour, marker="o" if s else "v", mfc=face, ms=4, capsize=2)
    axis.plot([], [], color=colour, marker="o", ms=4, lw=1.0, label=label)


def _steps(chain: Chain, times: Sequence[float]) -> list[int]:
    """The steps with noise nearest to the times, each once."""
    noisy = torch.tensor(chain.noisy_steps)
    if len(noisy) == 0:
        raise ValueError("TargetVariance needs a chain with noise: of an ODE, X_t says all of X_1")
    at = chain.t[noisy].cpu()
    return sorted({int(noisy[(at - t).abs().argmin()]) for t in times})


def _x1_hat(host: Any, chain: Chain, path: Trajectory, k: int) -> Tensor:
    """The model's x1_hat at X_k, with gradient where it is on."""
    x, scale = path.states[k], find_sampler(host).guidance_scale
    output = chain.output(host.predictor, x, k, path.condition[path.index], scale)
    return chain.process.interpret(output, host.predictor.prediction_type, x, chain.t[k].to(x.device)).x1_hat

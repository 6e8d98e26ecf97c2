"""`AdjointNorm`: how long the lean adjoint is over time, beside its bound.

    a_K = -lam grad r(X_K),        a_k = J[m_base,k](X_k)^T a_{k+1}                           `identities.lean_adjoint`
    |a_k| <= (alpha_k/D_k) (D_K/alpha_K) |a_K|,        D = alpha^2 + m beta^2                 base of precision >= m > 0

Along paths of the current model, for any loss whose reward has a gradient.  An adjoint that grows towards the noise is
what makes Adjoint Matching's targets noisy there; a bound that is left behind says that the base is not log-concave.

Of a base in few dimensions the sharpest factor that one path allows is measured too: each step's Jacobian J_k has a
largest singular value, and |a_k| <= prod_{j >= k} |J_j| |a_K|.
"""

from typing import Any, ClassVar, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..chain import Chain, slices
from ..identities.lean_adjoint import adjoint_bound, lean_adjoint
from ..interfaces import Predictor, find_sampler
from ..models import GaussianBase
from ..trajectory import Trajectory
from ..transition import DDIM, ExactGaussian
from .diagnostic import Diagnostic
from .pictures import BASE, EXACT, TUNED, tidy

__all__ = ["AdjointNorm", "jacobian_norms"]


class AdjointNorm(Diagnostic):
    """Measure |a_k| over time: `adjoint_norm.json`, `adjoint_norm.png`.

    A look costs `samples` paths with the gradient of their rewards, and one base evaluation and VJP a state; with
    `jacobians` one VJP a dimension and state.

    Args:
        samples: paths.
        precision: m with -hess log p_base >= m I, for the bound; None: that of a `GaussianBase`, of others no bound.
        jacobians: measure the product of the steps' largest singular values as well; for a few dimensions.
        every_n_updates: see `Diagnostic`.
        prompts: see `Diagnostic`.
        micro_batch: see `Diagnostic`.
    """

    name: ClassVar[str] = "adjoint_norm"

    def __init__(
        self,
        samples: int = 256,
        precision: float | None = None,
        jacobians: bool = False,
        every_n_updates: int | None = None,
        prompts: list[str] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(samples, every_n_updates, prompts, micro_batch)
        if precision is not None and precision <= 0:
            raise ValueError(f"AdjointNorm: the bound is for log-concave bases, precision > 0, not {precision}")
        self.precision = precision
        self.jacobians = jacobians

    def look(self, host: Any) -> tuple[dict[str, Any], Figure]:
        """Norms, bounds, and their picture."""
        if not host.reward.is_differentiable:
            raise TypeError(f"AdjointNorm needs the reward's gradient, and {type(host.reward).__name__} has none")
        chain, path = find_sampler(host).chain(host, count=False), self.paths(host, gradient=True)
        with host.predictor.base() as base:
            a = torch.cat([_adjoints(host, base, chain, path[i]) for i in slices(len(path), self.micro_batch)], 1)
            bound = self._bound(base, chain)
            growth = self._growth(host, base, chain, path) if self.jacobians else None
        norms = a.double().flatten(2).norm(dim=2)
        numbers = summary(chain.t[-len(norms) :], norms, None if bound is None else bound[-len(norms) :], growth)
        return numbers | {"precision": self._known(base)}, draw(numbers)

    def _known(self, base: Predictor) -> float | None:
        return base.precision if self.precision is None and isinstance(base, GaussianBase) else self.precision

    def _bound(self, base: Predictor, chain: Chain) -> Tensor | None:
        precision, transition = self._known(base), chain.transition
        memoryless = isinstance(transition, ExactGaussian) or (isinstance(transition, DDIM) and transition.memoryless)
        return adjoint_bound(chain.process, chain.t, precision) if precision is not None and memoryless else None

    def _growth(self, host: Any, base: Predictor, chain: Chain, path: Trajectory) -> Tensor:
        """prod_{j >= k} |J_j| for k = 1 ... K, (K, N)."""
        mean = chain.mean(base, path.condition[path.index], find_sampler(host).guidance_scale)
        norms = [jacobian_norms(lambda x, k=k: mean(x, k), path.states[k]) for k in range(1, chain.steps)]
        factors = torch.stack([*norms, torch.ones(len(path)).to(norms[0])]).double()
        return factors.flip(0).cumprod(0).flip(0)


def jacobian_norms(f: Any, x: Tensor) -> Tensor:
    """The largest singular values of the Jacobians of f at samples x (N, *shape), which it treats one by one: (N,)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = f(x).flatten(1)
        rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(y.shape[1])]
    return cast(Tensor, torch.linalg.matrix_norm(torch.stack(rows, 1), 2))


def summary(t: Tensor, norms: Tensor, bound: Tensor | None, growth: Tensor | None) -> dict[str, Any]:
    """Mean, quantiles and bounds of the adjoints' norms.

    Args:
        t: times, (J,).
        norms: |a| at them, (J, N), float64; the last is |a_K|.
        bound: how many times longer than a_K it can be, (J,).
        growth: the same along each path, (J, N).

    Returns:
        Lists of length J; `ratio_max` is the largest |a|/(bound |a_K|), at most 1 for a base that has the precision.
        `relative` has the quantiles and the largest of |a|/|a_K|, path by path, its `bound`, which none of them exceeds
        where there is one, and `growth_max`, the largest of the factors that the paths allow.
    """
    last, relative = norms[-1], norms / norms[-1].clamp(min=1e-300)
    quantiles = torch.tensor([0.5, 0.95], dtype=norms.dtype, device=norms.device)
    median, high = norms.quantile(quantiles, 1).tolist()
    found: dict[str, Any] = {"t": t.tolist(), "mean": norms.mean(1).tolist(), "median": median, "q95": high}
    found |= {"se": (norms.std(1) / norms.shape[1] ** 0.5).tolist(), "n": norms.shape[1]}
    found["relative"] = dict(zip(("median", "q95"), relative.quantile(quantiles, 1).tolist(), strict=True))
    found["relative"]["max"] = relative.amax(1).tolist()
    if bound is not None:
        found["relative"]["bound"] = bound.tolist()
        limit = bound.to(norms)[:, None] * last
        found |= {"bound": limit.mean(1).tolist(), "ratio_max": float((norms / limit.clamp(min=1e-300)).max())}
    if growth is not None:
        found["relative"]["growth_max"] = growth.amax(1).tolist()
        found["growth"] = (growth.to(norms) * last).mean(1).tolist()
    return found


def draw(found: dict[str, Any]) -> Figure:
    """The norms over t, and their bounds.

    Args:
        found: as `summary` returns it.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis, t = figure.subplots(), found["t"]
    axis.fill_between(t, found["median"], found["q95"], color=TUNED, alpha=0.18, lw=0, label="median to 95 %")
    axis.plot(t, found["mean"], color=TUNED, lw=1.4, label="mean |a|")
    if "bound" in found:
        axis.plot(t, found["bound"], color=EXACT, lw=1.4, ls="--", label="bound of the mean, log-concave base")
    if "growth" in found:
        axis.plot(t, found["growth"], color=BASE, lw=1.4, ls=":", label="its mean by singular values")
    axis.set_yscale("log")
    axis.set_xlabel("t  (noise 0, data 1)")
    axis.set_ylabel("norm of the lean adjoint")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    tidy(axis)
    return figure


def _adjoints(host: Any, base: Predictor, chain: Chain, path: Trajectory) -> Tensor:
    """a_1 ... a_K, (K, N, *shape)."""
    assert path.reward_gradient is not None
    mean = chain.mean(base, path.condition[path.index], find_sampler(host).guidance_scale)
    terminal = -path.lam * path.reward_gradient
    return lean_adjoint(mean, path.states, terminal, range(chain.steps))[0]

"""`EssCurves`: effective sample size over the updates, and along the paths of the trained model.

    over updates    of every rollout that carries weights, prompt by prompt, as it is trained on
    over time       log w_k = -log dP_theta/dP_base (X_0 ... X_k),      log w_K = lam r(X_K) - log dP_theta/dP_base

The partial weights say how far the model has left the base by step k; the reward at the end brings back what the
control was there for.  A curve that does not come back has a model that is not the tilt, and where it fell says at
which times the model moves most.  With few paths a prompt ESS is biased upwards; it is blind to modes never visited.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from ..chain import Chain, slices
from ..identities import ess
from ..interfaces import find_sampler
from ..trajectory import Trajectory
from .diagnostic import Diagnostic, per_prompt
from .pictures import EXACT, TUNED, tidy

__all__ = ["EssCurves", "partial_log_weights"]


class EssCurves(Diagnostic):
    """Draw the ESS over updates and over time: `ess.json`, `ess.png`.

    The curve over updates costs nothing: it is read off rollouts that have weights (Adjoint Matching with all steps
    supervised, regressions with path weights); it begins anew in a resumed fit. A look costs `samples` paths and one
    base evaluation a state. Chains without the control form have the curve over updates and the last weight alone.

    Args:
        samples: paths of a look.
        every_n_updates: see `Diagnostic`.
        prompts: see `Diagnostic`.
        micro_batch: see `Diagnostic`.
    """

    name: ClassVar[str] = "ess"

    def __init__(
        self,
        samples: int = 2000,
        every_n_updates: int | None = None,
        prompts: list[str] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(samples, every_n_updates, prompts, micro_batch)
        self._updates: list[int] = []
        self._ess: list[float] = []
        self._rollout = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an empty curve."""
        self._updates, self._ess, self._rollout = [], [], -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a fresh rollout's ESS down."""
        path = find_sampler(pl_module).trajectory
        good = path.weight > 0
        if path.log_w is not None and path.rollout != self._rollout and bool(good.any()):
            kept = path[good]
            assert kept.log_w is not None
            self._updates.append(trainer.global_step)
            self._ess.append(_mean_ess(kept.log_w, kept))
            self._rollout = path.rollout
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def look(self, host: Any) -> tuple[dict[str, Any], Figure]:
        """Both curves, and their picture."""
        sampler = find_sampler(host)
        chain = sampler.chain(host, count=False)
        numbers: dict[str, Any] = {"updates": self._updates, "ess": self._ess}
        if sampler.weighted and chain.noisy_steps:
            path = self.paths(host)
            if chain.control_form:
                parts = [_partial(host, chain, path[i]) for i in slices(len(path), self.micro_batch)]
                log_w = torch.cat(parts, 1).double().cpu()
            else:
                scale = sampler.guidance_scale
                log_w = chain.log_weights(host.predictor, path, path.lam, scale, self.micro_batch)[None].double().cpu()
            along = [_mean_ess(w, path) for w in log_w]
            numbers |= {"t": chain.t[-len(along) :].tolist(), "ess_over_time": along, "n": len(path)}
        return numbers, draw(numbers)


def partial_log_weights(chain: Chain, path: Trajectory, base_means: Tensor) -> Tensor:
    """The log w_k for k = 0 ... K, (K + 1, N): zero at first, and with `lam r` at the last alone.

    Args:
        chain: of the control form.
        path: N paths of the current model.
        base_means: the base's means at X_0 ... X_{K-1}, (K, N, *shape).
    """
    rows = [torch.zeros_like(path.reward)]
    for k in range(chain.steps):
        if chain.stds[k] == 0:
            rows.append(rows[-1])
            continue
        step = replace(chain, t=chain.t[k : k + 2])
        rows.append(rows[-1] - step.log_ratio(path.between(k, k + 1), lambda x, _, k=k: base_means[k]))  # type: ignore[misc]
    return torch.stack([*rows[:-1], rows[-1] + path.lam * path.reward])


def draw(found: dict[str, Any]) -> Figure:
    """ESS over updates, and over time.

    Args:
        found: as `ess.json` has it.
    """
    curves = [("updates", "ess", "update", "rollouts of training", TUNED)] if found["updates"] else []
    if "t" in found:
        curves.append(("t", "ess_over_time", "t  (noise 0, data 1)", "weights up to t, the reward at t = 1", EXACT))
    figure = Figure(figsize=(4.6 * max(len(curves), 1), 3.3), layout="constrained")
    for axis, (x, y, label, title, colour) in zip(
        figure.subplots(1, max(len(curves), 1), squeeze=False)[0], curves, strict=False
    ):
        axis.plot(found[x], found[y], color=colour, lw=1.2, marker="o" if len(found[x]) < 60 else None, ms=2.5)
        axis.set_ylim(0, 1.03)
        axis.set_xlabel(label)
        axis.set_ylabel("ESS")
        axis.set_title(title, fontsize=10)
        tidy(axis)
    return figure


@torch.no_grad()
def _partial(host: Any, chain: Chain, path: Trajectory) -> Tensor:
    with host.predictor.base() as base:
        mean = chain.mean(base, path.condition[path.index], find_sampler(host).guidance_scale)
        means = torch.stack([mean(path.states[k], k) for k in range(chain.steps)])
    return partial_log_weights(chain, path, means)


def _mean_ess(log_w: Tensor, path: Trajectory) -> float:
    """The mean over prompts."""
    values = [ess(log_w[i.to(log_w.device)]) for i in per_prompt(path)]
    return sum(values) / len(values)

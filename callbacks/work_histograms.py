"""`WorkHistograms`: log weights of forward and of backward paths, which cross at log Z (Crooks).

    forward    paths of the current model P_theta                    E[log w] = log Z - KL(P_theta | P*)      ELBO
    backward   X_1 ~ p*, noised by the base's own memoryless kernel  E[log w] = log Z + KL(P* | P_theta)      EUBO

    X_k | X_{k+1} ~ N( a X_{k+1}, (beta_k^2 - a^2 beta_{k+1}^2) I ),        a = alpha_k/alpha_{k+1}
    log w = lam r(X_K) - log dP_theta/dP_base

The densities of both histograms are equal at w = Z, and Bennett's ratio finds log Z from both (`identities.bounds`).

That kernel reverses the base's chain exactly for the exact steps of a Gaussian base; of `DDIM` to first order in the
step, and its deterministic last step is made by the base again, from X_{K-1}: the backward side then shares a bias that
more steps remove.  X_1 comes from a closed form where there is one, else from further paths of the model, resampled by
their weights: such ends see no mode that the model does not.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..chain import Chain, slices
from ..identities import Estimate, bennett, elbo, ess, eubo, log_partition, resample, stratified
from ..interfaces import find_sampler
from ..noise import keyed_normal_rows
from ..trajectory import Trajectory
from .diagnostic import Diagnostic, per_prompt
from .pictures import BASE, EXACT, TUNED, tidy
from .scoring import score_end_points
from .truth import truth_of

__all__ = ["WorkHistograms", "noised_back"]


class WorkHistograms(Diagnostic):
    """Histograms of the work and log Z from both sides: `work.json`, `work.png`.

    A look costs `samples` paths and their weights (one base evaluation a state) on the forward side, and on the
    backward side one evaluation of model and base a state, and as many paths again where ends must be resampled. Only
    chains of the control form with memoryless steps have a backward side; others are looked at forward alone.

    Args:
        samples: paths on either side.
        every_n_updates: see `Diagnostic`.
        prompts: see `Diagnostic`.
        micro_batch: see `Diagnostic`.
    """

    name: ClassVar[str] = "work"

    def __init__(
        self,
        samples: int = 2000,
        every_n_updates: int | None = None,
        prompts: list[str] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(samples, every_n_updates, prompts, micro_batch)

    def look(self, host: Any) -> tuple[dict[str, Any], Figure]:
        """The numbers of both sides, and their picture."""
        sampler, path = find_sampler(host), self.paths(host)
        chain = sampler.chain(host, count=False)
        if not sampler.weighted or not chain.noisy_steps:
            raise ValueError("WorkHistograms needs path weights: a chain with noise and sampler.base_last_step: true")
        forward = self._log_w(host, chain, path)
        groups = [forward[i] for i in per_prompt(path)]
        back: list[Tensor] = []
        truth, source = truth_of(host.predictor, host.reward, path.lam), None
        if chain.control_form and chain.transition.memoryless:
            ends, source = self._ends(host, chain, path, truth)
            noised = noised_back(host, chain, ends, self.micro_batch)
            backward = self._log_w(host, chain, noised)
            back = [backward[i] for i in per_prompt(noised)]
        numbers = numbers_of(groups, back) | {"ends": source, "exact": truth.log_z if truth else None}
        return numbers, draw(groups, back, numbers)

    def _log_w(self, host: Any, chain: Chain, path: Trajectory) -> Tensor:
        scale = find_sampler(host).guidance_scale
        return chain.log_weights(host.predictor, path, path.lam, scale, self.micro_batch).double().cpu()

    def _ends(self, host: Any, chain: Chain, path: Trajectory, truth: Any) -> tuple[Trajectory, str]:
        """Paths whose end points are samples of p*."""
        n, seed = len(path), find_sampler(host).seed
        reference = None if truth is None or path.prompts is not None else truth.reference(n, seed)
        if reference is not None:
            ends = reference[:n].to(path.end)
            return replace(path[: len(ends)], states=torch.cat([path.states[:-1, : len(ends)], ends[None]])), "exact"
        other = self.paths(host, number=1)
        log_w = self._log_w(host, chain, other)
        generator = torch.Generator().manual_seed(seed % 2**63)
        chosen = [i[resample(log_w[i], generator=generator)] for i in per_prompt(other)]
        return other[torch.cat(chosen)], "resampled"


@torch.no_grad()
def noised_back(host: Any, chain: Chain, ends: Trajectory, micro_batch: int | None = None) -> Trajectory:
    """Paths of the noising process from the end points of a record, with the noise that the current model would need.

    Args:
        host: a loss with its host.
        chain: memoryless, of the control form.
        ends: whose end points are noised, N of them.
        micro_batch: samples in one network call; None: all.
    """
    sampler, predictor, process, t = find_sampler(host), host.predictor, chain.process, chain.t
    n, shape = len(ends), predictor.state_shape
    eps = keyed_normal_rows(sampler.seed, "probes", 0, range(n), (chain.steps, *shape)).transpose(0, 1)
    eps = predictor.project(eps).to(ends.states)
    alpha, beta = process.alpha(t), process.beta(t)
    states = [ends.end]
    for k in reversed(range(chain.steps)):
        a = alpha[k] / alpha[k + 1]
        spread = (beta[k] ** 2 - a**2 * beta[k + 1] ** 2).clamp(min=0).sqrt()
        states.append(a.to(eps) * states[-1] + spread.to(eps) * eps[k])
    path = replace(ends, states=torch.stack(states[::-1]), reward_gradient=None, log_w=None)
    parts = [_reversed(host, chain, path[i]) for i in slices(n, micro_batch)]
    path = replace(path, states=torch.cat([p.states for p in parts], 1), noise=torch.cat([p.noise for p in parts], 1))
    return score_end_points(host, path, False, micro_batch)


def _reversed(host: Any, chain: Chain, path: Trajectory) -> Trajectory:
    """The noise `(X_{k+1} - m_k(X_k))/std_k`, and the base's own last state where a step has no noise."""
    condition, scale = path.condition[path.index], find_sampler(host).guidance_scale
    own, states, noise = chain.mean(host.predictor, condition, scale), path.states.clone(), torch.zeros_like(path.noise)
    for k, std in enumerate(chain.stds.tolist()):
        if std > 0:
            noise[k] = (states[k + 1] - own(states[k], k)) / std
        else:
            with host.predictor.base() as base:
                states[k + 1] = chain.mean(base, condition, scale)(states[k], k)
    return replace(path, states=states, noise=noise)


def numbers_of(forward: list[Tensor], backward: list[Tensor]) -> dict[str, Any]:
    """Bounds, log Z from the forward side and from both, and the ESS; prompts are the strata.

    Args:
        forward: log weights of each prompt's forward paths, (n,).
        backward: of its backward paths; empty where there is no backward side.
    """
    log_z = stratified([log_partition(a) for a in forward])
    found: dict[str, Any] = {
        "ess": sum(map(ess, forward)) / len(forward),
        "elbo": stratified([elbo(a) for a in forward]).as_dict(),
        "log_z_forward": log_z.as_dict(),
    }
    if backward:
        both: Estimate = stratified([bennett(a, b) for a, b in zip(forward, backward, strict=True)])
        found |= {"eubo": stratified([eubo(b) for b in backward]).as_dict(), "log_z_bennett": both.as_dict()}
        found["overlap"] = both.ess
    return found


def draw(forward: list[Tensor], backward: list[Tensor], found: dict[str, Any]) -> Figure:
    """Both histograms, the bounds, and where they cross; of several prompts each minus its own log Z.

    Where one side lies far outside the other a second panel shows all of it, with a logarithmic density.

    Args:
        forward: as in `numbers_of`.
        backward: likewise.
        found: what that returned, with `exact`.
    """
    shifts, several = [0.0] * len(forward), len(forward) > 1
    if several:
        pairs = zip(forward, backward, strict=True) if backward else None
        estimates = [bennett(a, b) for a, b in pairs] if pairs else [log_partition(a) for a in forward]
        shifts = [e.mean for e in estimates]
    sides = [torch.cat([v - s for v, s in zip(sets, shifts, strict=True)]) for sets in (forward, backward) if sets]
    ranges, far = _ranges(sides)
    figure = Figure(figsize=(9.6 if far else 6.8, 4.0), layout="constrained")
    axes = figure.subplots(1, len(ranges), squeeze=False)[0]
    shift = found.get("log_z_bennett", found["log_z_forward"])["mean"] if several else 0.0
    for axis, (low, high) in zip(axes, ranges, strict=True):
        _histograms(axis, sides, torch.linspace(low, high, 61, dtype=torch.float64), far and axis is axes[1])
        if found["exact"] is not None and not several:
            axis.axvline(found["exact"], color=BASE, alpha=0.6, lw=5, label="exact")
        best = ("log_z_bennett", "Bennett") if backward else ("log_z_forward", "log Z")
        lines = (("elbo", "ELBO", TUNED, "--"), ("eubo", "EUBO", EXACT, "-."), (*best, "black", "-"))
        for key, text, colour, line in lines:
            if key in found:
                axis.axvline(found[key]["mean"] - shift, color=colour, ls=line, lw=1.6, label=text)
        axis.set_xlim(low, high)
        tidy(axis)
    label = "log weight minus log Z of its prompt" if several else "log weight"
    axes[0].set_xlabel(label + ("  (the histograms cross at log Z)" if backward and not several else ""))
    axes[0].set_ylabel("density")
    if far:
        axes[1].set_xlabel(f"{label}, all of both sides")
        axes[1].set_ylabel("density, logarithmic")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside upper center", ncols=6)
    return figure


def _ranges(sides: list[Tensor]) -> tuple[list[tuple[float, float]], bool]:
    """What is shown of log weights: the bulk of all, or first that of the forward side where it is a sliver of all."""
    inner = torch.tensor([0.002, 0.998], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(sides)[:1_000_000], inner).tolist()
    near, end = torch.quantile(sides[0][:1_000_000], inner).tolist()
    if not high > low:
        return [(low - 0.5, low + 0.5)], False
    margin = (end - near) / 4
    if not 0 < end - near < (high - low) / 8:
        return [(low, high)], False
    return [(near - margin, end + margin), (low - (high - low) / 50, high)], True


def _histograms(axis: Axes, sides: list[Tensor], bins: Tensor, log: bool) -> None:
    """Densities of the whole of each side; forward filled and outlined, backward dashed."""
    width = float(bins[1] - bins[0])
    for value, colour, label, line in zip(sides, (TUNED, EXACT), ("forward", "backward"), ("-", "--"), strict=False):
        weights = torch.full_like(value, 1 / (len(value) * width)).numpy()
        data, edges = value.numpy(), bins.tolist()
        axis.hist(data, edges, weights=weights, color=colour, alpha=0.35, label=label, log=log)
        axis.hist(data, edges, weights=weights, color=colour, histtype="step", ls=line, lw=1.3, log=log)

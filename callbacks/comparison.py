"""The numbers of a report: base, tuned and exact, from the samples of each prompt.

For every prompt, base samples x_i of the very chain that is tuned give the exact tilt by reweighting,

    E*[r] = sum_i exp(lam r_i) r_i / sum_i exp(lam r_i),

and tuned paths, with weights log w = lam r - log dP_theta/dP_base, give ESS and log Z.  Prompts are the strata: numbers
are means over prompts, standard errors those of the samples (jackknife; `identities`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..identities import Estimate, expectation, log_partition, mean, stratified

__all__ = ["PromptSamples", "compare"]


@dataclass(frozen=True)
class PromptSamples:
    """What one model's samples of one prompt gave, on the CPU; n of them are good.

    Attributes:
        rewards: (n,), float64.
        log_w: log path weights, (n,), float64.
        judged: by each judge, (n,), float64.
        diversity: mean distance of two of them; NaN for fewer than two.
        shown: the first images in the order of their noise, bad ones white, (m, 3, H, W); or the good states, (n, d).
    """

    rewards: Tensor
    log_w: Tensor
    judged: dict[str, Tensor]
    diversity: float
    shown: Tensor


def compare(
    base: Sequence[PromptSamples], tuned: Sequence[PromptSamples], lam: float, weighted: bool
) -> dict[str, Any]:
    """The numbers of a report: base, tuned and exact, and how far apart they are.

    Args:
        base: for each prompt samples of the base.
        tuned: samples of the tuned model, on the same prompts.
        lam: multiplier of the tilt.
        weighted: whether the tuned paths' weights mean something; without, ESS and log Z are None.
    """
    exact = stratified([expectation(s.rewards, lam * s.rewards) for s in base])
    reward_base, reward_tuned = (stratified([mean(s.rewards) for s in samples]) for samples in (base, tuned))
    log_z = stratified([log_partition(s.log_w) for s in tuned]) if weighted else None
    way = exact.mean - reward_base.mean
    report: dict[str, Any] = {
        "lam": lam,
        "reward_base": reward_base.as_dict(),
        "reward_tuned": reward_tuned.as_dict(),
        "reward_exact": {**exact.as_dict(), "ess": exact.ess},
        "reward_base_std": float(torch.cat([s.rewards for s in base]).std()),
        "way": (reward_tuned.mean - reward_base.mean) / way if way else None,
        "ess": log_z.ess if log_z else None,
        "log_z": log_z.as_dict() if log_z else None,
        "log_z_base": stratified([log_partition(lam * s.rewards) for s in base]).as_dict(),
        "diversity_base": _diversity(base),
        "diversity_tuned": _diversity(tuned),
    }
    for name in base[0].judged:
        for kind, samples in (("base", base), ("tuned", tuned)):
            estimate = stratified([mean(s.judged[name]) for s in samples])
            report[f"{name}_{kind}"], report[f"{name}_{kind}_se"] = estimate.mean, estimate.se
    report["warnings"] = [_warning(n, e) for n, e in (("reward_exact", exact), ("log_z", log_z)) if _doubtful(e)]
    return report


def _diversity(samples: Sequence[PromptSamples]) -> float | None:
    """The mean over prompts with two good samples or more."""
    known = [s.diversity for s in samples if not math.isnan(s.diversity)]
    return sum(known) / len(known) if known else None


def _doubtful(estimate: Estimate | None) -> bool:
    return estimate is not None and not estimate.trustworthy


def _warning(name: str, estimate: Estimate | None) -> str:
    assert estimate is not None
    each = f", {estimate.smallest} of the rarest prompt" if estimate.smallest is not None else ""
    return (
        f"{name}: ESS {estimate.ess:.2f} of {estimate.n} samples{each}; below ESS .5, 1000 samples in all or 64 a "
        "prompt an interval of 1.96 se is too short"
    )

"""The figures of an evaluation: base, tuned and their difference, with errors that are clustered by prompt.

Prompts g = 1 ... G are the clusters, samples i of a prompt are paired by their noise.  Of any measure y

    base, tuned     mean of y_gi                     se: `identities.clustered`
    difference      mean of y_gi(tuned) - y_gi(base)    the same of the differences, in which a prompt's own level and
                                                       what the noise does to both cancel

A sample without a finite value is left out of a mean, and of a difference if either of its two is.  With one prompt,
or none, every sample is its own cluster, and the error is that of those samples alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..condition import quoted
from ..identities import Estimate, clustered

__all__ = ["Pairs", "figures"]

_KL = "KL of the laws of whole paths, tuned from base: mean over tuned paths of sum_k |u_k|^2 / 2, in nats"
_MOVED = "mean Euclidean distance of tuned and base sample from the same noise, in the space of "
_FEW = 10


@dataclass(frozen=True)
class Pairs:
    """Samples of base and tuned model on one prompt, from the same noise, on the CPU.

    Attributes:
        prompt: None for a density.
        rewards: base's and tuned model's by name, (2, n), float64; NaN where there is no finite value.
        diversity: mean pairwise distance of base's and tuned model's samples; NaN for fewer than two.
        moved: distance of the two samples of each noise, (n,); None where samples have no twin.
        kl: `sum_k |u_k|^2 / 2` of the tuned paths, (n,); None where the chain has none.
        images: base's and tuned model's first ones, (2, m, 3, H, W), uint8; None where none are shown.
        is_image: whether samples decode to images.
        refused: why a reward, by name, has nothing to say of this prompt.
    """

    prompt: str | None
    rewards: dict[str, Tensor]
    diversity: list[float]
    moved: Tensor | None
    kl: Tensor | None
    images: Tensor | None
    is_image: bool
    refused: dict[str, str]

    def __len__(self) -> int:
        return next(iter(self.rewards.values())).shape[1]


def figures(found: Sequence[Pairs], trained: str, space: str) -> dict[str, Any]:
    """The report, as `evaluation.json` has it.

    Args:
        found: all prompts.
        trained: name of the trained reward.
        space: in which diversity and distances were measured.

    Returns:
        "rewards" by name, "diversity" and "distance", each an estimate {mean, se, n}, of base, tuned and difference;
        a number that does not exist is None.
    """
    cluster = torch.cat([torch.full((len(pairs),), g) for g, pairs in enumerate(found)])
    if len(found) == 1 or found[0].prompt is None:
        cluster = torch.arange(len(cluster))
    rewards = {name: torch.cat([pairs.rewards[name] for pairs in found], 1) for name in found[0].rewards}
    diversity = torch.tensor([pairs.diversity for pairs in found], dtype=torch.float64).mT
    distance = {}
    for name, what, parts in (
        ("path_kl", _KL, [pairs.kl for pairs in found]),
        ("same_noise", _MOVED + space, [pairs.moved for pairs in found]),
    ):
        known = [part for part in parts if part is not None]
        distance[name] = {**_estimate(torch.cat(known), cluster), "what": what} if len(known) == len(parts) else None
    return {
        "prompts": 0 if found[0].prompt is None else len(found),
        "samples": len(cluster),
        "trained_reward": trained,
        "rewards": {name: _pair(values, cluster) for name, values in rewards.items()},
        "diversity": {
            **_pair(diversity, torch.arange(len(found))),
            "what": f"mean pairwise Euclidean distance of a prompt's samples, in the space of {space}",
        },
        "distance": distance,
        "warnings": _warnings(found, rewards),
    }


def _pair(values: Tensor, cluster: Tensor) -> dict[str, Any]:
    """Base, tuned, and difference of values (2, N)."""
    base, tuned = values
    return {
        "base": _estimate(base, cluster),
        "tuned": _estimate(tuned, cluster),
        "difference": _estimate(tuned - base, cluster),
    }


def _estimate(values: Tensor, cluster: Tensor) -> dict[str, float | int | None]:
    known = values.isfinite()
    found: Estimate = clustered(values[known], cluster[known])
    return {name: None if math.isnan(value) else value for name, value in found.as_dict().items()}


def _warnings(found: Sequence[Pairs], rewards: dict[str, Tensor]) -> list[str]:
    lines = []
    for name in rewards:
        refused = [pairs for pairs in found if name in pairs.refused]
        if refused:
            many = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
            lines.append(f"{name} has no value for {_about(refused[0])}{many}: {refused[0].refused[name]}")
        heard = [pairs for pairs in found if name not in pairs.refused]
        for kind, row in enumerate(("the base", "the tuned model")):
            counts = [int((~pairs.rewards[name][kind].isfinite()).sum()) for pairs in heard]
            if sum(counts):
                first = next(pairs for pairs, count in zip(heard, counts, strict=True) if count)
                of = f"{sum(counts)} of {sum(map(len, heard))} samples of {row}"
                lines.append(f"{name}: {of} have no finite value, the first of {_about(first)}; they are left out")
    if found[0].prompt is not None and len(found) == 1:
        lines.append("one prompt: the errors are those of its samples, and say nothing of other prompts")
    elif found[0].prompt is not None and len(found) < _FEW:
        lines.append(
            f"{len(found)} prompts are few: the errors themselves are rough, and intervals of 1.96 se too short"
        )
    return lines


def _about(pairs: Pairs) -> str:
    return "the density" if pairs.prompt is None else quoted(pairs.prompt)

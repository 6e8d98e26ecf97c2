"""Samples of base and tuned model from the same noise, and what judges say of them.

How far the tuned model went from its base is measured twice:

    path KL      KL(P_theta | P_base) = E_theta[ sum_k |u_k|^2 / 2 ],    u_k = (m_k - m_base,k) / std_k
    same noise   | f(x_tuned) - f(x_base) |,      f: an embedding, the decoded image, or the state

The first is the divergence of the laws of whole paths, an upper bound of that of the samples.  It needs a chain with
noise whose steps of std = 0 are the base's; of an ODE, a transport, or steered samples there is none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chain import evaluating, slices
from ..interfaces import ImageEmbedding, Reward, Sampler, find_sampler
from ..metrics import pairwise_diversity
from ..trajectory import Trajectory
from ..transition import control
from .evaluation_figures import Pairs
from .scoring import check_one_a_sample

__all__ = ["Judges", "path_kl"]


@dataclass(frozen=True)
class _Look:
    """One model's samples: rewards by name (n,), which are finite (n,), features (n, ...), the first images."""

    rewards: dict[str, Tensor]
    good: Tensor
    features: Tensor
    images: Tensor | None
    is_image: bool
    refused: dict[str, str]


@dataclass(frozen=True)
class Judges:
    """What is asked about samples beside the trained reward.

    Attributes:
        rewards: by name.
        embedding: of images; None: the images themselves.
        micro_batch: samples at once; None: all of a prompt.
    """

    rewards: dict[str, Reward]
    embedding: ImageEmbedding | None
    micro_batch: int | None

    @torch.no_grad()
    def pairs(self, host: Any, prompt: str | None, number: int, n: int, shown: int) -> Pairs:
        """`n` samples of both models from the same noise, judged.

        Args:
            host: what offers `predictor` and `reward`.
            prompt: None for a density.
            number: which noise of the stream "test".
            n: samples of either model.
            shown: images to keep.
        """
        sampler = find_sampler(host).variant()
        batch, each = (torch.zeros(n), 1) if prompt is None else ([prompt], n)
        looks, paths = [], []
        for base in (True, False):
            path = sampler.rollout(
                host, batch, stream="test", number=number, base=base, samples_per_condition=each, world=(1, 0),
                bad=[],  # the figures say which samples are bad
            )  # fmt: skip
            paths.append(path)
            looks.append(self._look(host, path, prompt, shown))
        one, two = looks
        moved = (two.features - one.features).flatten(1).norm(dim=1).double()
        kl = path_kl(host, sampler, paths[1], self.micro_batch)
        return Pairs(
            prompt=prompt,
            rewards={name: torch.stack([look.rewards[name] for look in looks]) for name in one.rewards},
            diversity=[float(pairwise_diversity(look.features[look.good])) for look in looks],
            # Steered particles were resampled: none of them has a twin.
            moved=torch.where(one.good & two.good, moved, torch.nan) if paths[1].steps else None,
            kl=None if kl is None else torch.where(two.good, kl.double().cpu(), torch.nan),
            images=None if one.images is None or two.images is None else torch.stack([one.images, two.images]),
            is_image=one.is_image,
            refused=one.refused | two.refused,
        )

    def _look(self, host: Any, path: Trajectory, prompt: str | None, shown: int) -> _Look:
        good = (path.weight > 0) & path.reward.isfinite()
        rewards = {name: torch.full((len(path),), torch.nan, dtype=torch.float64) for name in self.rewards}
        features: list[Tensor] = []
        kept: list[Tensor] = []
        refused: dict[str, str] = {}
        is_image = False
        for i in slices(len(path), self.micro_batch):
            images = host.predictor.decode(path.end[i])
            is_image = images.ndim == 4
            for name, reward in self.rewards.items():
                rewards[name][i] = _judge(name, reward, images, good[i], prompt, refused)
            embed = self.embedding.embed_images if is_image and self.embedding is not None else torch.Tensor.float
            features.append(embed(images).float().cpu())
            if is_image and i.start < shown:
                blank = torch.where(good[i, None, None, None], images, 1.0)[: shown - i.start]
                kept.append((blank.float().clamp(0, 1) * 255).round().byte().cpu())
        trained = torch.where(good, path.reward.double(), torch.nan).cpu()
        return _Look(
            {type(host.reward).__name__: trained, **rewards}, good.cpu(), torch.cat(features),
            torch.cat(kept) if kept else None, is_image, refused,
        )  # fmt: skip


def _judge(
    name: str, reward: Reward, images: Tensor, good: Tensor, prompt: str | None, refused: dict[str, str]
) -> Tensor:
    """The rewards of the good images, (n,), float64, on the CPU; NaN where there is none, and why in `refused`."""
    values = torch.full((len(images),), torch.nan, dtype=torch.float64)
    n = int(good.sum())
    try:
        score = reward.score(images[good], None if prompt is None else [prompt] * n) if n else torch.zeros(0)
    except ValueError as error:  # rewards refuse prompts that they cannot judge
        refused[name] = " ".join(str(error).split())
        return values
    check_one_a_sample(reward, score, n)
    score = score.double().cpu()
    values[good.cpu()] = torch.where(score.isfinite(), score, torch.nan)
    return values


@torch.no_grad()
def path_kl(host: Any, sampler: Sampler, path: Trajectory, micro_batch: int | None = None) -> Tensor | None:
    """`sum_k |u_k|^2 / 2` of each tuned path, (N,), by one evaluation of the base a state; None where it means nothing.

    Args:
        host: what offers the predictor that made the paths.
        sampler: of the paths.
        path: tuned paths.
        micro_batch: samples in one network call; None: all.
    """
    chain = sampler.chain(host, count=False)
    steps, stds = chain.noisy_steps, chain.stds
    if not (chain.control_form and sampler.weighted and steps and path.steps):
        return None
    totals = []
    with evaluating(host.predictor), host.predictor.base() as base:
        for i in slices(len(path), micro_batch):
            part = path[i]
            mean = chain.mean(base, part.condition[part.index], sampler.guidance_scale)
            total = torch.zeros_like(part.reward)
            for k in steps:
                std = stds[k].to(part.states)
                u = control(part.states[k + 1] - std * part.noise[k], mean(part.states[k], k), std)
                total += (u**2).flatten(1).sum(1) / 2
            totals.append(total)
    return torch.cat(totals)

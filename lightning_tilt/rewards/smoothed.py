"""A reward averaged over small changes of the image, so that its gradient is one of a neighbourhood, not of a point.

    r_s(x) = E_eps[ r(T(x) + sigma eps) ],      eps ~ N(0, I),   T a shift by a few pixels
    grad r_s = E_eps[ grad r(T(x) + sigma eps) ]        r_s = r + sigma^2/2 tr(Hessian r) + O(sigma^4)

The expectation is a mean over a fixed set of noises in antithetic pairs (eps, -eps), the same at every call and for
every sample, drawn from `seed`: the result is a function of the image, whose gradient is the gradient of its value,
and terms of odd order cancel exactly.  Networks that judge images react to patterns that nobody sees; a gradient
averaged over noise and shifts follows them less.

This is another reward, and the tilt is another one too: reports judge r_s.  To see r as well, give it to `TiltReport`
as a judge.  A call costs `samples` calls of the reward, and as many again in a backward.  Noisy images are not clipped
to [0, 1]: the clip would cut the gradient.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.noise import keyed_normal_rows, keyed_uniform_rows
from lightning_tilt.rewards.combined import Combined

__all__ = ["Smoothed"]


class Smoothed(Combined):
    """`E r(T(x) + sigma eps)` over a fixed set of noises and shifts.

    Args:
        reward: what is averaged.
        sigma: standard deviation of the noise, in units of the image (0 to 1).
        samples: noises, an even number: half of them are the negatives of the other half.
        shift: images are also shifted by up to so many pixels each way, their border repeated; 0: not at all.
        seed: key of the noises.

    Raises:
        ValueError: for a sigma below 0, an odd number of samples, or if neither noise nor shifts are asked for.
    """

    def __init__(self, reward: Reward, sigma: float = 0.05, samples: int = 4, shift: int = 0, seed: int = 0) -> None:
        super().__init__({"reward_smoothed": reward})
        if not 0 <= sigma < math.inf:
            raise ValueError(f"Smoothed: sigma is at least 0, not {sigma}")
        if samples < 2 or samples % 2:
            raise ValueError(f"Smoothed: samples are drawn in pairs: an even number, not {samples}")
        if shift < 0 or (shift == 0 and sigma == 0):
            raise ValueError(f"Smoothed: sigma {sigma} and shift {shift} smooth nothing; give one that is above 0")
        self.sigma, self.samples, self.shift, self.seed = sigma, samples, shift, seed

    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the noises, of the reward and of what it tells; see `Reward.measure`.

        Raises:
            ValueError: if shifts are asked for of states that are no images.
        """
        if self.shift and images.ndim != 4:
            raise ValueError(f"Smoothed: shift needs images (B, C, H, W), not {tuple(images.shape)}: use shift: 0")
        total, told = torch.zeros(()), dict[str, Tensor]()
        for n in range(self.samples):
            (r,), figures = self._once(images, prompts, n)
            total = total.to(r) + r / self.samples
            for name, value in figures.items():
                name = name.removeprefix("reward_smoothed/")
                told[name] = told.get(name, torch.zeros_like(value)) + value / self.samples
        return total, told

    def learn(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hand the reward its figures, which keep their own names here."""
        return self.rewards[0].learn(means)

    def _once(self, images: Tensor, prompts: Prompts, n: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The reward under the n-th noise; of a gradient only one noise's activations are held at a time."""

        def ask(x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
            return self.ask(self._changed(x, n), prompts)

        if not (torch.is_grad_enabled() and images.requires_grad):
            return ask(images)
        found: tuple[list[Tensor], dict[str, Tensor]] = checkpoint(ask, images, use_reentrant=False)
        return found

    def _changed(self, images: Tensor, n: int) -> Tensor:
        """The images (B, ...) with the n-th noise and shift; of a pair, 2j and 2j + 1, one is the other's negative."""
        sign, pair = (1 if n % 2 == 0 else -1), n // 2
        if self.shift:
            images = self._shifted(images, sign, pair)
        eps = keyed_normal_rows(self.seed, "smoothing", 0, [pair], images.shape[1:])[0]
        return images + sign * self.sigma * eps.to(images)

    def _shifted(self, images: Tensor, sign: int, pair: int) -> Tensor:
        s, (h, w) = self.shift, images.shape[-2:]
        u = keyed_uniform_rows(self.seed, "smoothing", 1, [2 * pair, 2 * pair + 1])
        down, right = (s + sign * int(v) for v in ((2 * s + 1) * u).floor() - s)
        return pad(images, (s, s, s, s), mode="replicate")[..., down : down + h, right : right + w]

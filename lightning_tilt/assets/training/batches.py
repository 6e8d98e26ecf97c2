"""What both diffusion models are trained on: scaled latents of shifted digits, and ever new ways to ask for them.

A batch is `(x1, prompts)`: `x1` of shape (B, 4, 8, 8), each with a random template of its class; a share `EMPTY` of the
prompts is "" for guidance, and a tenth each is capitalised or in capitals, so that the case does not matter.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..prompts import prompts_of
from .data import Digits, shift
from .vae import encode

__all__ = ["EMPTY", "LatentBatches", "ask"]

EMPTY = 0.1
"""Share of empty prompts, from which guidance learns what no prompt says."""

_PROMPTS = [prompts_of(digit) for digit in range(10)]


def ask(labels: Tensor, empty: float = EMPTY) -> list[str]:
    """A random prompt for each label, drawn from torch's global generator."""
    prompts = []
    for label, template, case, keep in zip(
        labels.tolist(), torch.rand(len(labels)).tolist(), torch.rand(len(labels)).tolist(),
        (torch.rand(len(labels)) >= empty).tolist(), strict=True,
    ):  # fmt: skip
        prompt = _PROMPTS[label][int(template * len(_PROMPTS[label]))]
        prompt = prompt.upper() if case < 0.1 else prompt.capitalize() if case < 0.2 else prompt
        prompts.append(prompt if keep else "")
    return prompts


class LatentBatches:
    """All training digits, as they are and `copies` times shifted by a pixel, encoded once."""

    def __init__(self, vae: AutoencoderKL, digits: Digits, copies: int = 4, held_out: bool = False) -> None:
        images, labels = (
            (digits.held_out_images, digits.held_out_labels) if held_out else (digits.images, digits.labels)
        )
        z = [encode(vae, images)] + [encode(vae, shift(images, 1)) for _ in range(copies)]
        self.x1 = (torch.cat(z) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        self.labels = labels.repeat(1 + copies)

    def draw(self, size: int, empty: float = EMPTY) -> tuple[Tensor, list[str]]:
        """A random batch of `size` latents with fresh prompts."""
        index = torch.randint(len(self.labels), (size,))
        return self.x1[index], ask(self.labels[index], empty)

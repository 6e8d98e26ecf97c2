"""A page of samples for the eye: one block a model, ten digits (columns) x ten draws (rows)."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

__all__ = ["grid", "save_page"]


def grid(images: Tensor, columns: int = 10, gap: int = 1) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], row after row, as one picture (3, H', W')."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    page = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 0.35)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        page[:, top : top + h, left : left + w] = image
    return page


def save_page(blocks: list[Tensor], path: Path) -> None:
    """Write blocks of 100 images beside each other as a greyscale PNG."""
    margin = torch.ones(3, grid(blocks[0]).shape[1], 8)
    page = torch.cat([part for block in blocks for part in (grid(block), margin)][:-1], dim=2)
    pixels = (page.mean(0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels, mode="L").save(path, optimize=True)

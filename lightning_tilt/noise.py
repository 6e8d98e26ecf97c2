"""Randomness that belongs to the sample, not to the process that draws it.

Every draw is keyed by (seed, stream, rollout, global number of the sample): the same samples on one process or on
sixty-four, whatever the micro-batches, and no call here disturbs torch's own generators.  NumPy's `SeedSequence`
hashes the key into a 128-bit state; torch's CPU generator keeps 32 bits of a seed, which collide after some ten
thousand samples.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Stream", "keyed_choice", "keyed_normal", "keyed_normal_rows", "keyed_uniform_rows"]

Stream = Literal[
    "train",
    "validate",
    "test",
    "predict",
    "steps",
    "report",
    "buffer",
    "times",
    "renoise",
    "probes",
    "resample",
    "steering",
    "smoothing",
]
"""What random numbers are for: those of two streams are independent."""
_STREAMS: dict[str, int] = {
    "train": 1, "validate": 2, "test": 3, "predict": 4, "steps": 5, "report": 6, "buffer": 7,
    "times": 8, "renoise": 9, "probes": 10, "resample": 11, "steering": 12, "smoothing": 13,
}  # fmt: skip


def _generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**63, _STREAMS[stream], *key])


def keyed_normal(seed: int, stream: Stream, rollout: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, one tensor of `shape` for each global sample number: (len(samples), *shape), float32.

    Example:
        >>> a = keyed_normal(0, "train", 3, [4, 5, 6], (2,))
        >>> b = keyed_normal(0, "train", 3, [6], (2,))
        >>> bool((a[2] == b[0]).all())
        True
    """
    draws = [_generator(seed, stream, rollout, i).standard_normal(tuple(shape), dtype=np.float32) for i in samples]
    return torch.from_numpy(np.stack(draws)) if draws else torch.empty(0, *shape)


def keyed_normal_rows(seed: int, stream: Stream, number: int, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Rows of one endless table of standard normal numbers: (len(rows), *shape), float32.

    For draws that are made anew at every update: one generator serves all rows, and a row depends on its number alone,
    not on which others are asked for.

    Example:
        >>> table = keyed_normal_rows(0, "renoise", 3, range(8), (2,))
        >>> bool((keyed_normal_rows(0, "renoise", 3, [6, 2], (2,)) == table[[6, 2]]).all())
        True
    """
    size = (max(rows, default=-1) + 1, *shape)
    table = torch.from_numpy(_generator(seed, stream, number).standard_normal(size, dtype=np.float32))
    return table[torch.as_tensor(rows, dtype=torch.long)]


def keyed_uniform_rows(seed: int, stream: Stream, number: int, rows: Sequence[int]) -> Tensor:
    """The same with uniform numbers in [0, 1): (len(rows),), float64."""
    table = torch.from_numpy(_generator(seed, stream, number).random(max(rows, default=-1) + 1))
    return table[torch.as_tensor(rows, dtype=torch.long)]


def keyed_choice(seed: int, stream: Stream, rollout: int, population: Sequence[int], size: int) -> list[int]:
    """`size` different members of `population`, increasing; every subset is equally likely."""
    return sorted(int(i) for i in _generator(seed, stream, rollout).choice(population, size, replace=False))

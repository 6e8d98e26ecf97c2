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

__all__ = ["Stream", "keyed_choice", "keyed_normal"]

Stream = Literal["train", "validate", "test", "predict", "steps", "report", "buffer"]
_STREAMS: dict[str, int] = {"train": 1, "validate": 2, "test": 3, "predict": 4, "steps": 5, "report": 6, "buffer": 7}


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


def keyed_choice(seed: int, stream: Stream, rollout: int, population: Sequence[int], size: int) -> list[int]:
    """`size` different members of `population`, increasing; every subset is equally likely."""
    return sorted(int(i) for i in _generator(seed, stream, rollout).choice(population, size, replace=False))

"""The states of all random generators that a training step can draw from, as plain data.

Draws of this package are keyed and need none of them; a user's dropout, augmentation or reward may.
"""

import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_states", "set_random_states"]


def random_states(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's, torch's and the device's generators, which load with `weights_only=True`."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """What `random_states` gave; a CUDA state is left out where there is no such device.

    Example:
        >>> states = random_states(torch.device("cpu"))
        >>> first = random.random(), float(np.random.rand()), float(torch.rand(()))
        >>> set_random_states(states, torch.device("cpu"))
        >>> first == (random.random(), float(np.random.rand()), float(torch.rand(())))
        True
    """
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)

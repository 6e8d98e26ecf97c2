"""Networks from their configurations alone: without weights (the meta device), or with random ones.

What a run needs in memory, and how fast it is, does not depend on what the weights are.  Inside `without_weights`
predictors, and rewards with `has_skeleton`, are built by their usual code at their real size, and read no weight:

    with without_weights("meta"):
        predictor = StableDiffusion("stable-diffusion-v1-5/stable-diffusion-v1-5")
        reward = HPSv2()
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["NoSkeleton", "skeleton_device", "without_weights"]

_DEVICE: ContextVar[torch.device | None] = ContextVar("skeleton_device", default=None)


class NoSkeleton(LookupError):
    """The configuration of a network is not known without its files."""


@contextmanager
def without_weights(device: str | torch.device = "meta") -> Iterator[None]:
    """Build networks from their configurations alone, for the length of a `with` block.

    Args:
        device: "meta" holds no numbers at all; on another one they are random.
    """
    token = _DEVICE.set(torch.device(device))
    try:
        yield
    finally:
        _DEVICE.reset(token)


def skeleton_device() -> torch.device | None:
    """Where skeletons are built, or None outside of `without_weights`."""
    return _DEVICE.get()

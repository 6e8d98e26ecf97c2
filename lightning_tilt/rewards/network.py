"""Rewards that are read off a frozen network: what all of them share.

    r(x_i, p_i) for i = 1..B, `micro_batch` rows at a time;    grad r by the chain rule, chunk by chunk

The rows do not know of each other, so chunks change no number.  With a gradient, more than one chunk is checkpointed:
only the images are kept, and each chunk's activations are computed again when its gradient is asked for, which costs
one more forward and bounds the memory by one chunk.

Networks are held in `dtype`; images are resized and normalised, and embeddings compared, in float32 at least.  bfloat16
halves the memory of a network; the gradient of a ViT-H/14 with random weights keeps a cosine of .9999 to float32.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.rewards.checks import one_prompt_an_image

__all__ = ["NetworkDtype", "NetworkReward", "network_dtype"]

NetworkDtype = Literal["float32", "bfloat16"]
"""Floating-point formats of a reward's network, by torch's names."""

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`.

    Raises:
        ValueError: if `name` is none of `NetworkDtype`.

    Example:
        >>> network_dtype("bfloat16")
        torch.bfloat16
    """
    if name not in _DTYPES:
        raise ValueError(f"a reward's dtype must be one of {', '.join(_DTYPES)}, not {name!r}")
    return _DTYPES[name]


class NetworkReward(Reward):
    """A reward of a frozen network; a subclass writes `score_chunk`, and `read` if it needs prompts.

    Args:
        micro_batch: images scored at a time; None: all of them.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if `micro_batch` is less than 1.
    """

    def __init__(self, *, micro_batch: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, or None for all images at once, not {micro_batch}")
        self.micro_batch = micro_batch

    @abstractmethod
    def score_chunk(self, images: Tensor, read: Tensor) -> Tensor:
        """The rewards of as many images as fit.

        Args:
            images: in [0, 1], (b, 3, H, W), float32 or float64.
            read: what `read` made of their prompts, (b, ...); of no width for a reward that needs none.

        Returns:
            (b,).
        """

    def read(self, prompts: list[str]) -> Tensor:
        """What is known once the prompts are: embeddings or tokens, (B, ...), without a gradient."""
        return torch.empty(len(prompts), 0)

    def blank(self, n: int) -> Tensor:
        """In place of what `read` makes of `n` prompts, where there is no text tower to read them."""
        return self.read([""] * n)

    def score(self, images: Tensor, prompts: Prompts = None) -> Tensor:
        """The rewards.

        Args:
            images: in [0, 1], (B, 3, H, W), any size.
            prompts: B strings, or None for a reward that needs none.

        Returns:
            (B,), in the dtype of the images.

        Raises:
            ValueError: if prompts are needed and there is not one an image.
        """
        asked = one_prompt_an_image(type(self).__name__, images, prompts) if self.needs_prompts else [""] * len(images)
        read = self.read(asked)
        return self._in_chunks(self.score_chunk, images, read).to(images.dtype)

    def score_blank(self, images: Tensor) -> Tensor:
        """As `score` of a batch of prompts that were read before; see `Reward.score_blank`."""
        return self._in_chunks(self.score_chunk, images, self.blank(len(images))).to(images.dtype)

    def _in_chunks(self, function: Callable[..., Tensor], images: Tensor, *beside: Tensor) -> Tensor:
        """`function(images, *beside)`, at most `micro_batch` rows at a time."""
        # Halves would round the resized image; what follows casts to the network's dtype itself.
        x = images if images.dtype in (torch.float32, torch.float64) else images.float()
        n = self.micro_batch or max(1, len(x))
        if len(x) <= n:
            return function(x, *beside)
        rows = [slice(i, i + n) for i in range(0, len(x), n)]
        chunks = [(x[r], *(b[r] for b in beside)) for r in rows]
        if not (torch.is_grad_enabled() and x.requires_grad):
            return torch.cat([function(*chunk) for chunk in chunks])
        # A frozen network draws nothing, so that there is no random state to keep.
        return torch.cat([checkpoint(function, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks])

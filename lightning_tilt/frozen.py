"""Frozen parts: used, moved with the device, but never trained, saved, or put in train mode.

A reward network, a VAE, a text encoder or the second copy of a network that serves as the base under full fine-tuning
is not part of what a run learns.  Held as an ordinary child module it would enter `state_dict()` (checkpoints of many
gigabytes), `parameters()` (optimisers, DDP and FSDP buckets) and `train()` (dropout in a reward).  `Frozen` keeps it
out of all three and still follows `.to(...)`.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

__all__ = ["Frozen"]

M = TypeVar("M", bound=nn.Module)


class Frozen(nn.Module, Generic[M]):
    """Hold `module` as a frozen part.

    Args:
        module: the network to hold; it is put in eval mode and its parameters stop requiring gradients.

    Example:
        >>> from torch import nn
        >>> host = nn.Sequential(nn.Linear(2, 2), Frozen(nn.Linear(2, 2)))
        >>> len(list(host.parameters())), len(host.state_dict())
        (2, 2)
        >>> host.train()[1].module.training
        False
    """

    def __init__(self, module: M) -> None:
        super().__init__()
        # The tuple hides the module from nn.Module's registration of children.
        self._held: tuple[M] = (module.requires_grad_(False).eval(),)

    @property
    def module(self) -> M:
        """The frozen network itself."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the frozen network; gradients still flow to its inputs."""
        return self.module(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen[M]":
        # `.to`, `.cuda`, `.double` arrive here; buffers and parameters of the held network follow.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.module._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> "Frozen[M]":
        """Do nothing to the held network: it stays in eval mode."""
        super().train(mode)
        return self

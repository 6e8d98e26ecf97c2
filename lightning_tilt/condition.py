"""What a predictor was told: a batch of conditions and the prompts they encode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Condition", "Prompts", "quoted"]

Prompts: TypeAlias = Sequence[str] | None
"""One prompt a sample, or None where there is nothing to condition on (densities)."""


@dataclass(frozen=True)
class Condition:
    """A batch of conditions: named tensors whose first dimension is the batch, and the prompts they encode.

    Attributes:
        tensors: what the network is given, each of shape (B, ...); empty for an unconditional model.
        prompts: the B strings, or None for an unconditional model.
        size: B.

    Example:
        >>> import torch
        >>> condition = Condition({"c": torch.arange(3.0)}, ["a", "b", "c"], 3)
        >>> condition[torch.tensor([2, 2, 0])].prompts
        ['c', 'c', 'a']
    """

    tensors: Mapping[str, Tensor]
    prompts: list[str] | None
    size: int

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.shape[0] != self.size:
                raise ValueError(f"condition {name!r} has shape {tuple(tensor.shape)}; its batch should be {self.size}")
        if self.prompts is not None and len(self.prompts) != self.size:
            raise ValueError(f"{len(self.prompts)} prompts were given for {self.size} conditions")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Tensor) -> "Condition":
        """The conditions at the integer positions `index` (n,), repeats allowed."""
        prompts = None if self.prompts is None else [self.prompts[i] for i in index.tolist()]
        tensors = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()}
        return Condition(tensors, prompts, len(index))

    @classmethod
    def cat(cls, conditions: Sequence["Condition"]) -> "Condition":
        """One batch of several, one after the other; their tensors have the same names and shapes.

        Raises:
            ValueError: if only some of them have prompts.
        """
        prompts: list[str] | None = None
        if any(c.prompts is not None for c in conditions):
            if any(c.prompts is None for c in conditions):
                raise ValueError("conditions with prompts and without cannot be one batch")
            prompts = [prompt for c in conditions for prompt in c.prompts or []]
        tensors = {name: torch.cat([c.tensors[name] for c in conditions]) for name in conditions[0].tensors}
        return cls(tensors, prompts, sum(c.size for c in conditions))

    def to(self, *args: Any, **kwargs: Any) -> "Condition":
        """The same conditions on another device or in another dtype (floating-point tensors only)."""

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = tensor.to(*args, **kwargs)
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        moved = {name: move(tensor) for name, tensor in self.tensors.items()}
        return Condition(moved, self.prompts, self.size)


def quoted(value: object, longest: int = 80) -> str:
    """A prompt, or what stands in its place, as messages name it: in quotes, at most `longest` characters.

    Example:
        >>> quoted("a seven"), len(quoted("seven" * 1000))
        ("'a seven'", 80)
    """
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."

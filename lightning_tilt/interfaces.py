"""The nouns that callbacks, losses, models and rewards share: `Condition`, `Predictor`, `Reward`.

This is the lowest room beside the mathematics: everybody may import it, it imports nobody else's room.

    Predictor   predict(x, t, condition) -> the network's output at the states x and the times t
    Reward      score(images, prompts)   -> r, one number a sample
    Condition   what a predictor was told (prompt embeddings), a batch of it

Time runs from noise `t = 0` to data `t = 1` everywhere; a predictor that speaks timesteps translates inside.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_tilt.process import PredictionType, Process

__all__ = ["Condition", "Predictor", "Prompts", "Reward"]

Prompts = Sequence[str] | None
"""One prompt a sample, or None where there is nothing to condition on (densities)."""


@dataclass(frozen=True)
class Condition:
    """A batch of conditions: named tensors whose first dimension is the batch, and the prompts they encode.

    Attributes:
        tensors: what the network is given, each of shape (B, ...); empty for an unconditional model.
        prompts: the B strings, or None for an unconditional model.
        size: B.

    Example:
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

    def to(self, *args: Any, **kwargs: Any) -> "Condition":
        """The same conditions on another device or in another dtype (floating-point tensors only)."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()}
        return Condition(moved, self.prompts, self.size)


class Predictor(nn.Module, ABC):
    """What predicts: a closed form, a small network, Stable Diffusion.

    A subclass sets the four attributes below, and says with `base()` what the untuned model is: the same network with
    its adapters off, a frozen copy, or a closed form.  `state_dict()` holds only what is trained (parameters that
    require a gradient), and loading asks for nothing else.

    Attributes:
        process: the interpolant that the model was trained with.
        prediction_type: what `predict` returns: "epsilon", "v_prediction", "sample" (x1_hat) or "velocity".
        state_shape: shape of one state, without the batch, e.g. (4, 64, 64) or (2,).
        backward_cost: forwards that the backward of one training pair costs: 2 for a full network, 1 for adapters.
    """

    process: Process
    prediction_type: PredictionType
    state_shape: tuple[int, ...]
    backward_cost: int = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_forgive_frozen)

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output of type `prediction_type`.

        Args:
            x: states, (B, *state_shape).
            t: process times in [0, 1), one a sample, (B,).
            condition: B conditions.

        Returns:
            (B, *state_shape), in the dtype of `x`.
        """

    @abstractmethod
    @contextmanager
    def base(self) -> Iterator["Predictor"]:
        """The untuned model, for the length of a `with` block; it carries no gradient to parameters."""

    def encode(self, prompts: Prompts, size: int) -> Condition:
        """Turn prompts into a batch of `size` conditions; "" is the unconditional prompt of guidance."""
        return Condition({}, None if prompts is None else list(prompts), size)

    def decode(self, x: Tensor) -> Tensor:
        """What the reward sees of the end points `x`: images in [0, 1] (B, 3, H, W), or the states themselves."""
        return x

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The trained parameters alone: the base is never written to a checkpoint."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        trained = self.trained_parameters()
        for key in [k for k in state if k.startswith(prefix) and k[len(prefix) :] not in trained]:
            del state[key]
        return state


def _forgive_frozen(module: nn.Module, incompatible: Any) -> None:
    """Drop the predictor's frozen names from the keys that a strict load would miss."""
    assert isinstance(module, Predictor)
    everything = set(nn.Module.state_dict(module)) - set(module.trained_parameters())
    # Keys carry the host's prefix ("predictor."), which this module cannot know: compare by the end of the name.
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not any(("." + key).endswith("." + name) for name in everything)
    ]


class Reward(Metric, ABC):
    """A reward `r(x)`: a differentiable `score` of images, and a torchmetrics `Metric` that averages it.

    A subclass writes one method.  Networks that it needs are held in `lightning_tilt.frozen.Frozen`, so that they are
    not trained, not saved, and move with the device.

    Traits:
        is_differentiable: `score` has a gradient with respect to the images.
        higher_is_better: always true: a reward is maximised.
        needs_prompts: `score` reads the prompts.

    Example:
        >>> class Brightness(Reward):
        ...     def score(self, images, prompts):
        ...         return images.flatten(1).mean(1)
        >>> reward = Brightness()
        >>> reward(torch.ones(2, 3, 4, 4), None)
        tensor(1.)
    """

    is_differentiable: ClassVar[bool] = True
    higher_is_better: ClassVar[bool] = True
    full_state_update: ClassVar[bool] = False
    needs_prompts: ClassVar[bool] = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """The rewards of a batch, one number a sample.

        Args:
            images: decoded images in [0, 1], (B, 3, H, W); for a density the states themselves, (B, *state_shape).
            prompts: the B prompts, or None.

        Returns:
            (B,); row i depends on row i alone.
        """

    def update(self, images: Tensor, prompts: Prompts = None) -> None:
        """Add a batch to the running mean (without gradient)."""
        rewards = self.score(images, prompts).detach()
        self.total += rewards.double().sum()
        self.count += rewards.numel()

    def compute(self) -> Tensor:
        """The mean reward of what `update` saw."""
        return (self.total / self.count).to(torch.get_default_dtype())

"""What is maximised: `Reward`, a differentiable `score` inside a torchmetrics `Metric`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_tilt.condition import Prompts
from lightning_tilt.interfaces.cited import Cited
from lightning_tilt.interfaces.predictor import Predictor

__all__ = ["ImageEmbedding", "Reward"]


class ImageEmbedding(ABC):
    """What embeds images, so that their diversity can be measured in its space."""

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of images in [0, 1] (B, 3, H, W)."""


class Reward(Metric, Cited, ABC):
    """A reward `r(x)`: a differentiable `score` of images, and a torchmetrics `Metric` that averages it.

    A subclass writes one method.  Networks that it needs are held in `lightning_tilt.frozen.Frozen`, so that they are
    not trained, not saved, and move with the device.

    Traits (class constants; a reward made of others derives its own from theirs):
        is_differentiable: `score` has a gradient with respect to the images.
        higher_is_better: always true: a reward is maximised.
        needs_prompts: `score` reads the prompts.
        sources: what to cite for it.
        learns: the reward itself changes during training (`learn`), so that rewards of one sample at two times differ.
        has_skeleton: inside `lightning_tilt.interfaces.skeleton.without_weights` it is built without reading weights or
            fetching anything, and all its networks are in `Frozen`: the estimate of memory counts it, and lists others.

    Example:
        >>> class Brightness(Reward):
        ...     def score(self, images, prompts):
        ...         return images.flatten(1).mean(1)
        >>> reward = Brightness()
        >>> reward(torch.ones(2, 3, 4, 4), None)
        tensor(1.)
    """

    is_differentiable = True
    higher_is_better = True
    full_state_update = False
    needs_prompts: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    has_skeleton: ClassVar[bool] = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def bind(self, predictor: Predictor) -> None:
        """Learn which model is tilted; called once at set-up.

        Only a density asks for it: its reward has the base's own density in it.
        """

    @abstractmethod
    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """The rewards of a batch, one number a sample.

        Args:
            images: decoded images in [0, 1], (B, 3, H, W); for a density the states themselves, (B, *state_shape).
            prompts: the B prompts, or None.

        Returns:
            (B,); row i depends on row i alone.
        """

    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
        """`score`, and what else there is to say of each sample, by name: the parts that a reward is made of.

        Returns:
            The rewards (B,), and further numbers (B,) without gradient, always under the same names; their means over a
            training rollout are logged as `train/<name>`.
        """
        return self.score(images, prompts), {}

    def score_blank(self, images: Tensor) -> Tensor:
        """`score` for what it needs in memory, not for its numbers: of a skeleton, whose tokenizer may be missing.

        Args:
            images: (B, 3, H, W).

        Returns:
            (B,), of no meaning.
        """
        return self.score(images, [""] * len(images) if self.needs_prompts else None)

    def learn(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take in a fresh training rollout; never called for validation, reports or predictions.

        Args:
            means: of what `measure` told, over the good samples of all processes, by name.

        Returns:
            What else should be logged as `train/<name>`.
        """
        return {}

    def update(self, images: Tensor, prompts: Prompts = None) -> None:
        """Add a batch to the running mean (without gradient)."""
        # Detached before, so that no activations are kept for a gradient that nobody asks for.
        rewards = self.score(images.detach(), prompts).detach()
        self.total += rewards.double().sum()
        self.count += rewards.numel()

    def compute(self) -> Tensor:
        """The mean reward of what `update` saw."""
        return (self.total / self.count).to(torch.get_default_dtype())

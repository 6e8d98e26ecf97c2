"""What every reward made of other rewards shares: traits derived from the parts, and everything passed on to them.

    r(x) = f(r_1(x), ..., r_n(x))

The parts are rewards of any kind, combined ones too.  A combination has a gradient if all of its parts have one, reads
prompts if one of them does, and learns if one of them does.  Their networks stay in `Frozen`: they move with the
combination and never enter its state dict, while what a part learns (the multiplier of a constraint) does.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_tilt.interfaces import Predictor, Prompts, Reward

__all__ = ["Combined", "distinct_names"]


class Combined(Reward):
    """Base of the combinations; a subclass gives `measure`, and asks its parts by `ask`.

    Args:
        parts: the rewards that it is made of, by the names under which their own figures are logged.

    Raises:
        TypeError: if a part is no reward.
    """

    def __init__(self, parts: Mapping[str, Reward]) -> None:
        super().__init__()
        for name, part in parts.items():
            if not isinstance(part, Reward):
                raise TypeError(f"{type(self).__name__} is made of rewards, and {name} is a {type(part).__name__}")
        self.names = list(parts)
        self.parts = nn.ModuleList(parts.values())

    @property
    def rewards(self) -> list[Reward]:
        """The parts."""
        return [part for part in self.parts if isinstance(part, Reward)]

    # Class constants in every other reward.
    @property
    def is_differentiable(self) -> bool:  # type: ignore[override]
        """Whether all parts have a gradient."""
        return all(part.is_differentiable for part in self.rewards)

    @property
    def needs_prompts(self) -> bool:  # type: ignore[override]
        """Whether one of the parts reads the prompts."""
        return any(part.needs_prompts for part in self.rewards)

    @property
    def learns(self) -> bool:  # type: ignore[override]
        """Whether one of the parts changes during training."""
        return any(part.learns for part in self.rewards)

    def bind(self, predictor: Predictor) -> None:
        """Tell every part which model is tilted."""
        for part in self.rewards:
            part.bind(predictor)

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        """The combination's rewards, (B,); see `measure`."""
        return self.measure(images, prompts)[0]

    @abstractmethod
    def measure(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
        """The rewards (B,), and what the parts gave; see `Reward.measure`."""

    def learn(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hand every part the figures that are its own."""
        logged: dict[str, Tensor] = {}
        for name, part in zip(self.names, self.rewards, strict=True):
            own = {key.removeprefix(f"{name}/"): mean for key, mean in means.items() if key.startswith(f"{name}/")}
            logged |= _below(name, part.learn(own))
        return logged

    def ask(self, images: Tensor, prompts: Prompts) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The rewards of all parts, (B,) each, and their own figures, by names that begin with the part's.

        Raises:
            ValueError: if a part does not return one number a sample.
            TypeError: if a part has no gradient though it says so: in a sum with others nobody would notice.
        """
        rewards: list[Tensor] = []
        figures: dict[str, Tensor] = {}
        for name, part in zip(self.names, self.rewards, strict=True):
            reward, own = part.measure(images, prompts)
            if reward.shape != (len(images),):
                raise ValueError(
                    f"{type(part).__name__}.score returned shape {tuple(reward.shape)} for {len(images)} samples; "
                    f"it should be ({len(images)},): one number a sample"
                )
            wanted = part.is_differentiable and images.requires_grad and torch.is_grad_enabled()
            if wanted and not reward.requires_grad:
                raise TypeError(
                    f"{type(part).__name__}.score has no gradient in the images although is_differentiable is True: "
                    "remove no_grad, detach or numpy from it, or set is_differentiable = False"
                )
            rewards.append(reward)
            figures |= _below(name, own)
        return rewards, figures


def distinct_names(rewards: Sequence[object]) -> list[str]:
    """A name for each: that of its class, and a number where there are several of one class.

    Example:
        >>> distinct_names([1, 2, "a"])
        ['int_1', 'int_2', 'str']
    """
    classes = [type(reward).__name__ for reward in rewards]
    return [name if classes.count(name) == 1 else f"{name}_{classes[: i + 1].count(name)}"
            for i, name in enumerate(classes)]  # fmt: skip


def _below(name: str, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in figures.items()}

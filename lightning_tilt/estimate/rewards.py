"""The networks of the rewards in a configuration: each reward is built by its usual code, without its weights.

A reward says itself whether that is possible (`has_skeleton`); one that does not is listed as not counted.  The text
towers' embeddings are made once a prompt: what passes through a reward's networks is what its gradient goes through.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_tilt.estimate.classes import class_of
from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces import Reward
from lightning_tilt.interfaces.skeleton import NoSkeleton, without_weights
from lightning_tilt.rewards.combined import Combined

__all__ = ["RewardNetwork", "find_rewards"]


@dataclass
class RewardNetwork:
    """A reward without weights, on the meta device.

    Attributes:
        name: of the reward.
        reward: with its networks.
    """

    name: str
    reward: Reward

    @property
    def networks(self) -> list[nn.Module]:
        """All that the reward holds in `Frozen`."""
        return [part.module for part in self.reward.modules() if isinstance(part, Frozen)]

    def score(self, images: Tensor) -> Tensor:
        """What the reward computes of images (B, 3, H, W)."""
        return self.reward.score_blank(images)


def find_rewards(config: Any, prefix: str = "") -> tuple[list[RewardNetwork], list[str]]:
    """All rewards in a part of a configuration, also inside of other rewards.

    Args:
        config: class paths and arguments, nested anyhow.
        prefix: put before their names.

    Returns:
        Those with networks, and why others are not counted: a line for each that cannot be built without its weights.

    Raises:
        FileNotFoundError: for a reward whose files are not where its arguments say.
        ValueError: for arguments that the reward refuses.
    """
    networks, unknown = [], []
    for path, arguments in _classes(config):
        kind = class_of({"class_path": path})
        if not issubclass(kind, Reward) or issubclass(kind, Combined):  # the parts of a combination come by themselves
            continue
        found = _build(prefix + kind.__name__, kind, arguments)
        if isinstance(found, str):
            unknown.append(found)
        elif found.networks:
            networks.append(found)
    return networks, unknown


def _build(name: str, kind: type[Reward], arguments: Mapping[str, Any]) -> RewardNetwork | str:
    """A reward without weights, or why that is not possible."""
    if not kind.has_skeleton or any(True for _ in _classes(arguments)):
        return f"{kind.__name__}, which cannot be built without weights"
    try:
        with without_weights("meta"):
            return RewardNetwork(name, kind(**arguments))
    except NoSkeleton as error:
        return str(error)


def _classes(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Paths and arguments of all classes in a configuration, outermost first."""
    if isinstance(config, Mapping):
        if "class_path" in config:
            arguments = config.get("init_args") or {}
            yield str(config["class_path"]), arguments
            yield from _classes(arguments)
        else:
            for value in config.values():
                yield from _classes(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _classes(value)

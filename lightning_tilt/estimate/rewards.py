"""The networks behind the rewards, by the rewards' names: what they weigh, and what their gradient needs.

All are vision transformers of CLIP's kind, whose image tower is what the gradient goes through; the text tower's
embeddings are made once a prompt.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tilt.estimate.settings import class_of
from lightning_tilt.interfaces import Reward

__all__ = ["RewardNetwork", "find_rewards"]

_TOWERS: dict[str, dict[str, dict[str, Any]]] = {
    "ViT-L/14": {
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
        },
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    },
    "ViT-H/14": {
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
        },
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    },
}
_DIMENSION = {"ViT-L/14": 768, "ViT-H/14": 1024}

# Which tower a reward has; CLIPScore has the one that its path names.
_REWARDS = {"HPSv2": "ViT-H/14", "PickScore": "ViT-H/14", "AestheticScore": "ViT-L/14"}
_PATHS = {
    "openai/clip-vit-large-patch14": "ViT-L/14",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H/14",
}
# Those without a network worth counting.
_WITHOUT = {"Ink", "JPEGCompressibility", "DigitClassifier", "DigitAccuracy"}


@dataclass
class RewardNetwork:
    """A CLIP on the meta device.

    Attributes:
        name: of the reward.
        network: its weights.
    """

    name: str
    network: nn.Module
    _size: int = field(default=224)

    def score(self, images: Tensor) -> Tensor:
        """What the reward computes of images (B, 3, H, W): resize, normalise, image tower."""
        model: Any = self.network
        small = nn.functional.interpolate(images, (self._size, self._size), mode="bicubic", antialias=True)
        pixels = ((small - 0.5) / 0.25).to(next(model.parameters()).dtype)
        features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return nn.functional.normalize(features, dim=1).sum(1).to(images.dtype)


def find_rewards(config: Any, prefix: str = "") -> tuple[list[RewardNetwork], list[str]]:
    """All rewards in a part of a configuration, also inside of other rewards.

    Args:
        config: class paths and arguments, nested anyhow.
        prefix: put before their names.

    Returns:
        Their networks, and the names of those that are not known here and so not counted.
    """
    networks, unknown = [], []
    for path, arguments in _classes(config):
        if not issubclass(class_of({"class_path": path}), Reward):
            continue
        name = path.rpartition(".")[2]
        tower = _tower(name, arguments)
        if tower is not None:
            networks.append(RewardNetwork(prefix + name, _build(tower, arguments), _image_size(tower)))
        elif name not in _WITHOUT and not any(True for _ in _classes(arguments)):
            unknown.append(name)
    return networks, unknown


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


def _tower(name: str, arguments: Mapping[str, Any]) -> Any:
    """The configuration of a reward's CLIP, or None."""
    if name in _REWARDS:
        return _REWARDS[name]
    if name != "CLIPScore":
        return None
    from lightning_tilt.assets import folder

    path = arguments.get("path")
    where = folder("digits-clip") if path is None else Path(str(path)).expanduser()
    return where if Path(where).is_dir() else _PATHS.get(str(path))


def _config(tower: Any) -> Any:
    from transformers import CLIPConfig

    if isinstance(tower, str):
        return CLIPConfig(**_TOWERS[tower], projection_dim=_DIMENSION[tower])
    return CLIPConfig.from_pretrained(tower)


def _image_size(tower: Any) -> int:
    return int(_config(tower).vision_config.image_size)


def _build(tower: Any, arguments: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPModel

    dtype = getattr(torch, str(arguments.get("dtype") or "float32"))
    with torch.device("meta"):
        network: nn.Module = CLIPModel(_config(tower)).to(dtype)
    return network.eval().requires_grad_(False)

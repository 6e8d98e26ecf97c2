"""CLIPs whose configurations come with the package, by their names on the Hub: built without fetching anything."""

from typing import Any

import torch
from torch import nn

from lightning_tilt.interfaces.skeleton import NoSkeleton
from lightning_tilt.rewards.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessing

__all__ = ["CLIP_NAME", "clip_skeleton", "known_clip", "vit_h_14"]

CLIP_NAME = "openai/clip-vit-large-patch14"
"""Hub name of OpenAI's CLIP ViT-L/14; its tokenizer is that of nearly every CLIP."""

_VIT_H_14 = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "yuvalkirstain/PickScore_v1")


def vit_h_14() -> Any:
    """CLIP ViT-H/14, a `CLIPConfig`."""
    from transformers import CLIPConfig

    shared = {"hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 1024}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, **shared}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14, **shared}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


def _vit_l_14() -> Any:
    from transformers import CLIPConfig

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "patch_size": 14}  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)


def known_clip(owner: str, name: str) -> tuple[Any, ImagePreprocessing]:
    """The `CLIPConfig` of a Hub name, and what that network does to images first.

    Args:
        owner: whose message it is.
        name: on the Hub.

    Raises:
        NoSkeleton: for a name that does not come with the package.
    """
    makers = {CLIP_NAME: _vit_l_14, **dict.fromkeys(_VIT_H_14, vit_h_14)}
    if name not in makers:
        raise NoSkeleton(f"{owner}, whose CLIP {name!r} is not known before it is fetched: give a folder that has it")
    config = makers[name]()
    size = config.vision_config.image_size
    return config, ImagePreprocessing(size, (size, size), CLIP_MEAN, CLIP_STD)


def clip_skeleton(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A `CLIPModel` without weights, in eval mode."""
    from transformers import CLIPModel

    with device:
        network: nn.Module = CLIPModel(config).to(dtype)
    return network.eval()

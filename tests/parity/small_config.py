"""A small network in open_clip's terms; it imports nothing, so that torchvision can be looked after first."""

from typing import Any

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
"""A ViT-H/14 of open_clip but for its size."""

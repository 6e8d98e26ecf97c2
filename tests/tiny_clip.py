"""A random CLIP of a few thousand weights, in the layout that `save_pretrained` writes."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny import LENGTH, clip_tokenizer

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "do_resize": True,
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def clip_model() -> Any:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    towers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    specials = {f"{name}_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>") for name in ("pad", "eos")}
    text = {**towers, **specials, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision = {**towers, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def save_clip(folder: Path) -> Path:
    clip_model().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder

"""Reward networks of a few thousand random weights, in files of the very layout that is published."""

from pathlib import Path
from typing import Any

import torch
from published_layouts import Shapes, head_shapes, image_reward_shapes, open_clip_shapes, random_weights
from tiny import LENGTH, clip_tokenizer

from lightning_tilt import rewards

HEADS = 2
HPS_FILE = "HPS_v2.1_compressed.pt"
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"


def hps_shapes() -> Shapes:
    return open_clip_shapes(16, 2, 12, 3, 8, image=16, patch=4, words=len(clip_tokenizer()), n=LENGTH)


def blip_shapes() -> Shapes:
    return image_reward_shapes(16, 2, 12, 3, image=16, patch=4, words=80, n=40)


class TinyHPSv2(rewards.HPSv2):
    """The real class but for the size of its network; a name of its own, since YAML knows classes by their names."""

    @staticmethod
    def configuration() -> Any:
        from transformers import CLIPConfig

        tokenizer = clip_tokenizer()
        shared = {"num_attention_heads": HEADS, "hidden_act": "gelu"}
        end = {f"{k}_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>") for k in ("pad", "eos", "bos")}
        text = {"hidden_size": 12, "intermediate_size": 48, "num_hidden_layers": 3, **shared, **end}
        text |= {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
        vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
        return CLIPConfig(text_config=text, vision_config=vision | shared, projection_dim=8)


class TinyImageReward(rewards.ImageReward):
    """The real class but for the size of its network; a name of its own, since YAML knows classes by their names."""

    @staticmethod
    def configurations() -> tuple[Any, Any]:
        vision, text = rewards.ImageReward.configurations()
        vision.update(
            {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS}
        )
        vision.update({"image_size": 16, "patch_size": 4})
        text.update({"hidden_size": 12, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": HEADS})
        text.update({"vocab_size": 80, "encoder_hidden_size": 16, "max_position_embeddings": 40})
        text.update({"bos_token_id": 1, "sep_token_id": 2})
        return vision, text


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def save_hps(folder: Path, name: str = HPS_FILE) -> Path:
    """The checkpoint as it is published, a half-precision pickle, and a tokenizer beside it."""
    state = {k: v.half() for k, v in random_weights(hps_shapes()).items()}
    torch.save({"epoch": 10, "name": "hps", "state_dict": state}, folder / name)
    clip_tokenizer().save_pretrained(folder)
    return folder


def save_image_reward(folder: Path) -> Path:
    torch.save(random_weights(blip_shapes()), folder / "ImageReward.pt")
    bert_tokenizer().save_pretrained(folder)
    return folder


def save_aesthetic(folder: Path, width: int = 8) -> Path:
    torch.save(random_weights(head_shapes("", width)), folder / AESTHETIC_FILE)
    return folder

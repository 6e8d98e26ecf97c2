"""HPSv2 at its real size, with random weights: 986 million of them are read, and bfloat16 keeps the gradient."""

import gc
from pathlib import Path

import pytest
import torch
from published_layouts import open_clip_shapes, random_weights

from lightning_tilt.rewards import HPSv2


def save_tokens(folder: Path) -> None:
    """CLIP's numbers for the specials, letters for the rest."""
    from transformers import CLIPTokenizer

    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {c: i for i, c in enumerate(letters)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)


@pytest.mark.slow
def test_bfloat16_keeps_the_gradient_at_the_real_size(tmp_path: Path) -> None:
    """With random weights, .9999; 10 GB of memory."""
    from sklearn.datasets import load_sample_image

    save_tokens(tmp_path)
    shapes = open_clip_shapes(1280, 32, 1024, 24, 1024, image=224, patch=14, words=49408, n=77)
    state = {k: v.half() for k, v in random_weights(shapes).items()}
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    del state
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    x = photograph[..., :384, :512].requires_grad_()
    gradients = []
    for dtype in ("float32", "bfloat16"):
        reward = HPSv2(path=str(tmp_path), tokenizer=str(tmp_path), dtype=dtype)  # type: ignore[arg-type]
        gradients.append(torch.autograd.grad(reward.score(x, ["a temple"]).sum(), x)[0].flatten())
        del reward
        gc.collect()
    cosine = float(torch.cosine_similarity(*gradients, dim=0))
    print(f"cosine of the bfloat16 gradient to the float32 one: {cosine:.4f}")
    assert cosine > 0.99

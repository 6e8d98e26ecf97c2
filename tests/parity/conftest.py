"""Comparisons with other people's packages: collected only where open_clip is installed (`make test-parity`)."""

import contextlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small_config import SMALL

INSTALLED = find_spec("open_clip") is not None
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

if INSTALLED:
    try:
        import torchvision
    except RuntimeError:
        # A torchvision built for CUDA cannot load its compiled operators beside a torch for the CPU, and then fails
        # to describe two of them, for object detection.  Declared here, they are never called; the transforms that
        # are compared with are plain Python.
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            # Those of its half-done import are declared already.
            with contextlib.suppress(RuntimeError):
                declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401

SIZES = [(512, 512), (512, 384), (300, 401), (224, 224), (128, 128)]


@pytest.fixture(scope="session")
def photographs() -> list[Any]:
    """Two photographs as PIL images, each in all the sizes."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [p.resize((width, height), Image.Resampling.LANCZOS) for p in whole for height, width in SIZES]


@pytest.fixture(scope="session")
def clip_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """CLIP's tokenizer in transformers' layout, of the vocabulary that open_clip carries."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    carried = SimpleTokenizer()
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {named.get(token, token): i for token, i in carried.encoder.items()}
    folder = tmp_path_factory.mktemp("clip_tokens")
    CLIPTokenizer(vocab=vocabulary, merges=list(carried.bpe_ranks), model_max_length=77).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of open_clip's own network of size `SMALL`, random weights, as HPSv2's are published."""
    from open_clip import CLIP

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    torch.save({"state_dict": CLIP(**SMALL).state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder

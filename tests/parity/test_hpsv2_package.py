"""HPSv2 against the hpsv2 package: images, tokens, scores; and the package's scorer as a reward."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_tester import CHECKS, RewardCase
from small_config import SMALL
from small_hps import HPSv2
from test_open_clip import PROMPTS, tensors

from lightning_tilt.rewards import HPSv2Package

pytest.importorskip("hpsv2", reason="the hpsv2 package is not installed")
# What hpsv2 calls by old names: https://github.com/tgxs002/HPSv2/tree/master/hpsv2
pytestmark = pytest.mark.filterwarnings(
    "ignore:Importing from timm.models.layers is deprecated:FutureWarning",
    "ignore:`torch.cuda.amp.autocast.* is deprecated:FutureWarning",
    "ignore:CUDA is not available or torch_xla is imported",
)


@pytest.fixture(scope="session")
def package(small: Path) -> Iterator[str]:
    """The package with a small network in place of its ViT-H/14, whose base weights it would fetch from the Hub.

    All else is its own: transform, tokens, loading of the checkpoint, score.
    """
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    create = img_score.create_model_and_transforms
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(factory._MODEL_CONFIGS, "ViT-H-14", SMALL)
        patch.setattr(img_score, "create_model_and_transforms", lambda name, _, **k: create(name, None, **k))
        patch.setattr(img_score, "model_dict", {})
        yield str(small)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_traits(check: Callable[[RewardCase], None], package: str) -> None:
    check(RewardCase(partial(HPSv2Package, path=package), (3, 40, 30), PROMPTS))


def test_the_package_s_score_is_that_of_hpsv2(package: str, clip_tokens: str, photographs: list[Any]) -> None:
    """Photographs have 256 levels already, so that nothing is rounded."""
    ours, theirs = HPSv2(path=package, tokenizer=clip_tokens), HPSv2Package(path=package)
    for x in tensors(photographs):
        x = x.expand(len(PROMPTS), -1, -1, -1)
        with torch.no_grad():
            torch.testing.assert_close(ours.score(x, PROMPTS), theirs.score(x, PROMPTS), rtol=0, atol=1e-6)


def test_images_are_shown_as_the_package_does(package: str, clip_tokens: str, photographs: list[Any]) -> None:
    from hpsv2.src.open_clip.transform import image_transform

    transform = image_transform(224, is_train=False, resize_longest_max=True)
    preprocess = HPSv2(path=package, tokenizer=clip_tokens).preprocess
    for picture, x in zip(photographs, tensors(photographs), strict=True):
        torch.testing.assert_close(preprocess(x)[0], transform(picture), rtol=0, atol=1e-6)


def test_tokens_are_those_of_the_package(clip_tokens: str) -> None:
    from hpsv2.src.open_clip import get_tokenizer
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(clip_tokens)
    theirs = get_tokenizer("ViT-H-14")(PROMPTS)
    tokens = ours(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]
    for mine, other in zip(tokens, theirs, strict=True):
        n = int(other.argmax()) + 1  # the end token; what fills the rest is never looked at
        assert mine[:n].tolist() == other[:n].tolist()


def test_rounding_to_256_levels_is_all_that_differs(package: str, clip_tokens: str) -> None:
    x = torch.rand(2, 3, 60, 80)
    rounded = (x * 255).round() / 255
    theirs, ours = HPSv2Package(path=package), HPSv2(path=package, tokenizer=clip_tokens)
    torch.testing.assert_close(theirs.score(x, ["a", "b"]), theirs.score(rounded, ["a", "b"]), rtol=0, atol=0)
    torch.testing.assert_close(theirs.score(x, ["a", "b"]), ours.score(rounded, ["a", "b"]), rtol=0, atol=1e-6)


def test_mistakes_are_one_line(package: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="HPSv2Package could not fetch HPS_v2_compressed"):
        HPSv2Package("2.0")
    with pytest.raises(FileNotFoundError, match="HPSv2Package found no file"):
        HPSv2Package(path=str(tmp_path))
    with pytest.raises(ValueError, match="has the sha256"):
        HPSv2Package(path=package, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"versions 2\.0 and 2\.1"):
        HPSv2Package(3)

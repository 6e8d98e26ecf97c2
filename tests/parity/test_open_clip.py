"""OpenCLIPScore and HPSv2 against open_clip's own networks, transforms and tokens."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import open_clip_shapes
from reward_tester import CHECKS, RewardCase
from small_config import SMALL
from small_hps import HPSv2

from lightning_tilt import rewards
from lightning_tilt.rewards import OpenCLIPScore
from lightning_tilt.rewards.open_clip_score import _preprocessing

PROMPTS = [
    "a photo of a temple",
    "Two  red FLOWERS, 8k!!",
    "naïve café — 漢字 🙂",
    "",
    "a very long prompt of many words " * 20,
]
LEVEL = 1 / 255 / 0.26
"""One of 256 levels, after CLIP's normalisation: what the image library rounds to."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, small: Path) -> tuple[str, str]:
    """The name of a small model that open_clip knows, and a file of its weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("configs")
    (folder / "small-hps.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder)
    return "small-hps", str(small / "HPS_v2.1_compressed.pt")


def tensors(pictures: list[Any]) -> list[torch.Tensor]:
    from torchvision.transforms.functional import to_tensor

    return [to_tensor(p)[None] for p in pictures]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_traits(check: Callable[[RewardCase], None], tiny: tuple[str, str]) -> None:
    check(RewardCase(partial(OpenCLIPScore, *tiny, micro_batch=2), (3, 40, 30), PROMPTS))


def test_the_score_is_that_of_open_clip_s_own_pipeline(tiny: tuple[str, str], photographs: list[Any]) -> None:
    """Its transform rounds to 256 levels, ours does not: the cosines agree to a few thousandths of their spread."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(tiny[0], tiny[1])
    model.eval()
    tokens = open_clip.get_tokenizer(tiny[0])(PROMPTS[:1])
    with torch.no_grad():
        f = model.encode_image(torch.stack([transform(p) for p in photographs]), normalize=True)
        expected = (f @ model.encode_text(tokens, normalize=True).mT)[:, 0]
        reward = OpenCLIPScore(*tiny)
        ours = torch.cat([reward.score(x, PROMPTS[:1]) for x in tensors(photographs)])
    assert (ours - expected).abs().max() < 1e-3
    exact = torch.cat([reward.network.module.encode_image(transform(p)[None]) for p in photographs])
    torch.testing.assert_close(torch.nn.functional.normalize(exact, dim=1), f)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_shown_as_open_clip_does(mode: str, interpolation: str, photographs: list[Any]) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(size=224, resize_mode=mode, interpolation=interpolation)
    transform = image_transform_v2(config, is_train=False)
    ours = _preprocessing("model", vars(config), True)
    for picture, x in zip(photographs, tensors(photographs), strict=True):
        expected, shown = transform(picture), ours(x)[0]
        # Rounded after each of two passes, and clipped where bicubic overshoots.
        inside = (expected - expected.amin()).abs() > 2 * LEVEL
        assert (shown - expected)[inside].abs().quantile(0.99) < 1.1 * LEVEL
        assert (shown - expected).abs().mean() < 0.5 * LEVEL


def test_shapes_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'model' its images.*longest.*fill colour 3"):
        _preprocessing("model", {"size": 8, "mean": (0,), "std": (1,), "resize_mode": "longest", "fill_color": 3}, True)
    with pytest.raises(ValueError, match="shortest edge to 8 x 4"):
        _preprocessing("model", {"size": (8, 4), "mean": (0,), "std": (1,)}, True)
    assert _preprocessing("m", {"size": (8, 4), "mean": (0,), "std": (1,), "resize_mode": "squash"}, True).size == (
        8,
        4,
    )


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [("ViT-B-33", "openai"), ("ViT-B-32", "nowhere"), ("ViT-B-32", None), ("ViT-B-32", "laion2b_e16")],
)
def test_what_open_clip_cannot_load_is_one_line(model: str, pretrained: str | None) -> None:
    with pytest.raises(ValueError, match=f"OpenCLIPScore could not load '{model}'") as caught:
        OpenCLIPScore(model, pretrained)
    assert "\n" not in str(caught.value)


def test_files_of_open_clip(tiny: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="OpenCLIPScore found no file"):
        OpenCLIPScore(tiny[0], str(tmp_path / "nothing.pt"))
    with pytest.raises(ValueError, match="sha256 is that of a file"):
        OpenCLIPScore("ViT-B-32", "openai", sha256="0" * 64)
    with pytest.raises(ValueError, match="has the sha256"):
        OpenCLIPScore(*tiny, sha256="0" * 64)
    torch.save({"state_dict": {}, "run": print}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="could not load"):
        OpenCLIPScore(tiny[0], str(tmp_path / "pickle.pt"))


def test_the_names_written_out_in_the_tests_are_open_clip_s() -> None:
    """At the real size, on the meta device."""
    import open_clip

    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    wanted = open_clip_shapes(1280, 32, 1024, 24, 1024, image=224, patch=14, words=49408, n=77)
    assert {k: tuple(v.shape) for k, v in state.items()} == wanted


def compare(kind: Any, model: Any, folder: Path, tokens: str, photographs: list[Any], tolerance: float) -> float:
    """HPSv2's towers, and its score, against open_clip's network with the same weights; the largest difference."""
    import open_clip

    reward = kind(path=str(folder), tokenizer=tokens)
    f = torch.nn.functional.normalize
    with torch.no_grad():
        words = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
        g = model.encode_text(words, normalize=True)
        largest = (reward.embed_prompts(PROMPTS) - g).abs().max()
        for x in tensors(photographs):
            seen = f(model.encode_image(reward.preprocess(x)), dim=1)
            scores = reward.score(x.expand(len(PROMPTS), -1, -1, -1), PROMPTS)
            largest = max(largest, (scores - (seen @ g.mT)[0]).abs().max())
    assert largest < tolerance
    return float(largest)


def test_hpsv2_is_open_clip_s_network(small: Path, clip_tokens: str, photographs: list[Any]) -> None:
    from open_clip import CLIP

    model = CLIP(**SMALL).eval()
    model.load_state_dict(torch.load(small / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"])
    compare(HPSv2, model, small, clip_tokens, photographs, 1e-6)


@pytest.mark.slow
def test_hpsv2_is_open_clip_s_vit_h_14(tmp_path: Path, clip_tokens: str, photographs: list[Any]) -> None:
    """986 million random weights twice: 8 GB of memory, 4 GB of disk."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-H-14").eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    difference = compare(rewards.HPSv2, model, tmp_path, clip_tokens, photographs[1:3], 1e-5)
    print(f"largest difference {difference:.1e}")

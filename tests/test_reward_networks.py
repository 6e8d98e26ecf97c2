"""Reward networks against the published layouts, written out in plain torch; their sizes; chunks and precision."""

from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import (
    Shapes,
    head,
    head_shapes,
    image_reward,
    image_reward_shapes,
    open_clip_image,
    open_clip_shapes,
    open_clip_text,
    random_weights,
)
from tiny import LENGTH, clip_tokenizer
from tiny_clip import save_clip
from tiny_rewards import (
    AESTHETIC_FILE,
    HEADS,
    TinyHPSv2,
    TinyImageReward,
    bert_tokenizer,
    blip_shapes,
    hps_shapes,
    save_aesthetic,
    save_hps,
    save_image_reward,
)
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_tilt import rewards
from lightning_tilt.rewards import AestheticScore, PickScore, Reward
from lightning_tilt.rewards.key_maps import blip_vision_to_transformers, open_clip_to_transformers
from lightning_tilt.rewards.preprocessing import CLIP_MEAN, CLIP_STD, ImagePreprocessing
from lightning_tilt.rewards.weights import only_prefixed

PROMPTS = ["3", "a cat", "", "much longer than eight tokens: the end token stays"]
SIZES = [(512, 512), (512, 384), (300, 401), (224, 224), (128, 128)]

VIT_H = open_clip_shapes(1280, 32, 1024, 24, 1024, image=224, patch=14, words=49408, n=77)
IMAGE_REWARD = image_reward_shapes(1024, 24, 768, 12, image=224, patch=16, words=30524, n=512)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., Reward]]:
    """Tiny rewards, each of files in its published layout."""
    hps, blip, clip = (tmp_path_factory.mktemp(n) for n in ("hps", "blip", "clip"))
    save_hps(hps)
    save_image_reward(blip)
    save_aesthetic(save_clip(clip))
    return {
        "HPSv2": partial(TinyHPSv2, path=str(hps), tokenizer=str(hps)),
        "ImageReward": partial(TinyImageReward, str(blip), tokenizer=str(blip)),
        "PickScore": partial(PickScore, str(clip)),
        "AestheticScore": partial(AestheticScore, str(clip), str(clip)),
    }


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def test_hpsv2_is_the_cosine_of_open_clip_s_towers(make: dict[str, Callable[..., Any]]) -> None:
    """In float64: the fused projection is split in the right order, matrices are turned, prompts are cut as CLIP's."""
    state = {k: v.half().double() for k, v in random_weights(hps_shapes()).items()}
    reward = make["HPSv2"]()
    reward.network.double()
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    tokens = clip_tokenizer()(PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    assert (tokens["input_ids"][:, -1] == clip_tokenizer().eos_token_id).all()
    f = open_clip_image(state, normalised(x), HEADS)
    g = open_clip_text(state, tokens["input_ids"], HEADS)
    torch.testing.assert_close(reward.score(x, PROMPTS), torch.cosine_similarity(f, g), rtol=0, atol=1e-12)


def test_image_reward_is_blip_and_its_head(make: dict[str, Callable[..., Any]]) -> None:
    state = {k: v if v.dtype == torch.long else v.double() for k, v in random_weights(blip_shapes()).items()}
    reward = make["ImageReward"]().to(torch.float64)
    for part in (reward.vision, reward.text, reward.head):
        part.double()
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    tokens = bert_tokenizer()(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    expected = image_reward(state, normalised(x), tokens["input_ids"], tokens["attention_mask"], HEADS, HEADS)
    assert expected.std() > 0.01
    torch.testing.assert_close(reward.score(x, PROMPTS), expected, rtol=0, atol=1e-12)


def test_aesthetic_score_is_the_head_on_the_unit_embedding(make: dict[str, Callable[..., Any]]) -> None:
    reward, x = make["AestheticScore"](), torch.rand(4, 3, 16, 16)
    expected = head(random_weights(head_shapes("", 8)), "", reward.embed_images(x))
    torch.testing.assert_close(reward.score(x, None), expected)
    torch.testing.assert_close(reward.embed_images(x).norm(dim=1), torch.ones(4))


def test_pick_score_is_the_scaled_cosine(make: dict[str, Callable[..., Any]]) -> None:
    reward, x = make["PickScore"](), torch.rand(4, 3, 16, 16)
    cosine = (reward.embed_images(x) * reward.embed_prompts(PROMPTS)).sum(1)
    s = reward.network.module.logit_scale
    assert s == pytest.approx(2.6592)  # where CLIP begins; the trained one is ln 100
    torch.testing.assert_close(reward.score(x, PROMPTS), s.exp() * cosine)


@pytest.mark.parametrize("shapes", [VIT_H, hps_shapes()], ids=["ViT-H/14", "tiny"])
def test_the_key_map_of_open_clip_is_complete(shapes: Shapes) -> None:
    """Every name of a CLIPModel is met once, in its shape, and none is left over; nothing is allocated."""
    from transformers import CLIPModel

    kind = rewards.HPSv2 if shapes is VIT_H else TinyHPSv2
    with torch.device("meta"):
        wanted = CLIPModel(kind.configuration()).state_dict()
        mapped = open_clip_to_transformers({k: torch.empty(v) for k, v in shapes.items()})
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in wanted.items()}
    assert all(v.is_contiguous() for v in mapped.values())


def test_the_key_map_of_image_reward_is_complete() -> None:
    from transformers import BlipTextModel, BlipVisionModel

    vision, text = rewards.ImageReward.configurations()
    with torch.device("meta"):
        state = {k: torch.empty(v) for k, v in IMAGE_REWARD.items()}
        see, told = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    mapped = blip_vision_to_transformers(only_prefixed(state, "blip.visual_encoder."))
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in see.state_dict().items()}
    read = only_prefixed(state, "blip.text_encoder.")
    del read["embeddings.position_ids"]
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in told.state_dict().items()}
    prefixes = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    assert all(k.startswith(prefixes) for k in state)
    assert sum(p.numel() for p in see.parameters()) == 303_301_632
    assert sum(p.numel() for p in told.parameters()) == 141_977_088


def test_the_real_sizes() -> None:
    assert sum(map(prod, VIT_H.values())) == 986_109_441
    assert len(VIT_H) == 56 * 12 + 3 * 2 + 8  # blocks, norms, and single weights
    from transformers import CLIPModel

    with torch.device("meta"):
        assert sum(p.numel() for p in CLIPModel(rewards.HPSv2.configuration()).parameters()) == 986_109_441


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("antialias", [True, False])
def test_the_longest_side_is_resized_and_zeros_fill_the_square(height: int, width: int, antialias: bool) -> None:
    x = torch.rand(2, 3, height, width)
    shown = ImagePreprocessing(224, None, CLIP_MEAN, CLIP_STD, antialias=antialias, fit="longest")(x)
    h, w = {(512, 384): (224, 168), (300, 401): (168, 224)}.get((height, width), (224, 224))
    expected = torch.zeros(2, 3, 224, 224)
    top, left = (224 - h) // 2, (224 - w) // 2
    small = x if (h, w) == (height, width) else interpolate(
        x, (h, w), mode="bicubic", align_corners=False, antialias=antialias
    )  # fmt: skip
    expected[:, :, top : top + h, left : left + w] = small
    torch.testing.assert_close(shown, normalised(expected))


@pytest.mark.parametrize(("height", "width"), [(512, 512), (512, 384), (300, 401), (224, 224), (128, 128)])
@pytest.mark.parametrize("fit", ["longest", "shortest"])
def test_the_gradient_passes_the_preprocessing(fit: Any, height: int, width: int) -> None:
    """It is linear but for the mean, so that finite differences of any step are exact; float64."""
    crop = None if fit == "longest" else (224, 224)
    preprocess = ImagePreprocessing(224, crop, CLIP_MEAN, CLIP_STD, fit=fit, odd="even")
    x, v = torch.rand(2, 1, 3, height, width, dtype=torch.float64)
    weights = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((preprocess(x.requires_grad_()) * weights).sum(), x)
    with torch.no_grad():
        expected = ((preprocess(x + v) - preprocess(x)) * weights).sum()
    torch.testing.assert_close((gradient * v).sum(), expected, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_the_preprocessing() -> None:
    x = torch.rand(1, 1, 7, 5, dtype=torch.float64, requires_grad=True)
    for fit, crop in (("longest", None), ("shortest", (6, 6))):
        preprocess = ImagePreprocessing(6, crop, (0.5,), (0.25,), fit=fit)  # type: ignore[arg-type]
        assert torch.autograd.gradcheck(preprocess, x)


def test_an_odd_margin_is_halved_as_each_library_does() -> None:
    x = torch.arange(7.0).expand(1, 1, 4, 7)
    middle = {odd: ImagePreprocessing(None, (4, 4), (0.0,), (1.0,), odd=odd)(x)[0, 0, 0] for odd in ("down", "even")}  # type: ignore[arg-type]
    assert middle["down"].tolist() == [1, 2, 3, 4] and middle["even"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("name", ["HPSv2", "ImageReward", "PickScore", "AestheticScore"])
@pytest.mark.parametrize("micro_batch", [1, 3, 9])
def test_chunks_change_neither_value_nor_gradient(
    name: str, micro_batch: int, make: dict[str, Callable[..., Any]]
) -> None:
    x = torch.rand(4, 3, 20, 28, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    whole, chunked = make[name](), make[name](micro_batch=micro_batch)
    values, gradients = [], []
    for reward in (whole, chunked):
        values.append(reward.score(x, PROMPTS))
        gradients.append(torch.autograd.grad(weights @ values[-1], x)[0])
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().sum() > 0


def test_only_one_chunk_s_activations_are_kept(make: dict[str, Callable[..., Any]]) -> None:
    """What autograd saves until the backward: all activations of one chunk, but only the images of several."""

    def saved(**options: Any) -> int:
        reward, x, sizes = make["HPSv2"](**options), torch.rand(4, 3, 16, 16, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            reward.score(x, PROMPTS)
        return sum(sizes)

    assert saved(micro_batch=1) < saved() / 10


def test_no_gradient_is_prepared_where_none_is_asked_for(make: dict[str, Callable[..., Any]]) -> None:
    """`reward(images, prompts)` of torchmetrics enables gradients; images that need one leave nothing behind."""
    reward, x, seen = make["HPSv2"](micro_batch=2), torch.rand(4, 3, 16, 16, requires_grad=True), []
    score = reward.score_chunk
    reward.score_chunk = lambda images, g: seen.append(images.requires_grad) or score(images, g)
    assert not reward(x, PROMPTS).requires_grad
    assert seen == [False, False]


@pytest.mark.parametrize("name", ["HPSv2", "ImageReward", "PickScore", "AestheticScore"])
def test_bfloat16_is_an_option(name: str, make: dict[str, Callable[..., Any]]) -> None:
    x = torch.rand(4, 3, 20, 28, requires_grad=True)
    gradients, values = [], []
    for dtype in ("float32", "bfloat16"):
        reward = make[name](dtype=dtype)
        values.append(reward.score(x, PROMPTS))
        gradients.append(torch.autograd.grad(values[-1].sum(), x)[0].flatten())
    assert values[1].dtype == torch.float32 and not torch.equal(*values)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert reward.score(x.detach().bfloat16(), PROMPTS).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"micro_batch": 0}, {"dtype": "float16"}])
def test_options_out_of_range_are_refused(options: dict[str, Any], make: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(ValueError, match=f"^(a reward's )?{next(iter(options))} must be"):
        make["HPSv2"](**options)


def test_versions(tmp_path: Path) -> None:
    """A number does as well as a string; each version looks for its own file."""
    save_hps(tmp_path, "HPS_v2_compressed.pt")
    assert TinyHPSv2(2.0, str(tmp_path), str(tmp_path)).version == "2.0"
    with pytest.raises(FileNotFoundError, match=r"HPS_v2\.1_compressed"):
        TinyHPSv2("2.1", str(tmp_path), str(tmp_path))
    with pytest.raises(ValueError, match=r"2\.0 and 2\.1, not '3'"):
        TinyHPSv2("3", str(tmp_path), str(tmp_path))  # type: ignore[arg-type]


def test_the_head_s_checkpoint_is_found_in_a_folder_under_its_published_name(tmp_path: Path) -> None:
    save_aesthetic(save_clip(tmp_path))
    assert (tmp_path / AESTHETIC_FILE).is_file()
    x = torch.rand(1, 3, 16, 16)
    by_folder, by_file = (AestheticScore(str(p), str(tmp_path)) for p in (tmp_path, tmp_path / AESTHETIC_FILE))
    assert torch.equal(by_folder.score(x), by_file.score(x))

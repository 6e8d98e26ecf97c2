"""Every exported reward keeps its promises, and each gives the number that its page says."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from reward_tester import CHECKS, RewardCase
from tiny_clip import PREPROCESSOR, clip_model, clip_tokenizer, save_clip
from tiny_rewards import TinyHPSv2, TinyImageReward, save_aesthetic, save_hps, save_image_reward

from lightning_tilt import rewards
from lightning_tilt.models.digit_cnn import DigitCNN
from lightning_tilt.rewards import (
    AestheticScore,
    Clamped,
    CLIPScore,
    Constraint,
    DigitAccuracy,
    DigitClassifier,
    Ink,
    JPEGCompressibility,
    LinearReward,
    PickScore,
    QuadraticReward,
    Reward,
    Smoothed,
    WeightedSum,
)
from lightning_tilt.rewards.preprocessing import ImagePreprocessing

# What needs an extra goes through the same checks in tests/parity.
WITH_EXTRAS = {"OpenCLIPScore", "HPSv2Package"}
EXPORTED = {n for n in rewards.__all__ if issubclass(getattr(rewards, n), Reward)} - {"Reward"} - WITH_EXTRAS
PROMPTS = ["3", "seven", "8", "a 0", "one"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.manual_seed(0)
    cnn, clip = tmp_path_factory.mktemp("cnn"), tmp_path_factory.mktemp("clip")
    DigitCNN(channels=(8, 8, 8, 8)).save_pretrained(cnn)
    hps, blip = tmp_path_factory.mktemp("hps"), tmp_path_factory.mktemp("blip")
    save_aesthetic(save_clip(clip))
    return {"cnn": str(cnn), "clip": str(clip), "hps": str(save_hps(hps)), "blip": str(save_image_reward(blip))}


@pytest.fixture(scope="module")
def cases(folders: dict[str, str]) -> dict[str, RewardCase]:
    matrix = [[2.0, 0.5], [0.5, 1.0]]
    accuracy = RewardCase(partial(DigitAccuracy, folders["cnn"]), (3, 32, 32), PROMPTS)
    classifier, size = partial(DigitClassifier, folders["cnn"]), (3, 32, 32)
    read = DigitClassifier(folders["cnn"]).log_probabilities(accuracy.images()).argmax(1).tolist()
    return {
        # Every other prompt asks for what the random network happens to read.
        "DigitAccuracy": replace(accuracy, prompts=[str((digit + i % 2) % 10) for i, digit in enumerate(read)]),
        "Ink": RewardCase(Ink, (3, 8, 8), PROMPTS),
        "DigitClassifier": RewardCase(partial(DigitClassifier, folders["cnn"]), (3, 32, 32), PROMPTS),
        # Neither square nor of the tower's size: resize and crop have work to do.
        "CLIPScore": RewardCase(partial(CLIPScore, folders["clip"]), (3, 28, 20), PROMPTS),
        "PickScore": RewardCase(partial(PickScore, folders["clip"]), (3, 28, 20), PROMPTS),
        "AestheticScore": RewardCase(partial(AestheticScore, folders["clip"], folders["clip"]), (3, 28, 20), PROMPTS),
        # Chunks of two, two and one.
        "HPSv2": RewardCase(
            partial(TinyHPSv2, path=folders["hps"], tokenizer=folders["hps"], micro_batch=2), (3, 28, 20), PROMPTS
        ),
        "ImageReward": RewardCase(
            partial(TinyImageReward, folders["blip"], folders["blip"], micro_batch=2), (3, 28, 20), PROMPTS
        ),
        "LinearReward": RewardCase(partial(LinearReward, [1.0, -2.0]), (2,), PROMPTS),
        "QuadraticReward": RewardCase(partial(QuadraticReward, matrix, [0.0, 1.0]), (2,), PROMPTS),
        "JPEGCompressibility": RewardCase(JPEGCompressibility, (3, 16, 16), PROMPTS),
        "WeightedSum": RewardCase(lambda: WeightedSum([Ink(), classifier(), Ink()], [1.0, -0.5, 2.0]), size, PROMPTS),
        "Clamped": RewardCase(lambda: Clamped(Ink(), max=0.4, min=0.3, softness=0.1), (3, 8, 8), PROMPTS),
        "Constraint": RewardCase(
            lambda: Constraint(Ink(), Smoothed(classifier(), samples=2), at_least=-1.0, start=0.5),
            size,
            PROMPTS,
            saved=frozenset({"multiplier"}),
        ),
        "Smoothed": RewardCase(
            lambda: Smoothed(Constraint(classifier(), Ink(), at_least=0.1, start=2.0), shift=2),
            size,
            PROMPTS,
            saved=frozenset({"parts.0.multiplier"}),
        ),
    }


@pytest.mark.parametrize("name", sorted(EXPORTED))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_traits(name: str, check: Callable[[RewardCase], None], cases: dict[str, RewardCase]) -> None:
    check(cases[name])


def test_the_tester_sees_a_reward_that_breaks_its_promises() -> None:
    class Ranked(Reward):
        """Rows depend on each other."""

        def score(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
            return images.flatten(1).mean(1) - images.mean()

    class Rounded(Reward):
        """The gradient is not that of the value."""

        def score(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
            mean = images.flatten(1).mean(1)
            return mean + (mean**2).detach()

    checks = {check.__name__: check for check in CHECKS}
    with pytest.raises(AssertionError):
        checks["check_rows_are_independent"](RewardCase(Ranked, (3, 4, 4), PROMPTS))
    with pytest.raises(AssertionError):
        checks["check_gradient"](RewardCase(Rounded, (3, 4, 4), PROMPTS))


def test_digit_classifier_is_the_log_probability(folders: dict[str, str]) -> None:
    x = torch.rand(2, 3, 32, 32)
    logits = DigitCNN.from_pretrained(folders["cnn"])(x)
    score = DigitClassifier(folders["cnn"]).score(x, ["a handwritten seven", "the digit 2"])
    expected = torch.stack([logits[0].softmax(0)[7].log(), logits[1].softmax(0)[2].log()])
    torch.testing.assert_close(score, expected)


def test_digit_accuracy_counts_what_is_read_as_asked(cases: dict[str, RewardCase]) -> None:
    case = cases["DigitAccuracy"]
    assert case.make().score(case.images(), case.prompts).tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("prompt", ["", "a horse", "3 or 4"])
def test_digit_classifier_names_the_prompt_without_a_digit(prompt: str, folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"the prompt {prompt!r} asks for"):
        DigitClassifier(folders["cnn"]).score(torch.rand(2, 3, 32, 32), ["seven", prompt])


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_clip_score_is_the_scaled_cosine_of_the_model_itself(scale: float, folders: dict[str, str]) -> None:
    x = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(PREPROCESSOR[f"image_{k}"])[:, None, None] for k in ("mean", "std"))
    tokens = clip_tokenizer()(["3", "seven"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip_model()(**tokens, pixel_values=(x - mean) / std)
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    score = CLIPScore(folders["clip"], scale=scale).score(x, ["3", "seven"])
    torch.testing.assert_close(score, scale * cosine)


def test_clip_score_encodes_a_prompt_once_and_forgets_the_oldest(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_tilt.rewards.clip_tower._CACHED_PROMPTS", 2)
    reward = CLIPScore(folders["clip"])
    encoded: list[str] = []
    encode = reward._encode
    monkeypatch.setattr(reward, "_encode", lambda prompts: encoded.extend(prompts) or encode(prompts))
    for prompts in (["3", "3", "4"], ["4", "3"], ["5", "6", "7"], ["7", "3"]):
        reward.embed_prompts(prompts)
    assert encoded == ["3", "4", "5", "6", "7", "3"]


def test_clip_score_cuts_long_prompts(folders: dict[str, str]) -> None:
    score = CLIPScore(folders["clip"]).score(torch.rand(1, 3, 16, 16), ["a very long prompt " * 50])
    assert torch.isfinite(score).all()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (41, 53), (64, 30), (12, 16)])
def test_preprocessing_equals_the_image_library(height: int, width: int) -> None:
    """Up to the library's rounding to 256 levels and its clipping, one level each at most here."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 196, (height, width, 3), generator=generator, dtype=torch.uint8)
    edge = min(height, width)
    resized = Image.fromarray(pixels.numpy()).resize(
        (16 * width // edge, 16 * height // edge), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
    cropped = resized.crop((left, top, left + 16, top + 16))
    expected = torch.tensor(list(cropped.tobytes()), dtype=torch.float64).reshape(16, 16, 3).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(PREPROCESSOR["image_mean"], dtype=torch.float64)[:, None, None]) / torch.tensor(
        PREPROCESSOR["image_std"], dtype=torch.float64
    )[:, None, None]
    images = pixels.permute(2, 0, 1)[None].double() / 255
    ours = ImagePreprocessing.from_config(PREPROCESSOR)(images)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1.1 / 255 / 0.26)


def test_preprocessing_reads_older_files_and_refuses_what_it_does_not_know() -> None:
    older = ImagePreprocessing.from_config({**PREPROCESSOR, "size": 16, "crop_size": 16})
    assert older == ImagePreprocessing.from_config(PREPROCESSOR)
    with pytest.raises(ValueError, match="resample 0"):
        ImagePreprocessing.from_config({**PREPROCESSOR, "resample": 0})
    with pytest.raises(ValueError, match="smaller than their crop"):
        ImagePreprocessing.from_config({**PREPROCESSOR, "do_resize": False})(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("kind", [DigitClassifier, CLIPScore])
def test_a_missing_folder_is_told_in_one_line(kind: type[Reward], tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"^{kind.__name__} .*{missing}.* give a") as caught:
        kind(missing)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [DigitClassifier, CLIPScore])
def test_the_embedded_network_knows_real_digits(kind: type[Reward]) -> None:
    """On held-out images the true digit's prompt beats the next one's nineteen times in twenty."""
    from lightning_tilt.assets.training.data import load_digits

    digits = load_digits()
    images = (digits.held_out_images[:200] + 1) / 2
    labels = digits.held_out_labels[:200]
    reward = kind()
    with torch.no_grad():
        right, wrong = (reward.score(images, [f"the digit {int(d)}" for d in (labels + k) % 10]) for k in (0, 1))
    assert (right > wrong).double().mean() > 0.95

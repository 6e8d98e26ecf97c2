"""The two families of Stable Diffusion on random tiny pipelines; diffusers itself is the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, bare, batch, plain, save_sd15

from lightning_tilt.models import StableDiffusion
from lightning_tilt.process import RectifiedFlow, VariancePreserving

FAMILIES = ["sd15", "sd3"]


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_predict_is_the_plain_network(family: str, tuning: str, load: Any, sd15_folder: Path, sd3_folder: Path) -> None:
    predictor = load(family, tuning=tuning)
    x, t, condition = batch(predictor)
    expected = bare(family, plain(family, sd15_folder if family == "sd15" else sd3_folder), x, t, condition)
    torch.testing.assert_close(predictor.predict(x, t, condition), expected, rtol=0, atol=0)
    assert predictor.backward_cost == {"lora": 1, "full": 2}[tuning]
    assert predictor.state_shape == (4, 8, 8)


def test_process_and_prediction_type_come_from_the_scheduler(tmp_path: Path, load: Any) -> None:
    assert isinstance(load("sd15").process, VariancePreserving)
    assert load("sd15").prediction_type == "epsilon"
    flow = load("sd3").process
    assert isinstance(flow, RectifiedFlow) and flow.shift == 3.0
    assert load("sd3", shift=1.0).process.shift == 1.0
    folder = save_sd15(tmp_path, prediction_type="v_prediction")
    predictor = StableDiffusion(folder, zero_terminal_snr=True)
    assert predictor.prediction_type == "v_prediction" and predictor.process.is_memoryless_start


@pytest.mark.parametrize("family", FAMILIES)
def test_velocity_and_epsilon_agree_with_diffusers_own_step(
    family: str, load: Any, sd15_folder: Path, sd3_folder: Path
) -> None:
    """The sign and the time: one deterministic step equals that of diffusers' scheduler."""
    from diffusers import DDIMScheduler

    predictor = load(family)
    x, _, condition = batch(predictor)
    t, s = predictor.process.grid(4)[1:3]
    output = predictor.predict(x, t.expand(3), condition).detach()
    prediction = predictor.process.interpret(output, predictor.prediction_type, x, t.expand(3))
    ours = predictor.process.alpha(s) * prediction.x1_hat + predictor.process.beta(s) * prediction.eps_hat
    scheduler = predictor.pipeline.scheduler
    if family == "sd15":
        scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(4)
    else:
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        torch.testing.assert_close(
            scheduler.timesteps.double(), predictor.process.timestep(predictor.process.grid(4)[:-1])
        )
    step = scheduler.timesteps[1]
    theirs = scheduler.step(output if family == "sd15" else -output, step, x).prev_sample
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_is_the_pipelines_own(family: str, load: Any, sd15_folder: Path, sd3_folder: Path) -> None:
    predictor = load(family)
    pipeline = plain(family, sd15_folder if family == "sd15" else sd3_folder)
    ours = predictor.encode(PROMPTS, 3)
    with torch.no_grad():
        if family == "sd15":
            theirs = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        else:
            theirs, _, pooled, _ = pipeline.encode_prompt(
                PROMPTS, PROMPTS, PROMPTS, device="cpu", do_classifier_free_guidance=False, max_sequence_length=8
            )
            torch.testing.assert_close(ours.tensors["pooled_projections"], pooled)
    torch.testing.assert_close(ours.tensors["encoder_hidden_states"], theirs)
    assert ours.prompts == PROMPTS and not any(tensor.requires_grad for tensor in ours.tensors.values())
    # Alone, in another batch, remembered or not: the same bits.
    fresh = load(family).encode(["b"], 1).tensors["encoder_hidden_states"]
    assert torch.equal(ours.tensors["encoder_hidden_states"][2:], fresh)
    empty = predictor.encode(None, 2)
    assert empty.prompts == ["", ""]
    assert torch.equal(empty.tensors["encoder_hidden_states"][1], ours.tensors["encoder_hidden_states"][1])
    with pytest.raises(ValueError, match="3 prompts were given for 2 samples"):
        predictor.encode(PROMPTS, 2)


def test_embeddings_are_remembered_within_bounds_and_fit_for_training(load: Any) -> None:
    predictor = load("sd15", cached_prompts=2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = predictor.encode(["a", "b"], 2)
    predictor.encode(["a"], 1)
    predictor.encode(["c"], 1)
    assert [prompt for prompt, _ in predictor.embeddings._known] == ["a", "c"]
    again = predictor.encode(["a"], 1)
    assert torch.equal(first.tensors["encoder_hidden_states"][:1], again.tensors["encoder_hidden_states"])
    predictor.predict(torch.randn(1, 4, 8, 8), predictor.process.grid(4)[:1], again).sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_is_the_pipelines_and_has_its_gradient(family: str, load: Any) -> None:
    predictor = load(family).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    images = predictor.decode(x)
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    pipeline, vae = predictor.pipeline, predictor.pipeline.vae
    shift = 0.1 if family == "sd3" else 0.0
    theirs = pipeline.image_processor.postprocess(vae.decode(x.detach() / 0.9 + shift).sample, output_type="pt")
    torch.testing.assert_close(images.detach(), theirs)
    weight = torch.randn_like(images)
    (grad,) = torch.autograd.grad((images * weight).sum(), x)
    direction, h = torch.randn_like(x), 1e-6
    with torch.no_grad():
        rise = ((predictor.decode(x + h * direction) - predictor.decode(x - h * direction)) * weight).sum() / (2 * h)
    torch.testing.assert_close((grad * direction).sum(), rise, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_keeps_adapters_and_vae_in_float32(family: str, dtype: str, load: Any) -> None:
    predictor = load(family, dtype=dtype)
    assert predictor.network.dtype == getattr(torch, dtype)
    assert {p.dtype for p in predictor.trained_parameters().values()} == {torch.float32}
    assert predictor.vae.module.dtype == torch.float32
    x, t, condition = batch(predictor)
    exact = load(family).predict(x, t, condition)
    with torch.autocast("cpu", getattr(torch, dtype)):
        mixed = predictor.predict(x, t, condition)
        images = predictor.decode(x)
    assert mixed.dtype == images.dtype == torch.float32
    assert torch.equal(images, predictor.decode(x))
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.05)
    mixed.sum().backward()
    full = load(family, tuning="full", dtype=dtype)
    assert {p.dtype for p in full.trained_parameters().values()} == {torch.float32}


def test_sd3_without_the_third_encoder(load: Any, sd3_folder: Path) -> None:
    predictor = load("sd3", text_encoder_3=False)
    told = predictor.encode(PROMPTS, 3).tensors["encoder_hidden_states"]
    assert told.shape == (3, 16, 32) and told[:, 8:].abs().max() == 0
    pipeline = plain("sd3", sd3_folder, text_encoder_3=None, tokenizer_3=None)
    options = {"device": "cpu", "do_classifier_free_guidance": False, "max_sequence_length": 5}
    with torch.no_grad():
        theirs = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, **options)[0]
    short = load("sd3", text_encoder_3=False, max_sequence_length=5)
    torch.testing.assert_close(short.encode(PROMPTS, 3).tensors["encoder_hidden_states"], theirs)


def test_size_in_pixels(load: Any) -> None:
    predictor = load("sd15", height=24, width=16)
    assert predictor.state_shape == (4, 12, 8)
    x = torch.randn(1, *predictor.state_shape)
    assert predictor.predict(x, predictor.process.grid(2)[:1], predictor.encode(None, 1)).shape == x.shape
    assert predictor.decode(x).shape == (1, 3, 24, 16)
    with pytest.raises(ValueError, match="height must be a multiple of 2 pixels for this model, not 25"):
        load("sd3", height=25)

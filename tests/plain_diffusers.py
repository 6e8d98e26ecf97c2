"""A program that knows diffusers alone: it loads what was exported and draws images.  Run by tests/test_export.py.

    python plain_diffusers.py FAMILY BASE FOLDER [FAMILY BASE FOLDER ...]

FOLDER has the exported `lora` and `pipeline`, and the noise in `in.safetensors`; `out.safetensors` gets, for the base
with the exported weights and for the exported pipeline, the denoiser's output, the images of a deterministic run, and
those of the memoryless chain (SD 1.5).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

PROMPTS = ["a seven", "b"]


def with_weights(base: str, weights: str) -> Any:
    """The untuned pipeline with what was trained put into it."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    for name in ("unet", "transformer"):
        if (Path(weights) / name).is_dir():
            tuned = type(pipeline.components[name]).from_pretrained(weights, subfolder=name)
            return DiffusionPipeline.from_pretrained(base, **{name: tuned})
    pipeline.load_lora_weights(weights, weight_name="pytorch_lora_weights.safetensors")
    return pipeline


@torch.no_grad()
def sd15(pipeline: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    noise, steps = given["noise"], len(given["noise"]) - 1
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    embeddings, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    output = pipeline.unet(noise[0], 999, embeddings).sample
    images = pipeline(
        PROMPTS, latents=noise[0], num_inference_steps=steps, guidance_scale=1.0, eta=0.0, output_type="pt"
    ).images
    pipeline.scheduler.set_timesteps(steps)
    x = noise[0]
    for k, t in enumerate(pipeline.scheduler.timesteps):
        prediction = pipeline.unet(x, t, embeddings).sample
        x = pipeline.scheduler.step(prediction, t, x, eta=1.0, variance_noise=noise[k + 1]).prev_sample
    memoryless = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    return {"output": output, "images": images, "memoryless": (memoryless / 2 + 0.5).clamp(0, 1)}


@torch.no_grad()
def sd3(pipeline: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    noise, steps = given["noise"], len(given["noise"]) - 1
    length = min(256, pipeline.tokenizer_3.model_max_length) if pipeline.tokenizer_3 is not None else 256
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, PROMPTS, PROMPTS, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
    )
    told = {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
    output = -pipeline.transformer(noise[0], timestep=torch.full((len(PROMPTS),), 1000.0), **told).sample
    images = pipeline(
        PROMPTS, latents=noise[0], sigmas=[1 - k / steps for k in range(steps)], num_inference_steps=steps,
        guidance_scale=1.0, output_type="pt", max_sequence_length=length,
    ).images  # fmt: skip
    return {"output": output, "images": images}


def card_works(folder: str) -> None:
    """The code of the model card runs as it stands."""
    code = (Path(folder) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {"FOLDER": folder}
    exec(code, scope)
    assert scope["image"].size == (16, 16)


def job(family: str, base: str, folder: Path) -> None:
    """All of one exported run."""
    given, found = load_file(folder / "in.safetensors"), {}
    loaded = {
        "weights": with_weights(base, str(folder / "lora")),
        "whole": DiffusionPipeline.from_pretrained(folder / "pipeline"),
    }
    for name, pipeline in loaded.items():
        pipeline.set_progress_bar_config(disable=True)
        drawn = {"sd15": sd15, "sd3": sd3}[family](pipeline, given)
        found |= {f"{name}.{key}": value.contiguous() for key, value in drawn.items()}
    card_works(str(folder / "lora"))
    card_works(str(folder / "pipeline"))
    save_file(found, folder / "out.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for family, base, folder in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True):
        job(family, base, Path(folder))
    assert not any(module.startswith("lightning") for module in sys.modules)

"""A tuned diffusers pipeline as a whole, and what whoever gets it has to type.

Adapters are merged into a copy of the denoiser, in float32, and rounded once to the dtype that it was loaded in:

    W  <-  W + (alpha / rank) B A
"""

import copy
from typing import Any

import torch

from lightning_tilt.assets import FOLDERS, folder, locate
from lightning_tilt.models.parts import dtype_option

__all__ = ["how_to_load", "tuned_pipeline"]


def tuned_pipeline(pipeline: Any, denoiser: str, adapted: bool) -> Any:
    """The pipeline with the tuned denoiser and without adapters; the given one is left as it is.

    Args:
        pipeline: the diffusers pipeline around the network that was tuned.
        denoiser: name of that component.
        adapted: whether it has adapters; else its own weights were tuned, and are shared.
    """
    if not adapted:
        return pipeline
    network = copy.deepcopy(pipeline.components[denoiser])
    dtype = network.dtype
    # Not diffusers' own `to`, which warns of parts that are to stay in float32: all of it comes here.
    torch.nn.Module.to(network, torch.float32)
    network.fuse_lora(safe_fusing=True)
    network.unload_lora()
    whole = copy.copy(pipeline)
    whole.register_modules(**{denoiser: torch.nn.Module.to(network, dtype)})
    return whole


def how_to_load(
    pipeline: Any, denoiser: str, adapted: bool, whole: bool, steps: int, guidance_scale: float, tiny_vae: str = ""
) -> str:
    """Python that loads an exported folder in plain diffusers and draws an image.

    It names the dtype, that of the tuned network: parts on disk may be of several, and a pipeline computes in one.

    Args:
        pipeline: the pipeline that was tuned.
        denoiser: name of the component that was tuned.
        adapted: whether by adapters.
        whole: whether the folder is the whole pipeline.
        steps: of the chain that was tuned.
        guidance_scale: of that chain.
        tiny_vae: the small decoder whose images were rewarded, in place of the pipeline's own; empty: none.
    """
    kind, network = type(pipeline).__name__, type(pipeline.components[denoiser]).__name__
    base, embedded, origin = repr(str(pipeline.name_or_path)), list[str](), locate(pipeline.name_or_path).resolve()
    for name in FOLDERS:
        if origin == folder(name).resolve():  # it comes with this package alone
            base, embedded = f"folder({name!r})", ["from lightning_tilt.assets import folder"]
    dtype = f"{dtype_option()}={pipeline.components[denoiser].dtype}"
    if whole:
        lines = [
            "from diffusers import DiffusionPipeline", "",
            f"pipeline = DiffusionPipeline.from_pretrained(FOLDER, {dtype})",
        ]  # fmt: skip
    elif adapted:
        lines = [
            f"from diffusers import {kind}", *embedded, "", f"pipeline = {kind}.from_pretrained({base}, {dtype})",
            # diffusers before 0.40 looks into no folder where HF_HUB_OFFLINE is set
            'pipeline.load_lora_weights(FOLDER, weight_name="pytorch_lora_weights.safetensors")',
        ]  # fmt: skip
    else:
        lines = [
            f"from diffusers import {kind}, {network}", *embedded, "",
            f"tuned = {network}.from_pretrained(FOLDER, subfolder={denoiser!r}, {dtype})",
            f"pipeline = {kind}.from_pretrained({base}, {denoiser}=tuned, {dtype})",
        ]  # fmt: skip
    if tiny_vae:
        lines[0] += "\nfrom diffusers import AutoencoderTiny"
        lines += [
            "# The decoder of the fit; without this line the pipeline's own VAE makes slightly other images.",
            f"pipeline.vae = AutoencoderTiny.from_pretrained({tiny_vae!r}, {dtype})",
        ]
    call = f'"a prompt", num_inference_steps={steps}, guidance_scale={guidance_scale:g}'
    if "beta_schedule" in pipeline.scheduler.config:
        lines[0] += "\nfrom diffusers import DDIMScheduler"
        lines += [
            "pipeline.scheduler = DDIMScheduler.from_config(",
            '    pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False',
            ")",
        ]
        call += ", eta=1.0"
    return "\n".join(["import torch", *lines, f"image = pipeline({call}).images[0]"])

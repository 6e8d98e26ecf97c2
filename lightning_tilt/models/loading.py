"""Read a latent diffusion pipeline from a folder or the Hub, and say in one line why that is not possible.

diffusers and transformers do the loading (`from_pretrained`).  This module looks first at `model_index.json`, a file of
a few hundred bytes, so that a wrong path, a wrong family or an unknown scheduler is told before gigabytes are read; the
parts that it names are loaded one by one (`parts.py`), each whole, and put together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lightning_tilt.assets import locate
from lightning_tilt.interfaces.reports import first_line
from lightning_tilt.interfaces.skeleton import skeleton_device
from lightning_tilt.models.parts import check_files, load_network, load_networks, named_parts, read_names, told
from lightning_tilt.models.skeletons import build_part, build_skeleton

__all__ = ["Dtype", "load_pipeline", "load_tiny_vae", "torch_dtype"]

Dtype = Literal["float32", "bfloat16", "float16"]
"""Floating-point formats of frozen weights, by torch's names."""

# Parts of a folder that no tilting needs; leaving them out also spares their requirements (an image library).
_UNUSED: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusion3Pipeline": ("feature_extractor", "image_encoder"),
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`.

    Raises:
        ValueError: if `name` is none of `Dtype`.
    """
    if name not in get_args(Dtype):
        raise ValueError(f"unknown dtype {name!r}; known are {', '.join(get_args(Dtype))}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_pipeline(
    path: str | Path,
    kind: str,
    dtypes: Mapping[str, torch.dtype],
    variant: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    *,
    without: Sequence[str] = (),
) -> Any:
    """Load a diffusers pipeline.

    Args:
        path: folder that `save_pretrained` wrote, or name on the Hub.
        kind: name of the diffusers pipeline class that `path` must hold.
        dtypes: dtype of each component by its name, "default" for the others, whatever is on disk.
        variant: of the weight files, e.g. "fp16".
        revision: of the Hub repository: branch, tag or commit.
        allow_pickle: read weights from a `.bin` where there is no `.safetensors`: tensors alone, code is never run.
        without: components to leave out.

    Returns:
        The pipeline, its networks in eval mode.

    Raises:
        FileNotFoundError: if there is no such folder or repository, or a file of it is missing.
        ValueError: if it holds another kind of pipeline, an unknown scheduler, damaged files, or weights are missing.
    """
    import diffusers

    if (device := skeleton_device()) is not None:
        return build_skeleton(path, kind, dtypes, without=(*_UNUSED[kind], *without), device=device)
    index = _read_index(path, revision)
    _check_index(path, index, kind, dir(diffusers))
    left_out = (*_UNUSED[kind], *without)
    parts = named_parts(path, index, without=left_out)
    options: dict[str, Any] = dict.fromkeys(left_out)
    make, folder = getattr(diffusers, kind), Path(_locate(path))
    if not folder.is_dir():
        formats, name = None if allow_pickle else True, str(path)
        with told(repr(name)):
            fetched = make.download(name, variant=variant, revision=revision, use_safetensors=formats, **options)
        folder = Path(fetched)
    check_files(path, folder, parts, allow_pickle)
    options |= load_networks(path, folder, parts, dtypes, variant=variant, allow_pickle=allow_pickle)
    if kind == "StableDiffusionPipeline":
        options["requires_safety_checker"] = False
    with told(f"{str(path)!r}: its tokenizers and scheduler"):
        pipeline = make.from_pretrained(str(folder), **options)
    pipeline.register_to_config(_name_or_path=_locate(path))  # of a Hub name not the folder that it was fetched to
    return pipeline


def load_tiny_vae(path: str | Path, dtype: torch.dtype, denoiser: Mapping[str, Any]) -> Any:
    """Load a small autoencoder (`AutoencoderTiny`) whose decoder takes a denoiser's latents.

    Args:
        path: folder that `save_pretrained` wrote, or name on the Hub.
        dtype: of its weights.
        denoiser: configuration of the denoiser.

    Raises:
        FileNotFoundError: if there is none at `path`.
        ValueError: if its files are damaged, weights are missing, or its latents have another number of channels.
    """
    from diffusers import AutoencoderTiny

    if (device := skeleton_device()) is not None:  # taesd and its sisters have the class's own configuration
        config = {"latent_channels": denoiser["in_channels"]}
        return build_part({"library": "diffusers", "cls": "AutoencoderTiny", "config": config}, dtype, device)
    vae = load_network(f"tiny_vae {str(path)!r}", _locate(path), AutoencoderTiny, dtype)
    if vae.config["latent_channels"] != denoiser["in_channels"]:
        raise ValueError(
            f"tiny_vae {str(path)!r} decodes latents of {vae.config['latent_channels']} channels, and the denoiser's "
            f"have {denoiser['in_channels']}: take the small decoder of this family (SD 1.5: taesd, SD 3: taesd3)"
        )
    return vae


def _locate(path: str | Path) -> str:
    """The folder, with `~` replaced, or the Hub name as it is."""
    folder = locate(path)
    return str(folder) if folder.exists() else str(path)


def _read_index(path: str | Path, revision: str | None) -> dict[str, Any]:
    """The content of `model_index.json`."""
    where = Path(_locate(path))
    local = str(path).startswith(("/", ".", "~")) or len(where.parts) != 2
    if where.is_file() or (local and not where.is_dir()):
        raise FileNotFoundError(
            f"there is no folder {str(path)!r}; give a folder with a model_index.json, or a Hub name (owner/name)"
        )
    file = where / "model_index.json" if where.is_dir() else _fetch_index(str(path), revision)
    if not file.is_file():
        raise FileNotFoundError(
            f"folder {str(path)!r} has no model_index.json; give the folder that a pipeline's save_pretrained wrote"
        )
    return read_names(f"model_index.json of {str(path)!r}", file)


def _fetch_index(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "model_index.json", revision=revision))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor reachable on the Hub ({first_line(error)}); check the name, the "
            "connection and, for a gated model, `hf auth login`"
        ) from None


def _check_index(path: str | Path, index: Mapping[str, Any], kind: str, known: Sequence[str]) -> None:
    """Refuse another kind of pipeline, and a scheduler that diffusers does not know."""
    found = index.get("_class_name")
    if found != kind:
        mend = {"StableDiffusionPipeline": "StableDiffusion", "StableDiffusion3Pipeline": "StableDiffusion3"}
        use = f"load it with {mend[found]}" if found in mend else f"known kinds are {', '.join(mend)}"
        raise ValueError(f"{str(path)!r} holds a {found}, not a {kind}; {use}")
    scheduler = index.get("scheduler")
    scheduler = scheduler[1] if isinstance(scheduler, list) and len(scheduler) == 2 else scheduler
    if scheduler not in known:
        raise ValueError(
            f"{str(path)!r} names an unknown scheduler {scheduler!r}, so its noise levels are unknown; name one of "
            "diffusers' schedulers in its model_index.json"
        )

"""Pipelines from their configurations alone: what predictors are built around inside of `without_weights`.

The configurations of the families that the recipes are for come with the package; those of a folder are read from it.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_tilt.assets import locate

__all__ = [
    "KNOWN",
    "build_part",
    "build_skeleton",
    "skeleton_configs",
]

KNOWN = ("sd15", "sd3_medium", "sd35_medium", "sd35_large")
"""The families whose configurations come with the package."""


@cache
def _known(family: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(__file__).parent / "known" / f"{family}.json").read_text())
    return content


def _known_name(path: str | Path) -> str | None:
    """The family of a Hub name that the package knows, e.g. "sd15"; None for another."""
    return next((family for family in KNOWN if str(path) in _known(family)["names"]), None)


def skeleton_configs(path: str | Path) -> dict[str, dict[str, Any]]:
    """The components of a pipeline: for each its library, class, and configuration.

    Args:
        path: folder of a pipeline, whose weight files may be missing, or one of the known Hub names.

    Raises:
        FileNotFoundError: for another name, or a folder without its configurations.
    """
    folder, family = locate(path), _known_name(path)
    if family is not None and not folder.is_dir():
        found: dict[str, dict[str, Any]] = _known(family)["components"]
        return found
    if not (folder / "model_index.json").is_file():
        names = [name for known in KNOWN for name in _known(known)["names"]]
        raise FileNotFoundError(
            f"the configuration of {str(path)!r} is not known: give a folder with a model_index.json, or one of "
            + ", ".join(names)
        )
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    components = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or "tokenizer" in name:
            continue
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if file.is_file():
            components[name] = {"library": entry[0], "cls": entry[1], "config": json.loads(file.read_text())}
    return components


def build_skeleton(
    path: str | Path, kind: str, dtypes: Mapping[str, torch.dtype], *, without: tuple[str, ...], device: torch.device
) -> Any:
    """A diffusers pipeline of `path`'s configuration, its networks on `device`, without tokenizers.

    Args:
        path: folder or known Hub name.
        kind: name of the diffusers pipeline class.
        dtypes: dtype of each component by its name, "default" for the others.
        without: components to leave out.
        device: "meta", or where random weights are made.

    Raises:
        FileNotFoundError: if the configuration is not known.
        ValueError: if it is another kind of pipeline.
    """
    import diffusers

    parts: dict[str, Any] = dict.fromkeys(_optional(kind))
    for name, part in skeleton_configs(path).items():
        if name in parts and name not in without:
            parts[name] = build_part(part, dtypes.get(name, dtypes["default"]), device)
    missing = [name for name in ("vae", "scheduler") if parts[name] is None]
    if missing or (parts.get("unet") is None and parts.get("transformer") is None):
        raise ValueError(f"{str(path)!r} does not hold the components of a {kind}")
    extra = {"requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}
    return getattr(diffusers, kind)(**parts, **extra)


def build_part(part: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """One component: a scheduler, or a network in eval mode."""
    cls = getattr(import_module(part["library"]), part["cls"])
    config = {name: value for name, value in part["config"].items() if not name.startswith("_")}
    if "Scheduler" in part["cls"]:
        return cls.from_config(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in its own precision: a cast would need both at once
    try:
        with device:
            transformers = part["library"] == "transformers"
            network = cls(cls.config_class(**config)) if transformers else cls.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return network.eval()


def _optional(kind: str) -> tuple[str, ...]:
    """The arguments of a pipeline class."""
    shared = ("vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor", "image_encoder")
    if kind == "StableDiffusionPipeline":
        return (*shared, "unet", "safety_checker")
    return (*shared, "transformer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")

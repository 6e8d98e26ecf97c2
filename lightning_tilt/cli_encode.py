"""`lightning-tilt fit --config CONFIG --dry_run memory | prompts | citation`: what is done in place of a run.

`prompts` encodes the prompts of a run ahead of it.  With all of them in the folder that the configuration names
(`predictor.embeddings`), the run needs no text encoder:
`--model.predictor.without_encoders true`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_tilt.data import read_prompts
from lightning_tilt.estimate import Settings, estimate, table
from lightning_tilt.estimate.classes import class_of
from lightning_tilt.references import citation

__all__ = ["dry_run", "encode_prompts"]


def dry_run(wanted: str, config: Mapping[str, Any]) -> str:
    """What a dry run says.

    Args:
        wanted: "memory": what the run needs; "prompts": encode them; "citation": what the run should cite.
        config: of a fit, resolved, as plain dictionaries.
    """
    if wanted == "prompts":
        return encode_prompts(config)
    if wanted == "citation":
        return citation(config)
    return table(estimate(Settings.from_config(config)))


def encode_prompts(config: Mapping[str, Any]) -> str:
    """Encode all prompts that a configuration's data names, and "" for guidance, on a GPU where there is one.

    Args:
        config: resolved, as plain dictionaries.

    Returns:
        What was done, in a line.

    Raises:
        ValueError: if its predictor has no folder of embeddings, or its data no prompts.
    """
    from lightning_tilt.models import LatentDiffusion

    predictor = config["model"]["init_args"].get("predictor") or {}
    arguments, data = predictor.get("init_args") or {}, config["data"].get("init_args") or {}
    if arguments.get("embeddings") is None:
        raise ValueError("--dry_run prompts needs the folder to write to: --model.predictor.embeddings FOLDER")
    names = ("prompts", "val_prompts", "test_prompts", "predict_prompts")
    prompts = [p for name in names if data.get(name) is not None for p in read_prompts(data[name])]
    if not prompts:
        raise ValueError("--dry_run prompts needs a PromptDataModule")
    made = class_of(predictor)(**{**arguments, "without_encoders": False, "compile": "off"})
    assert isinstance(made, LatentDiffusion)
    made.encoders.to("cuda" if torch.cuda.is_available() else "cpu")
    made.cache_prompts(prompts)
    return f"{len(set(prompts))} prompts have their embeddings in {made.embeddings.folder}"

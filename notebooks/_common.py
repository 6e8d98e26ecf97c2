"""What the notebooks share: a Trainer that is quiet, and pictures that are kept."""

import io
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["PICTURES", "show", "trainer"]

PICTURES = Path(__file__).resolve().parent / "pictures"

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # of image processors that are not used here
torch.set_num_threads(1)  # many small tensors: one thread is the fastest
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)


def trainer(callbacks: list[L.Callback], updates: int, **more: Any) -> L.Trainer:
    """A Trainer on the CPU for `updates` updates, without bars; its folder is a temporary one unless said otherwise."""
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": updates, "gradient_clip_val": 1.0, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "default_root_dir": tempfile.mkdtemp(),
    }  # fmt: skip
    return L.Trainer(callbacks=callbacks, **(settings | more))


def show(figure: Figure, name: str) -> None:
    """Keep a figure as `pictures/<name>.png`, in 128 colours, and display it where a notebook runs."""
    path, drawn = PICTURES / f"{name}.png", io.BytesIO()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)
    if "ipykernel" in sys.modules:
        from IPython import display

        display.display(display.Image(filename=str(path)))

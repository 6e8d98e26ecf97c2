"""What all tests share: one thread, a fixed seed, no network, tiny pipelines on disk."""

import os
from pathlib import Path
from typing import Any

# Read when the Hub's client is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# More threads than one slow tiny networks down, and two test processes share two cores.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "test the wheel among what its own metadata ask for, installed anew with the versions of constraints.txt"
    parser.addoption("--with-dependencies", action="store_true", help=text)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of SD 1.5's kind, written by save_pretrained."""
    from tiny import save_sd15

    return save_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of SD 3's kind, written by save_pretrained."""
    from tiny import save_sd3

    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def load(sd15_folder: Path, sd3_folder: Path) -> Any:
    """Make a predictor of the family "sd15" or "sd3" around a tiny pipeline."""
    from lightning_tilt.models import StableDiffusion, StableDiffusion3

    def make(family: str, **kwargs: Any) -> Any:
        return StableDiffusion(sd15_folder, **kwargs) if family == "sd15" else StableDiffusion3(sd3_folder, **kwargs)

    return make

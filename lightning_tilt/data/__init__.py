"""Where the conditions of a rollout come from: files of prompts, or mere numbers of samples."""

from lightning_tilt.data.draws import DrawsDataModule
from lightning_tilt.data.prompts import PromptDataModule
from lightning_tilt.data.sources import read_prompts

__all__ = ["DrawsDataModule", "PromptDataModule", "read_prompts"]

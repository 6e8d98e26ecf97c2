"""`EncodePrompts`: all prompts are encoded when a fit starts, and the text encoders leave the memory.

T5 is more than twice of SD 3's transformer, and is used once a prompt.  With the embeddings in a folder
(`predictor.embeddings`) a second run does not load it at all (`predictor.without_encoders`).
"""

import time

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ..data.prompts import PromptDataModule, PromptSource, read_prompts
from ..models import TextConditioned

__all__ = ["EncodePrompts"]


class EncodePrompts(Callback):
    """Encode the prompts of the datamodule, and "" for guidance, before anything is sampled.

    Processes share the work, and the folder of embeddings.  Put it first in the list of callbacks: a report samples
    when the fit starts, too.

    Args:
        drop_encoders: remove the text encoders from memory afterwards; the predictor must have a folder of embeddings.
        prompts: further ones, a file or a list, such as those of a report of its own.
    """

    def __init__(self, drop_encoders: bool = True, prompts: PromptSource | None = None) -> None:
        super().__init__()
        self.drop_encoders = drop_encoders
        self.prompts = [] if prompts is None else read_prompts(prompts)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Encode, on every process its share, and drop.

        Raises:
            TypeError: if the predictor has no text encoders, or there are no prompts to be found.
        """
        predictor = pl_module.predictor
        if not isinstance(predictor, TextConditioned):
            raise TypeError(f"EncodePrompts: {type(predictor).__name__} encodes no prompts; remove the callback")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PromptDataModule) and not self.prompts:
            raise TypeError("EncodePrompts: the datamodule is no PromptDataModule: name the prompts (prompts: FILE)")
        prompts = list(self.prompts)
        if isinstance(data, PromptDataModule):
            prompts += [*data.prompts, *data.val_prompts]
        start, prompts = time.perf_counter(), list(dict.fromkeys(prompts))
        predictor.cache_prompts(prompts[trainer.global_rank :: trainer.world_size])
        trainer.strategy.barrier("EncodePrompts")
        if self.drop_encoders:
            predictor.cache_prompts(prompts)  # from the folder; made here where processes do not share one
            predictor.drop_encoders()
            torch.cuda.empty_cache()
        rank_zero_info(f"EncodePrompts: {len(prompts)} prompts in {time.perf_counter() - start:.1f} s")

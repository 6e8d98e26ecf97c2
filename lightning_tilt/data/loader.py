"""torchdata's stateful loader, which knows its place within an epoch, without its deprecation warning.

A place is a number of batches, so a checkpoint says how large one of all processes together is.
"""

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from lightning_tilt.interfaces.complete import not_exact

__all__ = ["Loader", "batch_state", "check_batch"]


class Loader(StatefulDataLoader):  # type: ignore[misc]
    """A `StatefulDataLoader`.

    Args:
        **kwargs: all of its arguments by name: Lightning rebuilds loaders from what it saw, and trips over `batch_size`
            given by place.
    """

    def __init__(self, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            # Else every new epoch would draw a number from torch's global generator, and a resumed one would not.
            super().__init__(**{"generator": torch.Generator(), **kwargs})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the batches that were served, also where this loader's batches have another size.

        With other processes a batch of all of them together stays what it was: half as many take twice as much each.
        """
        if state_dict.get("_iterator_finished"):
            return  # the next epoch begins anew; torchdata would begin it with the sampler at its end
        place = state_dict.get("_sampler_iter_state")
        # Where Lightning shares the samples out itself, `sampler` and `batch_size` are no longer the loader's own.
        batches = self.batch_sampler
        if place is not None and batches is not None:
            served = min(state_dict["_num_yielded"] * batches.batch_size, len(batches.sampler))
            place = {**place, "samples_yielded": served}
            if "sampler_state" in place:
                place["sampler_state"] = {**place["sampler_state"], "yielded": served}
            state_dict = {**state_dict, "_sampler_iter_state": place}
        super().load_state_dict(state_dict)


def batch_state(data: LightningDataModule, size: int) -> dict[str, int]:
    """What a checkpoint says of a training batch: the size of one of all processes together."""
    return {"batch": size * (1 if data.trainer is None else data.trainer.world_size)}


def check_batch(data: LightningDataModule, state: dict[str, Any], option: str, size: int) -> None:
    """Refuse to go on with a fit whose batches have another size.

    Args:
        data: the module that a checkpoint is loaded into.
        state: what the checkpoint says of it.
        option: how the size is called.
        size: that of one process.

    Raises:
        ValueError: naming both sizes, unless the sampler's `exact_resume` is false.
    """
    now = batch_state(data, size)["batch"]
    before = state.get("batch", now)
    if data.trainer is None or data.trainer.state.fn != "fit" or before == now:
        return
    reason = f"a batch of all processes together was {before}, and now it is {now}"
    not_exact(data.trainer, reason, f"Give it {option} {before * size / now:g}")

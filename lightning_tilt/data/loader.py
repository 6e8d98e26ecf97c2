"""torchdata's stateful loader, which knows its place within an epoch, without its deprecation warning."""

import warnings
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

__all__ = ["Loader"]


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

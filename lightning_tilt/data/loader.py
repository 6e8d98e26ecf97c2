"""torchdata's stateful loader, which knows its place within an epoch, without its deprecation warning."""

import warnings
from typing import Any

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
            super().__init__(**kwargs)

"""Batches of prompts: a batch is a plain list of strings.

The order of an epoch depends on `(seed, epoch)` alone, never on a global random state.  With several processes, every
one takes each n-th prompt of the same order: two processes with batches of 4 see together what one with batches of 8
sees.
"""

import zlib
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler  # type: ignore[import-untyped]

from lightning_tilt.condition import quoted
from lightning_tilt.data.loader import Loader, batch_state, check_batch
from lightning_tilt.data.sources import PromptSource, read_prompts
from lightning_tilt.interfaces.complete import not_exact

__all__ = ["PromptDataModule", "PromptSource", "read_prompts"]


class _Strings(Dataset[str]):
    """A list as a dataset."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = list(strings)

    def __len__(self) -> int:
        return len(self._strings)

    def __getitem__(self, index: int) -> str:
        return self._strings[index]


def _checksums(prompts: Sequence[str]) -> Tensor:
    """One of each prompt, (n,), integer."""
    return torch.tensor([zlib.crc32(prompt.encode(errors="surrogatepass")) for prompt in prompts])


class PromptDataModule(LightningDataModule):
    """Batches of prompts, `list[str]`; an epoch is one pass over them.

    Args:
        prompts: to train on: a UTF-8 file with one prompt a line (blank lines and lines that begin with # are skipped),
            a `.csv`, `.tsv`, `.json` or `.jsonl` with the column or key `prompt` (another one: `file.csv:column`), a
            data set on the Hub (`hf://owner/name:split:column`), or a list of strings.
        batch_size: prompts a batch and process.  Where there are fewer prompts than one batch of all processes takes,
            training repeats them up to one; else the last batch of an epoch may be smaller.
        val_prompts: for validation, in their order; None is `prompts`.
        test_prompts: for tests, in their order; None is `prompts`.
        predict_prompts: for prediction, in their order; None is `prompts`.
        shuffle: whether each training epoch has an order of its own.
        seed: of these orders.
        num_workers: processes that load; 0 is best for strings.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is empty, a folder, no text or malformed, or the batch size is not positive.
    """

    def __init__(
        self,
        prompts: PromptSource,
        batch_size: int = 8,
        val_prompts: PromptSource | None = None,
        test_prompts: PromptSource | None = None,
        predict_prompts: PromptSource | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.prompts = read_prompts(prompts)
        self.val_prompts = self.prompts if val_prompts is None else read_prompts(val_prompts)
        self.test_prompts = self.prompts if test_prompts is None else read_prompts(test_prompts)
        self.predict_prompts = self.prompts if predict_prompts is None else read_prompts(predict_prompts)

    def train_dataloader(self) -> Loader:
        """Prompts in the order of `(seed, epoch)`, shared out among the processes."""
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        times = max(1, self.batch_size * world / len(self.prompts))
        dataset = _Strings(list(islice(cycle(self.prompts), round(times * len(self.prompts)))))
        # A distributed sampler even for one process: its order is keyed by (seed, epoch), so that it resumes, does
        # not depend on the number of processes, and Lightning leaves it in place.
        sampler = StatefulDistributedSampler(
            dataset, num_replicas=world, rank=rank, shuffle=self.shuffle, seed=self.seed
        )
        return Loader(
            dataset=dataset, batch_size=self.batch_size, sampler=sampler, collate_fn=list, num_workers=self.num_workers
        )

    def state_dict(self) -> dict[str, Any]:
        """Which prompts are trained on, and in which order: a checksum of each; how many a batch."""
        order = {"prompts": _checksums(self.prompts), "shuffle": self.shuffle, "seed": self.seed}
        return order | batch_state(self, self.batch_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with training on other prompts or batches, or in another order, than the checkpoint's.

        Raises:
            ValueError: naming what has changed.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        saved, mine = state_dict["prompts"], _checksums(self.prompts)
        changed = None
        if len(saved) != len(mine):
            changed = f"there were {len(saved)} prompts, and now there are {len(mine)}"
        elif not torch.equal(saved, mine):
            first = int((saved != mine).nonzero()[0])
            changed = f"prompt {first + 1} was another one and is {quoted(self.prompts[first])} now"
        for name in ("shuffle", "seed"):
            if changed is None and state_dict[name] != self.__dict__[name]:
                changed = f"data.{name} was {state_dict[name]!r}, and now it is {self.__dict__[name]!r}"
        if changed is not None:
            not_exact(self.trainer, changed, "Give it the prompts of the checkpoint")
        check_batch(self, state_dict, "data.batch_size", self.batch_size)

    def val_dataloader(self) -> Loader:
        """Validation prompts, in their order."""
        return self._in_order(self.val_prompts)

    def test_dataloader(self) -> Loader:
        """Test prompts, in their order."""
        return self._in_order(self.test_prompts)

    def predict_dataloader(self) -> Loader:
        """Prompts to predict, in their order."""
        return self._in_order(self.predict_prompts)

    def _in_order(self, prompts: Sequence[str]) -> Loader:
        # Lightning shares these out among the processes.
        return Loader(
            dataset=_Strings(prompts), batch_size=self.batch_size, collate_fn=list, num_workers=self.num_workers
        )

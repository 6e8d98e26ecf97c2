"""What tests warn of on purpose, each by its message: it is ignored where a mark says so, all else stays an error."""

import pytest

__all__ = ["FORKED", "RESUMED", "RESUMING"]

FORKED = pytest.mark.filterwarnings(
    # Lightning's advice to evaluate on one device: that two say the same is what is tested.
    "ignore:Using `DistributedSampler` with the dataloaders",
    # Lightning gathers by it (https://github.com/Lightning-AI/pytorch-lightning/pull/11531); torch 2.13 deprecates it.
    "ignore:torch.distributed.nn.functional.all_gather is deprecated:FutureWarning",
    # Python 3.12 and later, of the threads that are left behind: https://github.com/python/cpython/issues/100228
    "ignore:.*is multi-threaded, use of fork:DeprecationWarning",
)
RESUMING = (
    # Lightning's, where a checkpoint has the state of a callback that the next run does without.
    "Be aware that when using `ckpt_path`",
    # Lightning's, where a run goes on in another folder, or in the middle of an epoch of a plain loader.
    "The dirpath has changed from",
    "You're resuming from a checkpoint that ended before the epoch ended",
    # Ours, of processes, loaders and prompts that are not those of the checkpoint: the tests are about them.
    "the checkpoint is of . processes and this run has",
    "this run cannot go on exactly",
)
RESUMED = pytest.mark.filterwarnings(*(f"ignore:{message}" for message in RESUMING))

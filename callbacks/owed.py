"""What an update is still owed when its checkpoint is written: the validation after it, and the rows of metrics.

Lightning's order at the end of update n, all of whose rows have the step n - 1:

    checkpoints (on_train_batch_end)  |  row of metrics  |  validation and its row  |  next batch

A fit that goes on from such a checkpoint would pass over the validation, and a file of metrics that was written to
for longer than the checkpoint knows has rows that come again.
"""

from typing import Any

from lightning import Trainer

from ..loggers import RunLogger

__all__ = ["epoch_over", "rows_come_again", "validate", "validation_due"]


def validation_due(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that has just been trained on."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def validate(trainer: Trainer) -> None:
    """The validation of a fit, before its first batch, as Lightning makes it between two."""
    loop, epoch = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    ended = loop.batch_progress.is_last_batch and epoch.completed > 0
    # Lightning begins the next epoch before it says so, and a row of this validation belongs to the one that ended.
    epoch.completed -= int(ended)
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True
    epoch.completed += int(ended)


def rows_come_again(trainer: Trainer) -> None:
    """Tell the run's own logger which rows a fit that goes on will write again."""
    loop = trainer.fit_loop.epoch_loop
    last = loop._batches_that_stepped if loop.batch_progress.total.ready > 0 else -1
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.go_on_after(last)


def epoch_over(loops: dict[str, Any]) -> bool:
    """Whether the state of a fit loop is of the end of an epoch (on_train_epoch_end).

    A fit that goes on from there ends that epoch once more: it counts a row too many, and the next epoch has the order
    of its successor.
    """
    epochs = loops["epoch_progress"]["total"]
    return bool(epochs["processed"] == epochs["completed"] + 1)

"""What the command keeps out of the terminal."""

import logging
import os
import warnings

__all__ = ["quieter"]


def quieter() -> None:
    """Keep other people's advice out of the terminal: nothing a user of this command could act on."""
    if os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error") == "error":
        logging.getLogger("transformers").setLevel(logging.ERROR)  # it may have read its default level already
    # Lightning 2.6 under torch 2.13, upstream
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # said where a run is looked at, and where its earlier outputs are about to be moved aside
    for told in (
        "Be aware that when using `ckpt_path`",
        "The dirpath has changed",
        "Checkpoint directory .* not empty",
    ):
        warnings.filterwarnings("ignore", message=told)
    # of a checkpoint that is written, where reading one never runs code
    connector = logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector")
    connector.addFilter(lambda record: "`weights_only` was not set" not in str(record.msg))
    # advertisements of the Trainer's
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip: For seamless" not in str(record.msg))

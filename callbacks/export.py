"""`ExportWeights`: what was tuned, for users of diffusers alone."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ..interfaces import ExportablePredictor
from ..run_folder import set_aside
from ..shards import need_whole
from ..strategies import whole_weights

__all__ = ["ExportWeights"]


class ExportWeights(Callback):
    """At the end of a fit write the tuned weights into the run's folder, as the predictor's `save` does.

    Args:
        folder: name in the run's folder: "lora" for adapters, which `DiffusionPipeline.load_lora_weights` takes.
    """

    def __init__(self, folder: str = "lora") -> None:
        super().__init__()
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before anything is computed, a predictor that has no format of its own."""
        need_whole(trainer, "ExportWeights")
        if not isinstance(pl_module.predictor, ExportablePredictor):
            raise TypeError(
                f"ExportWeights: {type(pl_module.predictor).__name__} has no save(folder); remove the callback: the "
                "checkpoint holds what was trained"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights: one process does, and all of them give it their shards."""
        predictor, folder = pl_module.predictor, Path(trainer.default_root_dir) / self.folder
        assert isinstance(predictor, ExportablePredictor)
        with whole_weights(predictor) as writes:
            if writes:
                set_aside(folder)
                predictor.save(folder)
                rank_zero_info(f"ExportWeights: {folder}")

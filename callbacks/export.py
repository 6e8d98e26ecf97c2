"""`ExportWeights`: what was tuned, for users of diffusers alone, with a model card."""

import time
from pathlib import Path
from typing import Any, Literal, get_args

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ..interfaces import ExportablePredictor, find_sampler
from ..run_folder import name_within, set_aside, write_text
from ..shards import need_whole
from ..strategies import whole_weights
from .card import model_card

__all__ = ["ExportWeights"]

What = Literal["weights", "pipeline"]
When = Literal["fit", "test"]


class ExportWeights(Callback):
    """Write the tuned model into the run's folder, with a model card of the run's figures and configuration.

    Where an average of the weights is judged (`ExponentialMovingAverage`), the average is written.

    Args:
        folder: name in the run's folder; None: "lora" for weights, "pipeline" for a whole pipeline.
        what: "weights": what was trained, as the predictor's `save` does (adapters for
            `DiffusionPipeline.load_lora_weights`, or the denoiser); "pipeline": all of it, adapters merged, for
            `DiffusionPipeline.from_pretrained`.
        when: at the end of a fit, or of a test: of the checkpoint that was tested, with the test's figures.

    Raises:
        ValueError: for another `what` or `when`, or if `folder` leads elsewhere.
    """

    def __init__(self, folder: str | None = None, what: What = "weights", when: When = "fit") -> None:
        super().__init__()
        for name, value, known in (("what", what, get_args(What)), ("when", when, get_args(When))):
            if value not in known:
                raise ValueError(f"ExportWeights.{name} is one of {', '.join(known)}, not {value!r}")
        names = {"weights": "lora", "pipeline": "pipeline"}
        self.folder = names[what] if folder is None else name_within("ExportWeights.folder", folder)
        self.what = what
        self.when = when
        self._start = 0.0
        self._written: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What a run writes from here on is its own."""
        self._start, self._written = time.time(), None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before anything is computed, a predictor that has no format of its own."""
        self._check(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same."""
        if self.when == "test":
            self._check(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights."""
        if self.when == "fit":
            self._write(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the weights of the checkpoint, while an average of them is in use."""
        if self.when == "test":
            self._write(trainer, pl_module)

    @rank_zero_only
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the card last, when every callback has written its figures."""
        if self._written is None:
            return
        run, sampler = Path(trainer.default_root_dir), find_sampler(pl_module)
        chain = sampler.chain(pl_module, count=False)
        card = model_card(
            _predictor(pl_module), run, self._start,
            whole=self.what == "pipeline",
            chain=f"{chain.steps} steps of {chain.transition!r}",
            steps=chain.steps,
            guidance_scale=sampler.guidance_scale,
            memoryless=sampler.memoryless,
            base_last=sampler.weighted and len(chain.noisy_steps) < chain.steps,
            updates=trainer.global_step if stage == "fit" else None,
        )  # fmt: skip
        write_text(self._written / "README.md", card)
        self._written = None

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One process writes, and all of them give it their shards."""
        predictor, folder = _predictor(pl_module), Path(trainer.default_root_dir) / self.folder
        with whole_weights(predictor) as writes:
            if writes:
                set_aside(folder)
                (predictor.save_pipeline if self.what == "pipeline" else predictor.save)(folder)
                self._written = folder
                rank_zero_info(f"ExportWeights: {folder}")

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        need_whole(trainer, "ExportWeights")
        predictor: Any = pl_module.predictor
        own = isinstance(predictor, ExportablePredictor)
        if own and self.what == "pipeline":
            own = type(predictor).save_pipeline is not ExportablePredictor.save_pipeline
        if not own:
            method = "save_pipeline" if self.what == "pipeline" else "save"
            raise TypeError(
                f"ExportWeights: {type(predictor).__name__} has no {method}(folder); remove the callback: the "
                "checkpoint holds what was trained"
            )


def _predictor(pl_module: LightningModule) -> ExportablePredictor:
    predictor = pl_module.predictor
    assert isinstance(predictor, ExportablePredictor)
    return predictor

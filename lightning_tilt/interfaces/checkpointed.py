"""What a loss adds to a checkpoint: the name of its base, and what it carries from batch to batch.

checkpoint["base"]    digests of the base's parts, `identity`; another base is refused
checkpoint["loss"]    `carried()`: what is neither parameter nor buffer
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_tilt.interfaces.complete import check_complete, check_finite, not_exact, same_optimizer
from lightning_tilt.interfaces.identity import base_identity, same_base
from lightning_tilt.interfaces.predictor import Predictor
from lightning_tilt.shards import whole

__all__ = ["Checkpointed"]


class Checkpointed:
    """A LightningModule mixin, below `Loss`: checkpoints that name their base and refuse another.

    Attributes:
        allow_other_base: take a checkpoint of another base, with a warning.
    """

    predictor: Predictor
    allow_other_base: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._base_identity: dict[str, str] | None = None

    def carried(self) -> dict[str, Any]:
        """What the loss carries from batch to batch beside its parameters and buffers, as plain data; by reference."""
        return {}

    def carry(self, carried: dict[str, Any]) -> None:
        """Go on with what `carried` gave."""

    def base_identity(self) -> dict[str, str]:
        """Digests of the base's parts; taken once, before training or sharding touches the model."""
        if self._base_identity is None:
            self._base_identity = base_identity(self.predictor)
        return self._base_identity

    def setup(self, stage: str) -> None:
        """Look at the base while it is whole."""
        super().setup(stage)  # type: ignore[misc]
        self.base_identity()

    def on_fit_start(self) -> None:
        """Optimisers are there, and what a checkpoint has of them is not loaded yet."""
        super().on_fit_start()  # type: ignore[misc]
        for optimizer in self._trainer.optimizers:  # type: ignore[attr-defined]
            optimizer.register_load_state_dict_pre_hook(same_optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the base; the sampler may have written already what was carried at the last update."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint["base"] = self.base_identity()
        # Shards are put together here, where all processes are, and not at every update.
        checkpoint["loss"] = _whole(checkpoint.get("loss", self.carried()))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse, before anything is loaded, a checkpoint of another base or model, or one that lacks a part.

        Raises:
            ValueError: naming what differs.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if self.fitting:
            check_complete(self._trainer, checkpoint)  # type: ignore[attr-defined]
        self._check_base(checkpoint.get("base"))
        self._check_names(checkpoint["state_dict"])
        if self.fitting or checkpoint.get("loss"):
            self.carry(checkpoint.get("loss", {}))

    @property
    def fitting(self) -> bool:
        """Whether a fit goes on; what only looks at a model needs nothing of a loss or a reward that was trained."""
        trainer = self._trainer  # type: ignore[attr-defined]
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING

    def _check_base(self, saved: Mapping[str, str] | None) -> None:
        if saved is None and self.fitting and not self.allow_other_base:
            mend = "Give it one that does, or say allow_other_base: true"
            not_exact(self._trainer, "its checkpoint does not say which base it is of", mend)  # type: ignore[attr-defined]
        differ = [] if saved is None else same_base(saved, self.base_identity())
        if not differ:
            return
        message = f"the checkpoint was trained on another base: its {', '.join(differ)} differ from this model's"
        if not self.allow_other_base:
            raise ValueError(
                f"{message}. Give the predictor the base that it was saved with (path, revision, parameters), or say "
                "allow_other_base: true"
            )
        rank_zero_warn(f"{message}; it is loaded all the same (allow_other_base)")

    def _check_names(self, saved: dict[str, Any]) -> None:
        assert isinstance(self, nn.Module)
        present = self.state_dict()
        if not self.fitting:
            for k in [k for k in saved if k not in present and not k.startswith("predictor.")]:
                del saved[k]
            saved |= {k: v for k, v in present.items() if k not in saved and not k.startswith("predictor.")}
        _compare(present, saved, True, "model", "give the predictor the settings that it was saved with")
        if self.strict_loading:
            _compare(present, saved, False, "loss or reward", "give the run those that it was saved with")
        check_finite(saved, {name for name, p in self.named_parameters() if p.requires_grad})


def _compare(present: Mapping[str, Any], saved: Mapping[str, Any], predictor: bool, what: str, mend: str) -> None:
    """Refuse names and shapes that differ, of the predictor or of all else."""
    mine, theirs = (
        {k: v.shape for k, v in state.items() if k.startswith("predictor.") == predictor} for state in (present, saved)
    )
    wrong = [f"it also has {k}" for k in theirs if k not in mine]
    wrong += [f"it has no {k}" for k in mine if k not in theirs]
    wrong += [f"its {k} is {tuple(theirs[k])}, not {tuple(mine[k])}" for k in mine if mine[k] != theirs.get(k, mine[k])]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"the checkpoint is of another {what}: {wrong[0]}{more}; {mend}")


def _whole(carried: dict[str, Any]) -> dict[str, Any]:
    return {name: _whole(value) if isinstance(value, dict) else whole(value) for name, value in carried.items()}

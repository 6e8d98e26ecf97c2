"""What predicts: `predict(x, t, condition)` -> the network's output at the states x and the times t.

Time runs from noise `t = 0` to data `t = 1`; a predictor that speaks timesteps translates inside.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_tilt.condition import Condition, Prompts
from lightning_tilt.interfaces.cited import Cited
from lightning_tilt.process import PredictionType, Process

__all__ = ["ExportablePredictor", "KnownLaw", "Predictor"]


class Predictor(nn.Module, Cited, ABC):
    """What predicts: a closed form, a small network, Stable Diffusion.

    A subclass sets the four attributes below, and says with `base()` what the untuned model is: the same network with
    its adapters off, a frozen copy, or a closed form.  `state_dict()` holds only what is trained (parameters that
    require a gradient), and loading asks for nothing else.

    Attributes:
        process: the interpolant that the model was trained with.
        prediction_type: what `predict` returns: "epsilon", "v_prediction", "sample" (x1_hat) or "velocity".
        state_shape: shape of one state, without the batch, e.g. (4, 64, 64) or (2,).
        backward_cost: forwards that the backward of one training pair costs: 2 for a full network, 1 for adapters.
        sources: what to cite for it.
        reward_cost: gradients of a reward that one prediction asks for, counted beside its forward.
    """

    process: Process
    prediction_type: PredictionType
    state_shape: tuple[int, ...]
    backward_cost: int = 2
    reward_cost: int = 0

    def __init__(self) -> None:
        super().__init__()
        self._prefix = ""
        self.register_load_state_dict_pre_hook(_learn_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_forgive_frozen)  # type: ignore[no-untyped-call]

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output of type `prediction_type`.

        Args:
            x: states, (B, *state_shape).
            t: process times in [0, 1), one a sample, (B,).
            condition: B conditions.

        Returns:
            (B, *state_shape), in the dtype of `x`.
        """

    @abstractmethod
    @contextmanager
    def base(self) -> Iterator["Predictor"]:
        """The untuned model, for the length of a `with` block; it carries no gradient to parameters."""

    def encode(self, prompts: Prompts, size: int) -> Condition:
        """Turn prompts into a batch of `size` conditions; "" is the unconditional prompt of guidance."""
        return Condition({}, None if prompts is None else list(prompts), size)

    def project(self, noise: Tensor) -> Tensor:
        """Noise (..., *state_shape) on the subspace that the states live on; particle systems remove its mean."""
        return noise

    def decode(self, x: Tensor) -> Tensor:
        """What the reward sees of the end points `x`: images in [0, 1] (B, 3, H, W), or the states themselves."""
        return x

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name."""
        # The classic FSDP's wrapper has a name of its own, which is no part of the parameter's.
        named = ((name.replace("_fsdp_wrapped_module.", ""), p) for name, p in self.named_parameters())
        return {name: p for name, p in named if p.requires_grad}

    def sharded_networks(self) -> list[nn.Module]:
        """What a sharding strategy cuts: modules that are called by their `forward`, on all processes in step.

        A large network is one of them, and so is its frozen copy; here, for small ones, all modules with parameters of
        their own.  A parameter of the predictor itself stays whole.
        """
        return [part for part in self.modules() if part is not self and any(True for _ in part.parameters(False))]

    def replace_networks(self, change: Callable[[nn.Module], nn.Module]) -> None:
        """Put `change(network)` in the place of each network, as the classic FSDP asks for."""
        raise ValueError(f"{type(self).__name__} does not let the classic fsdp wrap its network: use fsdp2 or ddp")

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass of the network."""
        raise ValueError(f"{type(self).__name__} cannot recompute activations: take the strategy without _checkpoint")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The trained parameters alone: the base is never written to a checkpoint."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        trained = self.trained_parameters()
        for key in [k for k in state if k.startswith(prefix) and k[len(prefix) :] not in trained]:
            del state[key]
        return state


class KnownLaw(ABC):
    """A base whose end law has a density in closed form: what sampling an unnormalised density stands on."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """`log p_base(x)` of end points (B, *state_shape), normalised and differentiable in x: (B,)."""

    @property
    def precision(self) -> float | None:
        """`m` where the law is N(mu, I/m), so that it has exact steps; None for another law."""
        return None


class ExportablePredictor(Predictor):
    """A predictor whose trained weights have a file format that others read."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what was trained into `folder`."""

    def save_pipeline(self, folder: str | Path) -> None:
        """Write the whole tuned model into `folder`, usable without its base.

        Raises:
            TypeError: if there is no such format.
        """
        raise TypeError(f"{type(self).__name__} has no format for the whole model; export what: weights")

    @property
    def origin(self) -> str:
        """The name of what was tuned, a folder or a name on the Hub; empty if it has none."""
        return ""

    @property
    def borrowed_decoder(self) -> str:
        """The name of a decoder that is none of the tuned model's own, whose images the reward sees; empty: its own."""
        return ""

    def how_to_load(self, whole: bool, steps: int, guidance_scale: float) -> str:
        """Python that loads the exported `FOLDER`, for its model card; empty if nothing is known.

        Args:
            whole: whether it is the whole model, not only what was trained.
            steps: of the chain that was tuned.
            guidance_scale: of that chain.
        """
        return ""


def _learn_prefix(module: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
    """Remember where in the host this predictor stands: the hook below is not told."""
    assert isinstance(module, Predictor)
    module._prefix = prefix


def _forgive_frozen(module: nn.Module, incompatible: Any) -> None:
    """Drop the predictor's frozen names from the keys that a strict load would miss."""
    assert isinstance(module, Predictor)
    frozen = {module._prefix + name for name in set(nn.Module.state_dict(module)) - set(module.trained_parameters())}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in frozen]

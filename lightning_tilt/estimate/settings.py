"""What of a run's configuration decides its memory and its cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_tilt.data import read_prompts
from lightning_tilt.estimate.classes import class_of
from lightning_tilt.estimate.sharing import Sharing, read_devices, read_sharing
from lightning_tilt.losses.adjoint_matching import AdjointMatching
from lightning_tilt.losses.end_points import EndPointRegression
from lightning_tilt.losses.path_controls import PathControls
from lightning_tilt.transition import DDIM

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """A run in numbers; micro-batches are resolved, none is None.

    Attributes:
        predictor: class and arguments of the predictor.
        tuning: "lora" or "full".
        optimizer: class and arguments of the optimiser.
        reward: configuration of the reward.
        callbacks: configurations of the callbacks.
        batch_size: prompts a process.
        samples: paths of a rollout, a process.
        steps: transitions of a path.
        transition: class and arguments of the kernel family.
        supervised: steps that the loss looks at, "all" or a number beside `last_steps`.
        last_steps: of those, how many are the last ones.
        guidance: of the rollout.
        adjoint_guidance: of the sweep.
        control_guidance: of the control.
        unconditional_gradient: whether the loss trains through the unconditional branch.
        checkpoint: whether the loss recomputes its micro-batches.
        reward_gradient: whether the loss needs the reward's gradient.
        adjoint_micro_batch: samples swept at once; 0: no sweep.
        rollout_micro_batch: samples in one call of the rollout.
        reward_micro_batch: samples decoded and scored at once.
        loss_micro_batch: pairs in one call of the loss.
        pairs: (sample, step) pairs of a rollout; an end point is one.
        autocast: whether network calls run in bfloat16 under autocast.
        cuda: whether the run is on a GPU.
        ema: whether an average of the trained parameters is kept.
        drops_encoders: whether the text encoders leave the memory when the fit starts.
        accumulate: rollouts an update.
        sharing: what its strategy does.
        devices: of a node; None: all that are found.
        nodes: of the run.
        name: what the run is called.
    """

    predictor: tuple[type, dict[str, Any]]
    tuning: str
    optimizer: tuple[type, dict[str, Any]]
    reward: Any
    callbacks: list[Any]
    batch_size: int
    samples: int
    steps: int
    transition: tuple[type, dict[str, Any]]
    supervised: int | str
    last_steps: int
    guidance: float
    adjoint_guidance: float
    control_guidance: float
    unconditional_gradient: bool
    checkpoint: bool
    reward_gradient: bool
    adjoint_micro_batch: int
    rollout_micro_batch: int
    reward_micro_batch: int
    loss_micro_batch: int
    pairs: int
    autocast: bool
    cuda: bool
    ema: bool
    drops_encoders: bool
    accumulate: int
    sharing: Sharing
    devices: int | None
    nodes: int
    name: str = field(default="")

    @property
    def loss_calls(self) -> int:
        """Micro-batches of the loss."""
        return -(-self.pairs // self.loss_micro_batch)

    @property
    def processes(self) -> int | None:
        """Devices of all nodes together, one a process; None: not known before the run."""
        return None if self.devices is None else self.devices * self.nodes

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> "Settings":
        """Read them from a resolved configuration (`model`, `data`, `sampler`, `trainer`).

        Args:
            config: plain dictionaries, as the command line's parser gives them.
            name: what to call the run.

        Raises:
            ValueError: for a loss or a predictor that the estimate does not know, or a strategy that nobody has.
        """
        model, sampler, trainer = config["model"], config["sampler"], config["trainer"]
        loss, arguments = class_of(model), model["init_args"]
        if not issubclass(loss, (AdjointMatching, EndPointRegression, PathControls)):
            raise ValueError(
                f"the estimate does not know what {loss.__name__} holds in memory; it knows the losses of pairs and of "
                "end points, such as AdjointMatchingTask"
            )
        predictor = arguments["predictor"]
        samples, batch_size = _samples(config["data"], sampler)
        sweeps = issubclass(loss, AdjointMatching)
        supervised = arguments["supervised_steps"] if sweeps else "all"
        last_steps = arguments["last_steps"] if sweeps else 0
        guidance = float(sampler["guidance_scale"])
        steps = int(sampler["steps"])
        of_path = steps - 1 if supervised == "all" else min(int(supervised) + int(last_steps), steps - 1)
        pairs = samples if issubclass(loss, EndPointRegression) else samples * of_path
        callbacks = trainer.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if batch_size < 1 or steps < 2:
            raise ValueError(
                f"the estimate wants data.batch_size >= 1 and sampler.steps >= 2, not {batch_size}, {steps}"
            )
        devices, nodes = read_devices(trainer)
        precision = str(trainer.get("precision") or "32-true")
        return cls(
            name=name,
            predictor=(class_of(predictor), dict(predictor.get("init_args") or {})),
            tuning=str(predictor["init_args"].get("tuning", "lora")),
            optimizer=(class_of(arguments["optimizer"]), dict(arguments["optimizer"].get("init_args") or {})),
            reward=arguments["reward"],
            callbacks=callbacks,
            batch_size=batch_size,
            samples=samples,
            steps=steps,
            transition=_transition(sampler.get("transition")),
            supervised=supervised,
            last_steps=last_steps,
            guidance=guidance,
            adjoint_guidance=_or(arguments.get("adjoint_guidance"), guidance),
            control_guidance=_or(arguments.get("control_guidance"), guidance),
            unconditional_gradient=bool(arguments.get("unconditional_gradient", False)),
            checkpoint=bool(arguments.get("checkpoint", True)),
            reward_gradient=loss.needs_reward_gradient,
            adjoint_micro_batch=min(_or(arguments.get("adjoint_micro_batch"), samples), samples) if sweeps else 0,
            rollout_micro_batch=min(_or(sampler["rollout_micro_batch"], samples), samples),
            reward_micro_batch=min(_or(sampler["reward_micro_batch"], samples), samples),
            loss_micro_batch=min(_or(arguments.get("loss_micro_batch"), pairs), pairs),
            pairs=pairs,
            autocast=precision == "bf16-mixed",
            cuda=trainer.get("accelerator") != "cpu",
            ema=any(str(c["class_path"]).endswith("ExponentialMovingAverage") for c in callbacks),
            drops_encoders=any(
                str(c["class_path"]).endswith("EncodePrompts") and c["init_args"].get("drop_encoders", True)
                for c in callbacks
            ),
            accumulate=int(trainer.get("accumulate_grad_batches") or 1),
            sharing=read_sharing(trainer.get("strategy"), None if devices is None else devices * nodes),
            devices=devices,
            nodes=nodes,
        )


def _samples(data: Mapping[str, Any], sampler: Mapping[str, Any]) -> tuple[int, int]:
    """Paths of a rollout, and prompts of a batch."""
    arguments = data.get("init_args") or {}
    each = int(sampler["samples_per_condition"])
    if "prompts" not in arguments:
        raise ValueError("the estimate is for prompts: data must be a PromptDataModule")
    batch = min(int(arguments["batch_size"]), max(len(read_prompts(arguments["prompts"])), 1))
    return batch * each, batch


def _transition(config: Mapping[str, Any] | None) -> tuple[type, dict[str, Any]]:
    """The sampler's, or its default."""
    return (DDIM, {}) if config is None else (class_of(config), dict(config.get("init_args") or {}))


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value

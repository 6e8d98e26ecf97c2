"""The verb: `Loss`, the mixin that turns a LightningModule into one that tilts.

    class MyTilt(AdjointMatching, TiltModule): ...                 mixin first, host second
    class Mine(AdjointMatching, MyExistingLightningModule): ...    the host offers predictor, process, reward

A loss reads the sampler's `Trajectory` in `training_step` and returns one scalar; optimisation stays automatic, so
everything the Trainer offers works as it does for any other module.
"""

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_tilt.interfaces.checkpointed import Checkpointed
from lightning_tilt.interfaces.cited import Cited
from lightning_tilt.interfaces.figures import rollout_figures
from lightning_tilt.interfaces.groups import update_size
from lightning_tilt.interfaces.host_checks import check_host, check_loader, check_training_step
from lightning_tilt.interfaces.not_finite import UpdateGuard
from lightning_tilt.interfaces.predictor import KnownLaw, Predictor
from lightning_tilt.interfaces.reward import Reward
from lightning_tilt.interfaces.sampler import Sampler, find_sampler
from lightning_tilt.interfaces.schedule import LamSchedule
from lightning_tilt.process import Process
from lightning_tilt.shards import in_pieces, total_norm
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import ExactGaussian, Transition

if TYPE_CHECKING:
    from lightning_tilt.chain import Chain

__all__ = ["Loss"]


class Loss(Checkpointed, Cited, ABC):
    """Base of all loss mixins: host checks, lam, the way to the sampler, bad samples.

    Traits (class constants that set-up and tests hold a loss to):
        needs_reward_gradient: the sampler must bring the reward's gradient at the end points.
        needs_memoryless: the loss tilts without bias only for memoryless transitions.
        needs_noise: the loss needs a step with noise; without, the ODE serves too.
        needs_path: the loss reads the states between; without, the end points alone are kept.
        on_policy: replayed rollouts of an older model move the fixed point.
        sources: what to cite for it.
        bias: what the fixed point is off by, and why; None for a consistent loss.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        allow_non_memoryless: accept a sampler whose transitions are not memoryless, and the bias that comes with it.
        allow_other_base: take a checkpoint that was trained on another base.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    needs_reward_gradient: ClassVar[bool]
    needs_memoryless: ClassVar[bool]
    needs_noise: ClassVar[bool] = True
    needs_path: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True
    bias: ClassVar[str | None] = None

    # What the host offers.
    predictor: Predictor
    process: Process
    reward: Reward
    trainer: Trainer

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        allow_non_memoryless: bool = False,
        allow_other_base: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lam = lam if isinstance(lam, LamSchedule) else LamSchedule(float(lam))
        self.allow_non_memoryless = allow_non_memoryless
        self._guard = UpdateGuard()
        self.allow_other_base = allow_other_base
        self._step_start = 0.0
        self._said = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        hosts = [c for c in mro if issubclass(c, LightningModule) and not issubclass(c, Loss)]
        mixins = [c for c in mro if issubclass(c, Loss) and not issubclass(c, LightningModule)]
        if hosts and mro.index(hosts[0]) < mro.index(mixins[0]):
            raise TypeError(
                f"{cls.__name__}: the loss comes first, the host second: "
                f"class {cls.__name__}({mixins[0].__name__}, {hosts[0].__name__})"
            )

    @abstractmethod
    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """Add to a fresh rollout what this loss needs of it (Adjoint Matching: the adjoint sweep)."""

    @abstractmethod
    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar of one batch, a mean over good samples, and what else should be logged of it, by name."""

    def setup(self, stage: str) -> None:
        """Check, before anything is computed, that host, reward and sampler fit this loss."""
        check_host(self)
        super().setup(stage)
        self.reward.bind(self.predictor)
        if stage == "fit":
            check_training_step(cast(LightningModule, self), Loss)
            self._guard = UpdateGuard()  # a fit that was interrupted may have left a window open
            self._check_fit(self.sampler)

    def on_train_start(self) -> None:
        """Refuse what is no loader, which the Trainer has only now."""
        super().on_train_start()  # type: ignore[misc]
        check_loader(self.trainer.train_dataloader)

    def _check_fit(self, sampler: Sampler) -> None:
        if self.needs_reward_gradient and not self.reward.is_differentiable:
            rewards = [r for r in self.reward.modules() if isinstance(r, Reward) and not r.is_differentiable]
            named = " in ".join(type(r).__name__ for r in reversed(rewards))  # the culprit, and what it is a part of
            raise TypeError(
                f"{type(self).__name__} needs the gradient of the reward, and {named} has none "
                "(is_differentiable is False). Choose a differentiable reward, or a loss that needs no gradient."
            )
        if self.needs_memoryless and not sampler.memoryless and not self.allow_non_memoryless:
            raise ValueError(
                f"{type(self).__name__} tilts without bias only with memoryless transitions, and the sampler's are "
                "not. Use DDIM with ddim_eta: 1, or say allow_non_memoryless: true."
            )
        if self.needs_path and sampler.replay_samples is not None:
            raise ValueError(
                f"sampler.replay_samples mixes end points of several rollouts, and {type(self).__name__} reads whole "
                "paths: leave it out"
            )
        chain = sampler.chain(self, count=False)
        if self.needs_noise and not chain.noisy_steps:
            raise ValueError(
                f"{type(self).__name__} needs a step with noise, and the sampler's chain has none: sampler.steps of at "
                "least 2, and ddim_eta above 0"
            )
        self.check_exact(chain.transition)
        if self.on_policy and sampler.replays:
            rank_zero_info(
                f"{type(self).__name__} is on policy, and the sampler replays rollouts of older models, which moves "
                "its fixed point a little: sampler.rollout_every: 1 has no such bias."
            )
        start = float(self.process.alpha(chain.t[0]))
        if self.needs_memoryless and start > 0 and not self.allow_non_memoryless:
            rank_zero_info(
                f"The chain starts at alpha = {start:.3f} > 0: X_0 still knows a little of the data, and the "
                "tilt of what it knows is lost (SD 1.5: a correlation of .02 - .15). A predictor with "
                "zero_terminal_snr: true has no such bias; allow_non_memoryless: true accepts it silently."
            )
        if str(self.trainer.precision).endswith("-true") and not str(self.trainer.precision).startswith(("32", "64")):
            raise ValueError(
                f"precision {self.trainer.precision} casts states, rewards and adapters too, where float32 is needed: "
                "use bf16-mixed, and give the network's dtype to the predictor"
            )

    def check_exact(self, transition: Transition) -> None:
        """Refuse steps that are exact for another Gaussian: they would silently make another chain.

        Raises:
            ValueError: naming the precision of this base.
        """
        with self.predictor.base() as base:
            precision = base.precision if isinstance(base, KnownLaw) else None
        if isinstance(transition, ExactGaussian) and (
            precision is None or abs(transition.precision / precision - 1) > 1e-6
        ):
            mend = "use DDIM" if precision is None else f"the precision of this one is 1/scale^2 = {precision:.6g}"
            raise ValueError(f"sampler.transition {transition!r} is exact for another base: {mend}")

    def on_chain(self, chain: "Chain") -> "Chain":
        """The chain that this loss simulates and is judged by: the sampler's own, or what the loss makes of it."""
        return chain

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the loss itself learns beside the predictor (a log Z); a host's optimiser takes it along."""
        return []

    @property
    def variant(self) -> str | None:
        """Which of its objectives a loss minimises, where it has several: a part of its name in reports."""
        return None

    @property
    def sampler(self) -> Sampler:
        """The trainer's sampler callback."""
        return find_sampler(cast(LightningModule, self))

    def current_lam(self) -> float:
        """The multiplier at the present optimiser step."""
        return self.lam(self.trainer.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the sampler's rollout for this batch."""
        self._step_start = time.perf_counter()
        sampler, trajectory = self.sampler, self.sampler.trajectory
        good = self.mean_over_ranks(trajectory.weight.sum())
        if not self._said:
            self._said = update_size(self, trajectory)
            rank_zero_info(self._said)
        loss, logged = self.loss(trajectory)
        self._guard.see(loss, trajectory, float(good))
        self.log_train("loss", loss, prog_bar=False)
        for name, value in (logged | rollout_figures(self, trajectory, good) | sampler.reward_figures).items():
            self.log_train(name, value, prog_bar=name in ("reward", "ess"))
        for name, count in sampler.evaluations.as_dict().items():
            self.log_train(f"evaluations/{name}", torch.tensor(float(count)))
        for name, seconds in sampler.seconds.items():
            self.log_train(f"seconds/{name}", torch.tensor(seconds))
        return loss

    def on_after_backward(self) -> None:
        """Log how long the loss took, its backward included."""
        super().on_after_backward()  # type: ignore[misc]
        self.log_train("seconds/loss", torch.tensor(time.perf_counter() - self._step_start))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm before clipping; make no update without a good sample or a finite gradient."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Of the classic FSDP this is a part of the norm: it tells what is finite, and is not shown.
        norm = total_norm(gradients) if gradients else None
        if norm is not None and not in_pieces(self.trainer):
            self.log_train("gradient_norm", norm)
        if self._guard.refuses(self, norm):
            optimizer.zero_grad(set_to_none=True)  # a gradient of None moves nothing, not even by momentum or decay
        self.log_train("skipped", torch.tensor(float(self.sampler.skipped)))

    def log_train(self, name: str, value: Tensor, prog_bar: bool = False) -> None:
        """Log a mean over the ranks as `train/<name>`; of a name in `_max` the largest, of evaluations the sum."""
        counted = name.startswith("evaluations/") and not name.endswith("_per_pair")
        how = "max" if name.endswith("_max") else "sum" if counted else "mean"
        value = value.detach().to(self.device)  # type: ignore[attr-defined]
        self.log(f"train/{name}", value, prog_bar=prog_bar, sync_dist=True, reduce_fx=how, batch_size=1)  # type: ignore[attr-defined]

    def mean_good(self, weight: Tensor) -> Tensor:
        """Good samples, a mean over all processes, to divide by: it may be below 1, and without any, 0 stays 0."""
        return self.mean_over_ranks(weight.sum()).clamp(min=1e-6)

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """The mean of a number over all processes."""
        return cast(Tensor, self.trainer.strategy.reduce(value.detach().clone(), reduce_op="mean"))

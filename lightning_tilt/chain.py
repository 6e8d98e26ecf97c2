"""The Gaussian chain that a predictor makes on a grid: who is asked what, how often, and what comes of it.

    X_0 ~ N(0, S^2 I),    X_{k+1} | X_k ~ N( m_k(X_k), std_k^2 I ),    k = 0, ..., K - 1       S: scale of the noise

The mean m_k comes from the predictor's output at (X_k, t_k), guided or not:

    output = output("") + scale (output(prompt) - output(""))                 classifier-free guidance

Guidance mixes raw outputs; every conversion is affine in the output, so it may be done before or after it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_tilt.condition import Condition
from lightning_tilt.evaluations import Evaluations, evaluating, slices
from lightning_tilt.interfaces.predictor import Predictor
from lightning_tilt.process import Prediction, Process
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import Gaussian, Transition, control, path_log_ratio

__all__ = ["Chain", "Evaluations", "evaluating", "slices"]


@dataclass(frozen=True)
class Chain:
    """The transitions of a process on the grid `t`, built from any predictor's output.

    Attributes:
        process: the interpolant.
        transition: the kernel family.
        t: times, noise first, data last, (K + 1,), float64.
        evaluations: the counter that calls are added to.
        context: entered around network calls (autocast); states and kernels stay outside of it.
    """

    process: Process
    transition: Transition
    t: Tensor
    evaluations: Evaluations = field(default_factory=Evaluations)
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def steps(self) -> int:
        """K."""
        return len(self.t) - 1

    @property
    def control_form(self) -> bool:
        """Whether `log_weights` are those of the chain itself, so that E[w] is the chain's own Z at any K."""
        return True

    def output(
        self,
        predictor: Predictor,
        x: Tensor,
        k: Tensor | int,
        condition: Condition,
        scale: float = 1.0,
        unconditional_gradient: bool = False,
    ) -> Tensor:
        """The predictor's (guided) output at step k.

        Args:
            predictor: who is asked.
            x: states, (B, *shape).
            k: the step, one for all or one a sample (B,).
            condition: B conditions.
            scale: guidance; 1 asks the conditional model alone.
            unconditional_gradient: let gradients flow through the unconditional branch too.

        Returns:
            (B, *shape), in the dtype of x.
        """
        t = self.t[torch.as_tensor(k, device=self.t.device)].to(x.device).expand(len(x))
        return self.output_at(predictor, x, t, condition, scale, unconditional_gradient)

    def output_at(
        self,
        predictor: Predictor,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        scale: float = 1.0,
        unconditional_gradient: bool = False,
    ) -> Tensor:
        """The same at times t (B,) that need not be of the grid."""
        output = self._call(predictor, x, t, condition)
        if scale == 1.0:
            return output
        empty = predictor.encode(None if condition.prompts is None else [""], 1).to(x.device)
        empty = empty[torch.zeros(len(x), dtype=torch.long)]
        with nullcontext() if unconditional_gradient else torch.no_grad():
            unconditional = self._call(predictor, x, t, empty)
        return unconditional + scale * (output - unconditional)

    def kernel(self, predictor: Predictor, output: Tensor, x: Tensor, k: Tensor | int) -> Gaussian:
        """The transition from step k to k + 1 that the predictor's `output` at x gives."""
        k = torch.as_tensor(k, device=self.t.device)
        t, s = (self.t[i].to(x.device).expand(len(x)) for i in (k, k + 1))
        prediction = self.process.interpret(output, predictor.prediction_type, x, t)
        return self.transition(self.process, x, prediction, t, s)

    def rollout(
        self,
        predictor: Predictor,
        condition: Condition,
        noise: Tensor,
        *,
        scale: float = 1.0,
        base: bool = False,
        base_last_step: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Step N samples through the chain.

        Args:
            predictor: the tuned model.
            condition: N conditions.
            noise: X_0 and z_0 ... z_{K-1}, (K + 1, N, *shape).
            scale: guidance.
            base: let the base make all steps.
            base_last_step: let the base make a step of std = 0, as path weights ask for.

        Returns:
            States (K + 1, N, *shape), and the noise of the steps (K, N, *shape).
        """
        x, noise = self.process.initial(noise[0]), noise[1:]
        states = [x]
        for k, std in enumerate(self.stds.tolist()):
            with predictor.base() if base or (std == 0 and base_last_step) else nullcontext(predictor) as model:
                output = self.output(model, x, k, condition, scale)
                x = self.kernel(model, output, x, k).sample(noise[k])
            states.append(x)
        return torch.stack(states), noise

    def log_ratio(self, trajectory: Trajectory, base_mean: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Log dP/dP_base of the paths, sum_k (u_k . z_k + |u_k|^2 / 2), over the steps with noise.

        Args:
            trajectory: paths of the law P; its means are recovered from its noise, m_k = X_{k+1} - std_k z_k.
            base_mean: `(x, k) -> m_base,k(x)`.

        Returns:
            (N,)
        """
        total, stds = torch.zeros_like(trajectory.reward), self.stds
        for k in self.noisy_steps:
            x, after, z = trajectory.states[k], trajectory.states[k + 1], trajectory.noise[k]
            std = stds[k].to(x)
            total = total + path_log_ratio(control(after - std * z, base_mean(x, k), std), z)
        return total

    def log_weights(
        self,
        predictor: Predictor,
        trajectory: Trajectory,
        lam: float,
        scale: float = 1.0,
        micro_batch: int | None = None,
    ) -> Tensor:
        """Log path weights `lam r - log dP/dP_base` of rollouts: one evaluation of the base a state.

        Args:
            predictor: the model that made the paths; its base is asked.
            trajectory: paths of this chain.
            lam: the multiplier.
            scale: guidance of the base.
            micro_batch: samples in one network call; None: all.

        Returns:
            (N,), without gradient.
        """
        ratios = []
        with torch.no_grad(), evaluating(predictor), predictor.base() as base:
            for i in slices(len(trajectory), micro_batch):
                part = trajectory[i]
                ratios.append(self.log_ratio(part, self.mean(base, part.condition[part.index], scale)))
        return lam * trajectory.reward - torch.cat(ratios)

    def mean(self, predictor: Predictor, condition: Condition, scale: float = 1.0) -> Callable[[Tensor, int], Tensor]:
        """The (guided) means `(x, k) -> m_k(x)` under N conditions, with gradient through both branches."""

        def mean(x: Tensor, k: int) -> Tensor:
            output = self.output(predictor, x, k, condition, scale, unconditional_gradient=True)
            return self.kernel(predictor, output, x, k).mean

        return mean

    @property
    def noisy_steps(self) -> list[int]:
        """The steps with std > 0."""
        return [k for k, std in enumerate(self.stds.tolist()) if std > 0]

    @property
    def stds(self) -> Tensor:
        """The standard deviations of all steps, (K,), float64."""
        zero = torch.zeros(self.steps, 1, dtype=torch.float64, device=self.t.device)
        prediction = self.process.interpret(zero, "sample", zero, self.t[:-1])
        return self.transition(self.process, zero, prediction, self.t[:-1], self.t[1:]).std.flatten()

    @property
    def eps_coefficients(self) -> Tensor:
        """How the mean of each step moves with eps_hat at fixed x, (K,), float64; infinite at alpha = 0."""
        t, s = self.t[:-1], self.t[1:]
        one = torch.ones(self.steps, 1, dtype=torch.float64, device=self.t.device)
        x1_hat = -(self.process.beta(t) / self.process.alpha(t))[:, None]
        return self.transition(self.process, 0 * one, Prediction(x1_hat, one), t, s).mean.flatten()

    def _call(self, predictor: Predictor, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluations.forward += len(x)
        self.evaluations.reward += len(x) * predictor.reward_cost
        with self.context():
            return predictor.predict(x, t, condition).to(x.dtype)

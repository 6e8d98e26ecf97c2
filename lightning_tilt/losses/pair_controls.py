"""Controls of the current model at (sample, step) pairs of recorded paths, in micro-batches.

    u_k(X_k) = (m_k(X_k) - m_base,k(X_k))/std_k

Each micro-batch is one network call, and checkpointed: of it only the numbers stay that a loss makes of u, and the
backward pass recomputes one micro-batch at a time.  So a loss may combine the numbers of all pairs as it likes (the
variance over samples of a sum over steps) without a second pass, at the memory of one micro-batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_tilt.chain import Chain, slices
from lightning_tilt.condition import Condition
from lightning_tilt.interfaces import LamSchedule, Loss
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import control

__all__ = ["PairControls", "Pairs"]


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of P (sample, step) pairs.

    Attributes:
        j: the place of each pair's step among the supervised ones, (P,).
        n: the sample, (P,).
        k: the step, (P,).
        x: the states X_k, (P, *shape).
        condition: P conditions.
    """

    j: Tensor
    n: Tensor
    k: Tensor
    x: Tensor
    condition: Condition


class PairControls(Loss):
    """Base of the losses that look at the control at recorded states.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        unconditional_gradient: train through the unconditional branch of a guided control too.
        loss_micro_batch: (sample, step) pairs in one network call of the loss; None: all. Values and gradients do not
            depend on it.
        checkpoint: recompute each micro-batch of the loss in the backward pass: memory stays that of one micro-batch,
            for one more forward a pair.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        unconditional_gradient: bool = False,
        loss_micro_batch: int | None = None,
        checkpoint: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        self.unconditional_gradient = unconditional_gradient
        self.loss_micro_batch = loss_micro_batch
        self.checkpoint = checkpoint

    def pairs(self, trajectory: Trajectory) -> Iterator[Pairs]:
        """All pairs of a supervised step and a sample in micro-batches, step by step."""
        steps, samples = cast(Tensor, trajectory.supervised), len(trajectory)
        for some in slices(samples * len(steps), self.loss_micro_batch):
            pair = torch.arange(some.start, some.stop)
            j, n = pair // samples, pair % samples
            k = steps[j]
            yield Pairs(j, n, k, trajectory.states[k, n], trajectory.condition[trajectory.index[n]])

    def at_pairs(
        self,
        chain: Chain,
        pairs: Pairs,
        base_mean: Tensor,
        scale: float,
        terms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """What `terms(u, std)` makes of the controls at the pairs, by one (checkpointed) network call.

        Args:
            chain: whose transitions.
            pairs: where.
            base_mean: m_base,k(X_k), (P, *shape).
            scale: guidance of the model.
            terms: u (P, *shape) and std (P, 1, ...) to two tensors.
        """

        def of_states(x: Tensor) -> tuple[Tensor, Tensor]:
            output = chain.output(self.predictor, x, pairs.k, pairs.condition, scale, self.unconditional_gradient)
            law = chain.kernel(self.predictor, output, x, pairs.k)
            return terms(control(law.mean, base_mean, law.std), law.std)

        both = scale != 1 and self.unconditional_gradient
        chain.evaluations.backward += len(pairs.x) * self.predictor.backward_cost * (2 if both else 1)
        if self.checkpoint:
            return cast(tuple[Tensor, Tensor], checkpoint(of_states, pairs.x, use_reentrant=False))
        return of_states(pairs.x)

"""What the losses on a path of marginals share: the chain that they simulate and are judged by, and its states.

The sampler's grid is kept; its transition gives way to bounded noise, with a step to t = 1 that the base makes
(`lightning_tilt.transport`).  A chain without noise is left as it is: the ODE of the tuned velocity v + w, whose end
law is the tilt too where w is exact, and which has no weights.

Every state X_0 .. X_{K-1} of a path is looked at once: it is where the step that leaves it starts, and where the step
back to its predecessor does.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_tilt.chain import Chain, evaluating, slices
from lightning_tilt.condition import Condition
from lightning_tilt.interfaces import LamSchedule, Loss
from lightning_tilt.interfaces.figures import rollout_figures
from lightning_tilt.interfaces.sampler import Sampler
from lightning_tilt.losses.pair_controls import Pairs
from lightning_tilt.process import Driftless
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transport import BoundedNoise, Fields, MarginalPath, PathKind, PathSchedule, TransportChain

__all__ = ["TransportLoss"]


class TransportLoss(Loss):
    """Base of the losses on a path of marginals.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        sigma: the noise, a number or a function of t; it must be bounded.
        path: what the reward is asked about on the way: the "state", or the base's prediction "x1_hat", which costs a
            VJP of the base a state.
        schedule: how the reward comes in: "linear", "quadratic", "smooth", or a function from c(0) = 0 to c(1) = 1.
        loss_micro_batch: (sample, state) pairs in one network call of the loss; None: all. Values and gradients do not
            depend on it.
        checkpoint: recompute each micro-batch of the loss in the backward pass: memory stays that of one micro-batch,
            for one more forward a pair.
        args: passed on to the host.
        kwargs: passed on to the host.
    """

    needs_reward_gradient: ClassVar[bool] = True
    needs_memoryless: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        sigma: float | Callable[[Tensor], Tensor] = 1.0,
        path: PathKind = "state",
        schedule: PathSchedule | Callable[[Tensor], Tensor] = "linear",
        loss_micro_batch: int | None = None,
        checkpoint: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        self._noise = BoundedNoise(sigma)
        MarginalPath(self._score, 1.0, path, schedule)  # refuses what is unknown
        self.path_kind: PathKind = path
        self.schedule = schedule
        self.loss_micro_batch = loss_micro_batch
        self.checkpoint = checkpoint

    def _check_fit(self, sampler: Sampler) -> None:
        if isinstance(self.process, Driftless):
            raise TypeError(
                f"{type(self).__name__} starts in Gaussian noise, and {self.process!r} in a point: use another process"
            )
        super()._check_fit(sampler)
        if not sampler.weighted:
            raise ValueError(f"{type(self).__name__}: the base makes the step to t = 1: sampler.base_last_step: true")

    def on_chain(self, chain: Chain) -> Chain:
        """The forward process on the same grid, with the present lam in a fit and the last otherwise."""
        if not chain.noisy_steps:
            return chain
        lam = self.current_lam() if self.trainer.state.fn == "fit" else self.lam.lam
        start, end = float(chain.t[0]), float(chain.t[-2])
        path = MarginalPath(self._score, lam, self.path_kind, self.schedule, start, end)
        return TransportChain(
            process=chain.process, transition=self._noise, t=chain.t, evaluations=chain.evaluations,
            context=chain.context, path=path,
        )  # fmt: skip

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """The rollout is all that is needed."""
        return trajectory

    def transport_chain(self, lam: float) -> TransportChain:
        """The chain that training simulates, with the multiplier that was in force in a rollout."""
        chain = self.sampler.chain(self)
        assert isinstance(chain, TransportChain)
        return replace(chain, path=replace(chain.path, lam=lam))

    def pairs(self, trajectory: Trajectory, states: Tensor) -> Iterator[Pairs]:
        """All pairs of a state k of `states` (J,) and a sample in micro-batches, state by state."""
        samples = len(trajectory)
        for some in slices(samples * len(states), self.loss_micro_batch):
            pair = torch.arange(some.start, some.stop)
            j, n = pair // samples, pair % samples
            k = states[j]
            yield Pairs(j, n, k, trajectory.states[k, n], trajectory.condition[trajectory.index[n]])

    def _fields(
        self, chain: TransportChain, trajectory: Trajectory, pairs: Pairs, rate: bool = False
    ) -> tuple[Tensor, Fields]:
        """Times (P,) and the base's fields at the pairs, without gradient; the reward of bad samples counts as 0."""
        t = chain.t[pairs.k].to(pairs.x.device)
        with torch.no_grad(), evaluating(self.predictor):
            f = chain.fields(self.predictor, pairs.x, t, pairs.condition, self.sampler.guidance_scale, rate=rate)
        bad = trajectory.weight[pairs.n.to(trajectory.weight.device)] == 0  # NaN times a weight of 0 is NaN
        grad_r = f.grad_r.masked_fill(bad.reshape(-1, *(1,) * (f.v.ndim - 1)), 0.0)
        return t, f._replace(grad_r=grad_r, rate=None if f.rate is None else f.rate.masked_fill(bad, 0.0))

    def _count(self, chain: TransportChain, pairs: int) -> None:
        """Count supervised pairs and their backward."""
        chain.evaluations.pairs += pairs
        chain.evaluations.backward += pairs * self.predictor.backward_cost

    def _run(self, terms: Callable[..., Any], *inputs: Tensor) -> Any:
        """`terms(*inputs)`, (checkpointed)."""
        return checkpoint(terms, *inputs, use_reentrant=False) if self.checkpoint else terms(*inputs)

    def _figures(self, trajectory: Trajectory, log_w: Tensor) -> dict[str, Tensor]:
        """ESS and log Z of log weights (N,), as they are logged."""
        good = trajectory.weight.sum()
        weighed = replace(trajectory, log_w=log_w.detach())
        return {name: v for name, v in rollout_figures(self, weighed, good).items() if name in ("ess", "log_z")}

    def _score(self, x: Tensor, condition: Condition) -> Tensor:
        """The reward of states, through the decoder, in full precision."""
        with torch.autocast(x.device.type, enabled=False):
            images = self.predictor.decode(x)
            return self.reward.score(images, condition.prompts).to(x.dtype)

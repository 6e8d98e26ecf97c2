"""Nonequilibrium transport sampling for tilting (2410.02711; 2605.00229): it leaves nothing for the weights to mend.

Along a path of marginals pi_t ~ p_t exp(r_t), with log Z_t = log E_{p_t}[exp(r_t)], the transport w added to the base's
velocity v moves pi_t exactly where the continuity equation holds at every state (`identities.marginals` has its A):

    R(x, t) = d_t r_t + (v + w).grad r_t + div w + w.s - d_t F_t = 0           F_t = log Z_t

    pinn              1/J sum_k E |R(X_k, t_k)|^2         F_t learned beside w; at 0 the weights are deterministic
    action_matching   w = grad phi (2210.06662):  the minimum of
                      int E_pi_t[ |grad phi|^2/2 + v.grad phi + d_t phi ] dt + E_pi_{t_0}[phi] - E_pi_{t_1}[phi]
                    = int E_pi_t[ |grad phi|^2/2 - (rho - E_pi_t[rho]) phi ] dt,    rho = d_t r_t + v.grad r_t

`pinn` is off policy: R is 0 whatever law the states have.  Only d_t F enters, so that is what the network of t gives,
and F_t its integral, 0 at t_0.  Every prompt has its own F_t: a density, or one prompt.

`action_matching` is minimised in its second form, the first integrated by parts in x and in t: d_t phi and the boundary
terms, small differences of noisy means, are gone, and every time is a convex problem of its own (E[rho] = d_t F_t).
Its expectations under pi_t come from the recorded paths with Crooks' weights, which the base alone gives, whichever
model drew them; Jarzynski's would ask for div w.  In time: the trapezoid rule on the grid; where J of the K times are
drawn, their terms are multiplied by K/J.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from lightning_tilt.chain import Chain, evaluating, slices
from lightning_tilt.identities import value_and_divergence
from lightning_tilt.interfaces import LamSchedule
from lightning_tilt.interfaces.groups import prompt_groups, sample_rows, together
from lightning_tilt.interfaces.sampler import Sampler
from lightning_tilt.losses.continuity import FreeEnergy, action_terms, marginal_weights, residual
from lightning_tilt.losses.pair_controls import Pairs
from lightning_tilt.losses.transport import TransportLoss
from lightning_tilt.models.transport import PotentialTransport
from lightning_tilt.noise import keyed_choice, keyed_normal_rows
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transport import TransportChain, crooks

__all__ = ["NETS", "NETSObjective"]

NETSObjective = Literal["pinn", "action_matching"]
"""What is minimised: the residual of the continuity equation, or the action of a potential."""

Divergence = Literal["exact", "hutchinson"]
"""One VJP a dimension, or one a probe."""


class NETS(TransportLoss):
    """NETS as a mixin: `class MyTilt(NETS, TiltModule)`.

    Consistent: both objectives have the transport of the path as their minimum (that of action matching is a gradient),
    up to the discretisation of the paths that action matching averages over. Needs the gradient of the reward at every
    state, and no memoryless transitions. A pair of "pinn" costs the base, a reward gradient, and the model with its
    divergence, d VJPs or one a probe, and a backward through all of them; one of "action_matching"
    the model's potential with its gradient, and once a rollout the base and a reward gradient at every state.

    "action_matching" comes near the transport in the mean square, and weights see its divergence. Noise averages what
    they see: on the mixture in two dimensions, at the same quality of samples, the ESS is .71 with sigma = 1 and .92
    with sigma = 3 ("pinn", sigma = 1: .96).

    ESS and log Z are Jarzynski's where the divergence is exact and the process continuous, else Crooks'.

    Args:
        lam: multiplier of the reward, a number or a schedule, in units of one over the reward.
        objective: "pinn" works for any predictor; "action_matching" for a `PotentialTransport`.
        divergence: "exact", for low dimensions, or "hutchinson"; "pinn" squares it, so that the noise of the estimate
            adds its variance to the loss, the less the more probes.
        probes: Hutchinson's probes a pair.
        supervised_steps: states of each path that an update looks at: an integer, or "all".
        args: as `TransportLoss`, and passed on to the host.
        kwargs: as `TransportLoss`, and passed on to the host.
    """

    sources: ClassVar[tuple[str, ...]] = ("albergo2024nets", "neklyudov2022action", "domingoenrich2026unified")
    on_policy: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        lam: float | LamSchedule = 1.0,
        objective: NETSObjective = "pinn",
        divergence: Divergence = "exact",
        probes: int = 1,
        supervised_steps: int | Literal["all"] = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, lam=lam, **kwargs)
        if objective not in get_args(NETSObjective):
            raise ValueError(f"objective is one of {get_args(NETSObjective)}, not {objective!r}")
        if divergence not in get_args(Divergence):
            raise ValueError(f"divergence is one of {get_args(Divergence)}, not {divergence!r}")
        if probes < 1:
            raise ValueError(f"probes must be at least 1, not {probes}")
        if supervised_steps != "all" and not (isinstance(supervised_steps, int) and supervised_steps >= 1):
            raise ValueError(f"supervised_steps must be 'all' or at least 1, not {supervised_steps!r}")
        self.objective: NETSObjective = objective
        self.divergence: Divergence = divergence
        self.probes = probes
        self.supervised_steps = supervised_steps
        self.free_energy = FreeEnergy() if objective == "pinn" else None

    @property
    def variant(self) -> str | None:
        """The objective."""
        return self.objective

    def loss_parameters(self) -> list[nn.Parameter]:
        """Those of d_t F_t."""
        return [] if self.free_energy is None else list(self.free_energy.parameters())

    def _check_fit(self, sampler: Sampler) -> None:
        super()._check_fit(sampler)
        if self.objective == "action_matching" and not isinstance(self.predictor, PotentialTransport):
            raise TypeError(
                f"action_matching learns a potential, and {type(self.predictor).__name__} has none: the predictor is a "
                "PotentialTransport, or objective: pinn"
            )
        if self.path_kind == "x1_hat" and not self._continuous(sampler.chain(self, count=False)):
            raise ValueError(
                "NETS needs d_t r_t, and with path: x1_hat the time goes through a base of discrete timesteps: path: "
                "state, or CMCD, which needs no d_t"
            )

    def on_chain(self, chain: Chain) -> Chain:
        """As `TransportLoss`; weighed by Jarzynski's identity where that is exact."""
        made = super().on_chain(chain)
        exact = self.divergence == "exact" and self._continuous(chain)
        return replace(made, weights="jarzynski") if exact and isinstance(made, TransportChain) else made

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        """What action matching averages along the paths, once a rollout: no later model changes it."""
        if self.objective == "pinn":
            return trajectory
        log_w, rho = self._along(self.transport_chain(trajectory.lam), trajectory)
        weight, source = self._weighed(trajectory, log_w, rho)
        return replace(trajectory, log_w=log_w[-1], marginal_weight=weight, marginal_source=source)

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over good samples and supervised states of the squared residual; or the action."""
        chain = self.transport_chain(trajectory.lam)
        states = self._draw_states(chain)
        return (self._pinn if self.objective == "pinn" else self._action)(chain, trajectory, states)

    def _pinn(self, chain: TransportChain, trajectory: Trajectory, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.free_energy is not None
        if trajectory.prompts is not None and len(set(trajectory.prompts)) > 1:
            raise ValueError(
                "pinn learns one F_t = log Z_t, and every prompt has its own: one prompt, or CMCD, which compares the "
                "paths of each prompt"
            )
        good, weight = self.mean_good(trajectory.weight), trajectory.weight
        total = trajectory.reward.new_zeros(())
        for pairs in self.pairs(trajectory, states):
            terms = self._residuals(chain, trajectory, pairs) ** 2
            total = total + (weight[pairs.n.to(weight.device)] * terms).sum()
        log_z = self.free_energy.log_z(chain.t[:-1].to(weight.device))
        return total / (good * len(states)), {"log_z_learned": log_z}

    def _residuals(self, chain: TransportChain, trajectory: Trajectory, pairs: Pairs) -> Tensor:
        """R at the pairs, with gradient to the transport and to F_t, (P,)."""
        assert self.free_energy is not None
        free_energy, scale = self.free_energy, self.sampler.guidance_scale
        t, f = self._fields(chain, trajectory, pairs, rate=True)
        probes = None if self.divergence == "exact" else self._probes(pairs, trajectory)

        def terms(x: Tensor) -> Tensor:
            w, div_w = value_and_divergence(
                chain.transport(self.predictor, t, pairs.condition, scale), x, probes, create_graph=True
            )
            return residual(f, w, div_w, free_energy(t).to(x))

        self._count(chain, len(t))
        chain.evaluations.vjp += len(t) * (pairs.x[0].numel() if probes is None else self.probes)
        return cast(Tensor, self._run(terms, pairs.x))

    def _action(
        self, chain: TransportChain, trajectory: Trajectory, states: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        good = self.mean_good(trajectory.weight)
        trajectory = trajectory[trajectory.weight > 0]
        w, source = trajectory.marginal_weight, trajectory.marginal_source
        assert w is not None and source is not None
        # The trapezoid rule on t_0 .. t_{K-1}, and what makes a draw of J of the K times unbiased.
        h = (chain.t[1:-1] - chain.t[:-2]).to(w)
        rule = (torch.cat([h, h.new_zeros(1)]) + torch.cat([h.new_zeros(1), h])) / 2 * (chain.steps / len(states))
        total = w.new_zeros(())
        for pairs in self.pairs(trajectory, states):
            k, n = pairs.k.to(w.device), pairs.n.to(w.device)
            total = total + (rule[k] * w[k, n] * self._actions(chain, pairs, source[k, n])).sum()
        return total / good, {}

    def _actions(self, chain: TransportChain, pairs: Pairs, source: Tensor) -> Tensor:
        """The action's terms, (P,)."""
        potential = cast(PotentialTransport, self.predictor).potential

        def terms(x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            with chain.context():
                phi = potential(x, chain.t[pairs.k].to(x.device))
            (grad_phi,) = torch.autograd.grad(phi.sum(), x, create_graph=True)
            return action_terms(grad_phi, phi, source)

        self._count(chain, len(source))
        chain.evaluations.forward += len(source)
        chain.evaluations.vjp += len(source)
        return cast(Tensor, self._run(terms, pairs.x))

    @torch.no_grad()
    def _along(self, chain: TransportChain, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Log weights for pi_{t_k} by Crooks, and rho = d_t r_t + v.grad r_t, at all states: both (K, N).

        Bad samples are among them; nobody reads theirs.
        """
        log_w, rho = [], []
        with evaluating(self.predictor):
            for i in slices(len(trajectory), self.loss_micro_batch):
                looks = list(crooks(chain, self.predictor, trajectory[i], self.sampler.guidance_scale, rate=True))
                log_w.append(torch.stack([f.r + log_ratio for f, log_ratio in looks]))
                rho.append(torch.stack([cast(Tensor, f.rate) + (f.v * f.grad_r).flatten(1).sum(1) for f, _ in looks]))
        return torch.cat(log_w, 1), torch.cat(rho, 1)

    def _weighed(self, trajectory: Trajectory, log_w: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of mean 1 for each prompt and time, 0 for bad samples, and `rho - E_pi_t[rho]`: both (K, N).

        Samples of all processes are weighed together.
        """
        group, mine = prompt_groups(self, trajectory)
        everywhere, _ = together(self, torch.cat([log_w, rho, trajectory.weight[None].to(rho)]))
        log_w, rho = everywhere[:-1].chunk(2)
        weight, source = marginal_weights(log_w, rho, everywhere[-1] > 0, group)
        return weight[:, mine], source[:, mine]

    def _probes(self, pairs: Pairs, trajectory: Trajectory) -> Tensor:
        """Signs that belong to the pair and the update, (probes, P, *shape)."""
        total = len(trajectory) * self.trainer.world_size
        pair = (pairs.j * total + sample_rows(self, trajectory)[pairs.n]).tolist()
        shape = (self.probes, *pairs.x.shape[1:])
        rows = keyed_normal_rows(self.sampler.seed, "probes", self.sampler.batches, pair, shape)
        return torch.where(rows > 0, 1.0, -1.0).to(pairs.x).transpose(0, 1)

    def _draw_states(self, chain: TransportChain) -> Tensor:
        """The steps of the states that this update looks at."""
        every = range(chain.steps)
        if self.supervised_steps == "all" or self.supervised_steps >= chain.steps:
            return torch.tensor(every)
        return torch.tensor(
            keyed_choice(self.sampler.seed, "steps", self.sampler.batches, every, self.supervised_steps)
        )

    def _continuous(self, chain: Chain) -> bool:
        """Whether the base can be asked at any time."""
        middle = (chain.t[:-1] + chain.t[1:]) / 2
        return bool((chain.process.node(middle) == middle).all())

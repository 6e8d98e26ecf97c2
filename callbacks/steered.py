"""Samples by steering in place of a plain rollout: `lightning-tilt predict --steering smc`.

Each prompt's particles run through the chain once (`lightning_tilt.steering`); what is returned are as many samples as
asked for, drawn from them by their final weights.  What the run says of log Z goes to `steering.json`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..chain import evaluating
from ..identities import resample
from ..interfaces import Loss, sources_of_run
from ..interfaces.not_finite import judge, where_of
from ..noise import Stream, keyed_normal, keyed_uniform_rows
from ..run_folder import write_json
from ..steering import SMC, Steered
from ..trajectory import Trajectory
from .processes import gathered
from .sampler import TrajectorySampler
from .surroundings import device_and_dtype, global_numbers, prompts_of

__all__ = ["SteeredSampler"]


class SteeredSampler(TrajectorySampler):
    """A sampler whose rollouts for validation, test and prediction are steered.

    `steering.json` has of each batch the prompts, log Z with its error, the mean ESS on arrival at each step, how many
    replicates were resampled, and `ancestors`: from how many initial particles the samples of a prompt descend.

    Args:
        sampler: whose steps, transition, guidance and seed are used.
        smc: how particles are moved and resampled.
    """

    def __init__(self, sampler: TrajectorySampler, smc: SMC) -> None:
        self.__dict__.update(sampler.__dict__)
        self.smc = replace(smc, scale=sampler.guidance_scale, micro_batch=sampler.rollout_micro_batch)
        self.found: list[dict[str, Any]] = []

    def own_sources(self) -> tuple[str, ...]:
        """Of the sampler and of sequential Monte Carlo."""
        return (*super().own_sources(), *self.smc.own_sources())

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier prediction."""
        self.found = []

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what each batch's particles say of log Z."""
        found = [batch for part in gathered(self.found) for batch in part]
        if not trainer.is_global_zero or not found:
            return
        path = Path(trainer.default_root_dir) / "steering.json"
        sources = sources_of_run(pl_module, [self, *trainer.callbacks])  # type: ignore[attr-defined]
        write_json(path, {"smc": {k: v for k, v in self.smc.__dict__.items()}, "sources": sources, "batches": found})
        z = found[0]["log_z"]
        rank_zero_info(f"Steering: log Z {z['mean']:.3f} +- {z['se']:.3f} in the first batch; all of it in {path}")

    @torch.no_grad()
    def rollout(
        self,
        host: Any,
        batch: Any,
        *,
        stream: Stream,
        number: int,
        reward_gradient: bool = False,
        base: bool = False,
        samples_per_condition: int | None = None,
        world: tuple[int, int] | None = None,
        bad: list[str] | None = None,
    ) -> Trajectory:
        """As `TrajectorySampler.rollout`, of steered particles: a record of end points alone, with log weights gone.

        With `base` a plain rollout of the base, which steered samples are compared with. Particles whose reward is not
        finite are never drawn, unless a prompt has no others: then its samples have weight 0.

        Raises:
            TypeError: if the host is no loss, whose lam is the tilt.
        """
        if base:
            return super().rollout(
                host, batch, stream=stream, number=number, reward_gradient=reward_gradient, base=True,
                samples_per_condition=samples_per_condition, world=world, bad=bad,
            )  # fmt: skip
        if not isinstance(host, Loss):
            raise TypeError(f"steering takes lam from a loss, and {type(host).__name__} is none")
        prompts, draws = prompts_of(batch)
        each = samples_per_condition or self.samples_per_condition
        size, wanted = (draws, each) if prompts is not None else (1, draws * each)
        particles = global_numbers(host, size, self.smc.particles, world)
        chain = self.chain(host, count=False)
        device, dtype = device_and_dtype(host)
        shape = (self.steps + 1, *host.predictor.state_shape)
        noise = keyed_normal(self.seed, stream, number, particles, shape).transpose(0, 1)
        uniforms = torch.stack(
            [keyed_uniform_rows(self.seed, "steering", number * self.steps + k, particles) for k in range(self.steps)]
        )
        with torch.autocast(device.type, enabled=False), evaluating(host.predictor):
            condition = host.predictor.encode(prompts, size).to(device)
            noise = host.predictor.project(noise).to(device, dtype)
            lam, told = host.lam.lam, list[str]()
            steered = self.smc.run(
                chain, host.predictor, host.reward, condition, noise, lam, uniforms=uniforms, bad=told
            )
        found = [f"{message}{where_of(host)}" for message in told]
        judge(self.on_bad_reward, found, bad)
        kept = self._kept(steered, size, wanted, number)
        if steered.log_z.n:  # without a good particle there is nothing to say
            self.found.append(
                {
                    "prompts": prompts,
                    "log_z": steered.log_z.as_dict(),
                    "ess": steered.ess.mean((1, 2)).tolist(),
                    "resampled": int(steered.resampled.sum()),
                    "ancestors": len(steered.ancestor[kept.to(device)].unique()) / size,
                }
            )
        end, reward = steered.end[kept.to(device)][None], steered.reward[kept.to(device)].to(dtype)
        end, good = torch.where(end.isfinite(), end, 0.0), reward.isfinite()
        return Trajectory(
            chain.t[-1:], end, end[:0], condition, steered.index[kept], torch.tensor(particles)[kept],
            reward=torch.where(good, reward, 0.0), lam=lam, rollout=number, weight=good.to(end),
        )  # fmt: skip

    def _kept(self, steered: Steered, size: int, wanted: int, number: int) -> Tensor:
        """Particles of each prompt by their final weights, `wanted` of them, on the CPU; any, where all weigh 0."""
        log_w = steered.log_w.view(size, -1).cpu()
        log_w = torch.where(log_w.isfinite().any(1, keepdim=True), log_w, 0.0)
        uniforms = keyed_uniform_rows(self.seed, "resample", number, range(size))
        kept = [resample(log_w[c], count=wanted, uniforms=uniforms[c : c + 1]) for c in range(size)]
        return torch.cat([c * log_w.shape[1] + i for c, i in enumerate(kept)])

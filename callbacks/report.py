"""`TiltReport`: did the tuned model reach the tilt?  Base, tuned and exact, each with its standard error.

For every prompt, base samples x_i of the very chain that is tuned give the exact tilt by reweighting,

    E*[r] = sum_i exp(lam r_i) r_i / sum_i exp(lam r_i),

and tuned paths, with weights log w = lam r - log dP_theta/dP_base, give ESS and log Z.  Prompts are the strata: numbers
are means over prompts, standard errors those of the samples (delta method; `identities`).
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from ..chain import slices
from ..identities import Estimate, expectation, log_partition, mean, stratified
from ..interfaces import ImageEmbedding, Reward, Sampler, find_sampler
from ..metrics import pairwise_diversity
from ..run_folder import set_aside, write_json
from ..trajectory import Trajectory
from .pictures import before_after, curves, reward_histogram
from .sampler import prompts_of
from .versions import versions

__all__ = ["TiltReport"]


@dataclass
class _Samples:
    """What one model's samples gave, one entry a prompt."""

    rewards: list[Tensor]
    judged: dict[str, list[Tensor]]
    diversity: list[float]
    log_w: list[Tensor]
    shown: list[Tensor]


class TiltReport(Callback):
    """Compare base, tuned and exact tilt, and leave `report.json` and pictures in the run's folder.

    Before the fit the base is sampled, after it the tuned model, on the same prompts from the same noise.

    Args:
        base_samples: base samples a prompt, which also give the exact tilt by reweighting.
        tuned_samples: tuned samples a prompt.
        micro_batch: samples in one network call; None: all of a prompt.
        judges: further rewards, not trained on, by name: their means appear as `<name>_base`, `<name>_tuned`.
        embedding: what embeds images (CLIPScore), in whose space diversity is measured; None: in the
            space of the decoded images themselves.
        diversity_samples: samples a prompt that diversity is measured on.
        shown: images a prompt in `before_after.png`.
        density: name of the density, for toy problems; None: left out.
    """

    def __init__(
        self,
        base_samples: int = 256,
        tuned_samples: int = 64,
        micro_batch: int | None = None,
        judges: dict[str, Reward] | None = None,
        embedding: ImageEmbedding | None = None,
        diversity_samples: int = 64,
        shown: int = 4,
        density: str | None = None,
    ) -> None:
        super().__init__()
        self.base_samples = base_samples
        self.tuned_samples = tuned_samples
        self.micro_batch = micro_batch
        self.judges = judges or {}
        self.embedding = embedding
        self.diversity_samples = diversity_samples
        self.shown = shown
        self.density = density
        self._seconds: dict[str, float] = {}
        self._base: _Samples | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the base."""
        for part in (*self.judges.values(), self.embedding):
            if isinstance(part, torch.nn.Module):
                part.to(pl_module.device)
        start = time.perf_counter()
        rank_zero_info(f"TiltReport: sampling the base, {self.base_samples} samples a prompt ...")
        self._base = self._sample(trainer, pl_module, self.base_samples, base=True)
        self._seconds = {"base": time.perf_counter() - start}
        self._fit_start = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the tuned model and write everything."""
        assert self._base is not None
        self._seconds["fit"] = time.perf_counter() - self._fit_start
        start = time.perf_counter()
        rank_zero_info(f"TiltReport: sampling the tuned model, {self.tuned_samples} samples a prompt ...")
        tuned = self._sample(trainer, pl_module, self.tuned_samples, base=False)
        self._seconds["tuned"] = time.perf_counter() - start
        self._write(trainer, pl_module, self._base, tuned)

    def _sample(self, trainer: Trainer, host: Any, n: int, base: bool) -> _Samples:
        sampler = find_sampler(host)
        samples = _Samples([], {name: [] for name in self.judges}, [], [], [])
        for number, prompt in enumerate(_prompts(trainer)):
            batch: Any = torch.zeros(1) if prompt is None else [prompt]
            trajectory = sampler.rollout(
                host, batch, stream="report", number=number, base=base, samples_per_condition=n
            )
            trajectory = trajectory[trajectory.weight > 0]
            images = _decoded(host, trajectory, self.micro_batch)
            prompts = None if prompt is None else [prompt] * len(images)
            samples.rewards.append(trajectory.reward.double().cpu())
            with torch.no_grad():
                for name, judge in self.judges.items():
                    samples.judged[name].append(judge.score(images, prompts).double().cpu())
                some = images[: self.diversity_samples]
                features = some if self.embedding is None else self.embedding.embed_images(some)
            samples.diversity.append(float(pairwise_diversity(features)))
            samples.shown.append(images[: self.shown if images.ndim == 4 else None].float().cpu())
            if not base:
                samples.log_w.append(_log_w(sampler, host, trajectory, self.micro_batch).double().cpu())
        return samples

    @rank_zero_only
    def _write(self, trainer: Trainer, host: Any, base: _Samples, tuned: _Samples) -> None:
        sampler, folder = find_sampler(host), Path(trainer.default_root_dir)
        report = compare(base, tuned, host.lam.lam, sampler.weighted)
        report |= {
            "loss": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(host).__name__.removesuffix("Task")).lower(),
            "reward": type(host.reward).__name__,
            "evaluations": sampler.evaluations.as_dict(),
            "updates": trainer.global_step,
            "seconds": sum(self._seconds.values()),
            "seconds_by_part": self._seconds,
            "versions": versions(),
            "seed": sampler.seed,
        }
        if self.density is not None:
            report["density"] = self.density
        write_json(folder / "report.json", report)
        for name in ("before_after.png", "reward_histogram.png", "curves.png"):
            set_aside(folder / name)
        before_after(folder / "before_after.png", _prompts(trainer), base.shown, tuned.shown)
        reward_histogram(folder / "reward_histogram.png", base.rewards, tuned.rewards, host.lam.lam)
        if (folder / "metrics.csv").exists():
            curves(folder / "curves.png", folder / "metrics.csv", report)
        rank_zero_info(_summary(report, folder))


def compare(base: _Samples, tuned: _Samples, lam: float, weighted: bool) -> dict[str, Any]:
    """The numbers of a report: base, tuned and exact, and how far apart they are.

    Args:
        base: samples of the base.
        tuned: samples of the tuned model, on the same prompts.
        lam: multiplier of the tilt.
        weighted: whether the tuned paths' weights mean something; without, ESS and log Z are None.
    """
    exact = stratified([expectation(r, lam * r) for r in base.rewards])
    reward_base, reward_tuned = _mean(base.rewards), _mean(tuned.rewards)
    log_z = stratified([log_partition(w) for w in tuned.log_w]) if weighted else None
    way = exact.mean - reward_base.mean
    report: dict[str, Any] = {
        "lam": lam,
        "reward_base": reward_base.as_dict(),
        "reward_tuned": reward_tuned.as_dict(),
        "reward_exact": {**exact.as_dict(), "ess": exact.ess},
        "reward_base_std": float(torch.cat(base.rewards).std()),
        "way": (reward_tuned.mean - reward_base.mean) / way if way else None,
        "ess": log_z.ess if log_z else None,
        "log_z": log_z.as_dict() if log_z else None,
        "log_z_base": stratified([log_partition(lam * r) for r in base.rewards]).as_dict(),
        "diversity_base": sum(base.diversity) / len(base.diversity),
        "diversity_tuned": sum(tuned.diversity) / len(tuned.diversity),
    }
    for name in base.judged:
        for kind, samples in (("base", base), ("tuned", tuned)):
            estimate = _mean(samples.judged[name])
            report[f"{name}_{kind}"], report[f"{name}_{kind}_se"] = estimate.mean, estimate.se
    report["warnings"] = [
        f"{name}: ESS {e.ess:.2f} of {e.n} samples; below ESS .5 or n 1000 an interval of 1.96 se is too short"
        for name, e in (("reward_exact", exact), ("log_z", log_z))
        if e is not None and not e.trustworthy
    ]
    return report


def _mean(values: list[Tensor]) -> Estimate:
    return stratified([mean(v) for v in values])


def _prompts(trainer: Trainer) -> list[str | None]:
    """The validation prompts, each once, in order; [None] for a density."""
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None:
        raise TypeError(
            "TiltReport takes its prompts from the validation prompts of a datamodule, and the Trainer was given none: "
            "trainer.fit(module, datamodule=PromptDataModule(...))"
        )
    loader = datamodule.val_dataloader()
    found: dict[str | None, None] = {}
    for batch in loader:
        prompts, _ = prompts_of(batch)
        found.update((prompt, None) for prompt in (prompts or [None]))  # type: ignore[list-item]
    return list(found)


def _decoded(host: Any, trajectory: Trajectory, micro_batch: int | None) -> Tensor:
    with torch.no_grad():
        return torch.cat([host.predictor.decode(trajectory.end[i]) for i in slices(len(trajectory), micro_batch)])


def _log_w(sampler: Sampler, host: Any, trajectory: Trajectory, micro_batch: int | None) -> Tensor:
    """Lam r - log dP_theta/dP_base: one base evaluation a state."""
    chain = sampler.chain(host, count=False)
    ratios = []
    with torch.no_grad(), host.predictor.base() as base:
        for i in slices(len(trajectory), micro_batch):
            part = trajectory[i]
            condition = part.condition[part.index]
            ratios.append(chain.log_ratio(part, chain.mean(base, condition, sampler.guidance_scale)))
    log_w: Tensor = host.lam.lam * trajectory.reward - torch.cat(ratios)
    return log_w


def _summary(report: dict[str, Any], folder: Path) -> str:
    lines = [f"TiltReport ({folder / 'report.json'})"]
    for key in ("reward_base", "reward_tuned", "reward_exact", "log_z"):
        if report[key] is not None:
            lines.append(f"  {key:14s} {report[key]['mean']:.4f} +- {report[key]['se']:.4f}")
    if report["ess"] is not None:
        lines.append(f"  ESS            {report['ess']:.2f}")
    if report["way"] is not None:
        lines.append(f"  the way        {report['way']:.0%} from base to exact")
    lines += [f"  warning: {text}" for text in report["warnings"]]
    return "\n".join(lines)

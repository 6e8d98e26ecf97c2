"""`TiltReport`: did the tuned model reach the tilt?  Base, tuned and exact, each with its standard error.

What the numbers are is said in `comparison`; here the samples are drawn, of the base before the fit and of the tuned
model after it, on the same prompts from the same noise.  Several processes deal the prompts out among them: each prompt
is sampled by one, with the noise that a single process would draw.
"""

import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from ..chain import Evaluations, slices
from ..condition import quoted
from ..interfaces import ImageEmbedding, Loss, Reward, Sampler, find_sampler, sources_of_run
from ..interfaces.not_finite import agree, judge_together
from ..metrics import pairwise_diversity
from ..run_folder import set_aside, write_json
from ..trajectory import Trajectory
from ..transition import Transition
from .comparison import PromptSamples, compare
from .pictures import before_after, curves, reward_histogram
from .processes import gathered, moved
from .scoring import check_one_a_sample
from .surroundings import prompts_of
from .truth import density_figures, truth_of
from .versions import versions

__all__ = ["TiltReport"]


class TiltReport(Callback):
    """Compare base, tuned and exact tilt, and leave `report.json` and pictures in the run's folder.

    Args:
        base_samples: base samples a prompt, which also give the exact tilt by reweighting.
        tuned_samples: tuned samples a prompt.
        micro_batch: samples at once in what the report adds to a rollout - decoding, judges, embedding, path weights;
            None: all of a prompt.  Rollout and reward are cut by the sampler's own `rollout_micro_batch` and
            `reward_micro_batch`.
        prompts: what to report on: a file with one prompt a line, or a list of strings; None: the datamodule's
            validation prompts, or a density.
        judges: further rewards, not trained on, by name: their means appear as `<name>_base`, `<name>_tuned`.
        embedding: what embeds images (CLIPScore), in whose space diversity is measured; None: in the
            space of the decoded images themselves.
        diversity_samples: samples a prompt that diversity is measured on.
        shown: images a prompt in `before_after.png`; a sample without a finite reward is white.
        density: name of the density; None: that of the reward's class.
        steps: transitions of the paths that are judged; None: the sampler's.
        transition: their kernel family; None: the sampler's. A model trained on few steps of an ODE has path weights
            on a memoryless chain.
    """

    def __init__(
        self,
        base_samples: int = 256,
        tuned_samples: int = 64,
        micro_batch: int | None = None,
        prompts: str | list[str] | None = None,
        judges: dict[str, Reward] | None = None,
        embedding: ImageEmbedding | None = None,
        diversity_samples: int = 64,
        shown: int = 4,
        density: str | None = None,
        steps: int | None = None,
        transition: Transition | None = None,
    ) -> None:
        super().__init__()
        self.base_samples = base_samples
        self.tuned_samples = tuned_samples
        self.micro_batch = micro_batch
        from ..data import read_prompts

        self.prompts = None if prompts is None else read_prompts(prompts)
        self.judges = judges or {}
        self.embedding = embedding
        self.diversity_samples = diversity_samples
        self.shown = shown
        self.density = density
        self.steps = steps
        self.transition = transition
        self._seconds: dict[str, float] = {}
        self._asked: list[str | None] = []
        self._base: list[PromptSamples] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the base; if the reward itself learns, at the end, by the reward that the tuned model is judged by."""
        for part in (*self.judges.values(), self.embedding):
            if isinstance(part, torch.nn.Module):
                part.to(pl_module.device)
        self._asked = [*self.prompts] if self.prompts is not None else _validation_prompts(trainer)
        if self.transition is not None and isinstance(pl_module, Loss):
            pl_module.check_exact(self.transition)
        if not cast(Any, pl_module).reward.learns:
            self._sample_base(pl_module)
        self._fit_start = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the tuned model and write everything."""
        self._seconds["fit"] = time.perf_counter() - self._fit_start
        with moved(pl_module, trainer.strategy.root_device):
            if cast(Any, pl_module).reward.learns:
                self._sample_base(pl_module)
            start = time.perf_counter()
            rank_zero_info(f"TiltReport: sampling the tuned model, {self.tuned_samples} samples a prompt ...")
            tuned = self._sample(pl_module, self.tuned_samples, base=False)
        self._seconds["tuned"] = time.perf_counter() - start
        counts = gathered(find_sampler(pl_module).evaluations)
        total = Evaluations(*(sum(c.__dict__[f.name] for c in counts) for f in fields(Evaluations)))
        self._write(trainer, pl_module, tuned, total)

    def _sample_base(self, host: Any) -> None:
        start = time.perf_counter()
        rank_zero_info(f"TiltReport: sampling the base, {self.base_samples} samples a prompt ...")
        self._base = self._sample(host, self.base_samples, base=True)
        self._seconds["base"] = time.perf_counter() - start

    def _sampler(self, host: Any) -> Sampler:
        """The sampler of what is judged."""
        return find_sampler(host).variant(self.steps, self.transition)

    def _sample(self, host: Any, n: int, base: bool) -> list[PromptSamples]:
        """The samples of all prompts, on every process."""
        world, rank, asked = host.trainer.world_size, host.trainer.global_rank, self._asked
        # As many prompts on every process, some of them twice, since the network of a sharded model is called together.
        mine = range(rank, -(-len(asked) // world) * world, world)
        own, bad, empty = list[tuple[int, PromptSamples]](), list[str](), list[str]()
        for i in mine:  # to the end: a process that stopped alone would leave the others waiting
            samples = self._sample_prompt(host, i % len(asked), n, base, bad)
            if samples is None:
                prompt = asked[i % len(asked)]
                empty.append(
                    f"TiltReport: not one of {n} samples of the {'base' if base else 'tuned model'} for "
                    f"{'the density' if prompt is None else quoted(prompt)} has a finite reward"
                )
            else:
                own.append((i, samples))
        judge_together(host, self._sampler(host).on_bad_reward, bad)
        agree(host, empty, "Mend the reward, or remove the prompt.")
        found = {i: samples for part in gathered(own) for i, samples in part}
        return [found[i] for i in range(len(asked))]

    @torch.no_grad()
    def _sample_prompt(self, host: Any, number: int, n: int, base: bool, bad: list[str]) -> PromptSamples | None:
        """The good samples of one prompt, if there are any; what is said of the others goes into `bad`."""
        prompt = self._asked[number]
        batch: Any = torch.zeros(1) if prompt is None else [prompt]
        sampler = self._sampler(host)
        path = sampler.rollout(
            host, batch, stream="report", number=number, base=base, samples_per_condition=n, world=(1, 0), bad=bad
        )
        good = path.weight.cpu() > 0
        rewards, log_w = path.reward.double().cpu(), host.lam.lam * path.reward
        if not base:
            chain = sampler.chain(host, count=False)
            log_w = chain.log_weights(host.predictor, path, host.lam.lam, sampler.guidance_scale, self.micro_batch)
        log_w = log_w.double().cpu()
        if not bool(good.any()):
            return None
        judged, features, shown = self._look(host, path, prompt, good)
        return PromptSamples(rewards[good], log_w[good], judged, float(pairwise_diversity(features)), shown)

    def _look(
        self, host: Any, path: Trajectory, prompt: str | None, good: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """What judges say of the good samples, features of the first of them, and what is shown."""
        judged: dict[str, list[Tensor]] = {name: [] for name in self.judges}
        features: list[Tensor] = []
        shown: list[Tensor] = []
        for i in slices(len(path), self.micro_batch):
            images = host.predictor.decode(path.end[i])
            fine = images[good[i].to(images.device)]
            missing = self.diversity_samples - sum(map(len, features))
            if images.ndim == 4:
                blank = torch.where(good[i].to(images.device)[:, None, None, None], images, 1.0)
                shown.append(blank[: max(self.shown - i.start, 0)].float().cpu())
            else:
                shown.append(fine.float().cpu())
            if len(fine) == 0:
                continue
            for name, judge in self.judges.items():
                score = judge.score(fine, None if prompt is None else [prompt] * len(fine))
                check_one_a_sample(judge, score, len(fine))
                judged[name].append(score.double().cpu())
            if missing > 0:
                some = fine[:missing]
                features.append((some if self.embedding is None else self.embedding.embed_images(some)).cpu())
        return {name: torch.cat(parts) for name, parts in judged.items()}, torch.cat(features), torch.cat(shown)

    @rank_zero_only
    def _write(self, trainer: Trainer, host: Any, tuned: list[PromptSamples], evaluations: Evaluations) -> None:
        sampler, folder, base = self._sampler(host), Path(trainer.default_root_dir), self._base
        chain = sampler.chain(host, count=False)
        report = compare(base, tuned, host.lam.lam, sampler.weighted and bool(chain.noisy_steps))
        report |= {
            "loss": _loss_name(host),
            "reward": type(host.reward).__name__,
            "sources": sources_of_run(host, [sampler, *trainer.callbacks]),  # type: ignore[attr-defined]
            "chain": f"{chain.steps} steps of {chain.transition!r}",
            "evaluations": evaluations.as_dict(),
            "updates": trainer.global_step,
            "seconds": sum(self._seconds.values()),
            "seconds_by_part": self._seconds,
            "versions": versions(),
            "seed": sampler.seed,
        }
        truth = truth_of(host.predictor, host.reward, host.lam.lam)
        if truth is not None:
            report |= density_figures(truth, report, chain, torch.cat([s.shown for s in tuned]), sampler.seed)
            report |= {"energy_evaluations": evaluations.reward, "network_evaluations": evaluations.network}
            report["density"] = self.density or type(host.reward).__name__
        write_json(folder / "report.json", report)
        for name in ("before_after.png", "reward_histogram.png", "curves.png"):
            set_aside(folder / name)
        before_after(folder / "before_after.png", self._asked, [s.shown for s in base], [s.shown for s in tuned])
        rewards_base, rewards_tuned = ([s.rewards for s in samples] for samples in (base, tuned))
        reward_histogram(folder / "reward_histogram.png", rewards_base, rewards_tuned, host.lam.lam)
        if (folder / "metrics.csv").exists():
            curves(folder / "curves.png", folder / "metrics.csv", report)
        rank_zero_info(_summary(report, folder))


def _loss_name(host: Any) -> str:
    """The class in small letters, and the loss's variant: adjoint_matching, cmcd_kl."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(host).__name__.removesuffix("Task")).lower()
    return name if host.variant is None else f"{name}_{host.variant}"


def _validation_prompts(trainer: Trainer) -> list[str | None]:
    """The validation prompts, each once, in order; [None] for a density."""
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None:
        raise TypeError(
            "TiltReport takes its prompts from the validation prompts of a datamodule, and the Trainer was given none: "
            "TiltReport(prompts=[...]), or trainer.fit(module, datamodule=PromptDataModule(...))"
        )
    found: dict[str | None, None] = {}
    for batch in datamodule.val_dataloader():
        prompts, _ = prompts_of(batch)
        found.update((prompt, None) for prompt in (prompts or [None]))  # type: ignore[list-item]
    return list(found)


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

"""`Evaluation`: what `lightning-tilt test` does - base against tuned model on prompts, by any number of rewards.

Each prompt is sampled by both models from the same noise, which depends on (seed, prompt, sample) alone: not on the
other prompts of the file, their order, or the number of processes.  What the figures are is said in
`evaluation_figures`, how distances are measured in `evaluation_pairs`.
"""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from ..interfaces import Evaluator, ImageEmbedding, Loss, Reward, find_sampler
from .evaluation_figures import Pairs, figures
from .evaluation_files import write_evaluation
from .evaluation_pairs import Judges
from .processes import gathered
from .surroundings import prompts_of
from .versions import versions

__all__ = ["Evaluation"]

_TAKEN = {"reward", "reward_se", "reward_gain", "reward_gain_se", "diversity", "distance", "path_kl", "path KL"}


class Evaluation(Evaluator, Callback):
    """Judge base and tuned model on the test's batches, and leave tables, pictures and a page in the run's folder.

    It samples and scores for any host of a loss, whatever the host's `test_step` does. A prompt that stands several
    times in a file counts once. A sample whose reward is not finite is left out and named.

    Args:
        samples: samples a prompt, of either model.
        rewards: further rewards by name, also ones that were not trained on: classes, or functions that make one. They
            are made when a test begins, and a fit spends nothing on them.
        embedding: what embeds images (CLIPScore), in whose space diversity and distances are measured; None: in the
            space of the decoded images themselves.
        shown: images a prompt in the picture and on the page.
        shown_prompts: prompts that have pictures, the first ones.
        micro_batch: samples decoded, judged and embedded at once; None: all of a prompt. Rollout and trained reward
            are cut by the sampler's own `rollout_micro_batch` and `reward_micro_batch`.

    Raises:
        ValueError: if a count is below 1.
    """

    def __init__(
        self,
        samples: int = 4,
        rewards: dict[str, Callable[[], Reward]] | None = None,
        embedding: Callable[[], ImageEmbedding] | None = None,
        shown: int = 2,
        shown_prompts: int = 24,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        for name, count in (
            ("samples", samples), ("shown", shown), ("shown_prompts", shown_prompts), ("micro_batch", micro_batch)
        ):  # fmt: skip
            if count is not None and count < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, not {count}")
        self.samples = samples
        self.rewards = rewards or {}
        self.embedding = embedding
        self.shown = shown
        self.shown_prompts = shown_prompts
        self.micro_batch = micro_batch
        self._judges: Judges | None = None
        self._found: list[Pairs] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a test of nothing, which would end in silence.

        Raises:
            ValueError: if the Trainer takes no batch.
        """
        if stage == "test" and trainer.limit_test_batches == 0:
            raise ValueError("trainer.limit_test_batches: 0 leaves nothing to evaluate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the further rewards and the embedding.

        Raises:
            TypeError: if the host is none of a loss, or what is made is none of the two.
            ValueError: if a further reward has the trained one's name.
        """
        if not isinstance(pl_module, Loss):
            raise TypeError(
                f"Evaluation serves the host of a loss, and {type(pl_module).__name__} is none: "
                f"class Mine(AdjointMatching, {type(pl_module).__name__})"
            )
        find_sampler(pl_module)
        rewards = {}
        for name, make in self.rewards.items():
            if name == type(pl_module.reward).__name__ or name in _TAKEN:
                what = "a figure of the report" if name in _TAKEN else "the trained reward"
                raise ValueError(f"evaluation.rewards: {what} is called {name!r}; give this one another name")
            # What is a reward already is taken as it is: a torchmetrics Metric can be called, but makes none.
            reward = make if isinstance(make, Reward) else make()
            if not isinstance(reward, Reward):
                raise TypeError(f"evaluation.rewards: {name!r} makes a {type(reward).__name__}, which is no Reward")
            rewards[name] = reward.to(pl_module.device)
            rewards[name].bind(pl_module.predictor)
        embedding: Any = self.embedding
        if embedding is not None and not isinstance(embedding, ImageEmbedding):
            embedding = embedding()
            if not isinstance(embedding, ImageEmbedding):
                raise TypeError(f"evaluation.embedding: {type(embedding).__name__} has no embed_images")
        if isinstance(embedding, torch.nn.Module):
            embedding.to(pl_module.device)
        self._judges, self._found = Judges(rewards, embedding, self.micro_batch), []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Sample both models on the prompts of a batch."""
        assert self._judges is not None
        prompts, size = prompts_of(batch)
        rank, world = trainer.global_rank, trainer.world_size
        if prompts is None:
            number = dataloader_idx * 2**32 + batch_idx * world + rank
            self._found.append(self._judges.pairs(pl_module, None, number, size, shown=0))
            return
        for prompt in prompts:
            early = len(self._found) * world + rank < self.shown_prompts  # prompts are dealt out in turn
            shown = self.shown if early else 0
            self._found.append(self._judges.pairs(pl_module, prompt, _number(prompt), self.samples, shown))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the processes' parts together, log, and write everything."""
        assert self._judges is not None
        parts, embedding = gathered(self._found), self._judges.embedding
        dealt = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
        distinct = {pairs.prompt: pairs for pairs in reversed(dealt)}
        found = dealt if None in distinct else [distinct[p] for p in dict.fromkeys(pairs.prompt for pairs in dealt)]
        space = "states"
        if found[0].is_image:
            space = "decoded images" if embedding is None else f"embeddings of {type(embedding).__name__}"
        self._judges, self._found = None, []
        report = figures(found, type(pl_module.reward).__name__, space)
        pl_module.log_dict(_logged(report), sync_dist=True)  # the same numbers on every process
        self._write(trainer, pl_module, found, report)

    @rank_zero_only
    def _write(self, trainer: Trainer, host: Any, found: list[Pairs], report: dict[str, Any]) -> None:
        sampler = find_sampler(host)
        chain = sampler.chain(host, count=False)
        report |= {
            "host": type(host).__name__,
            "model": type(host.predictor).__name__,
            "lam": host.lam.lam,
            "chain": f"{chain.steps} steps of {chain.transition!r}",
            "guidance_scale": sampler.guidance_scale,
            "seed": sampler.seed,
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "versions": versions(),
        }
        write_evaluation(Path(trainer.default_root_dir), report, found)


def _number(prompt: str) -> int:
    """The number of a prompt's noise: of the prompt alone, whatever file it stands in."""
    return int.from_bytes(sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:7], "big")


def _logged(report: dict[str, Any]) -> dict[str, float]:
    """`test/reward`, its error, the gain over the base and its error, `test/<name>` of further rewards, diversity."""
    trained = report["rewards"][report["trained_reward"]]
    logged = {
        "reward": trained["tuned"]["mean"],
        "reward_se": trained["tuned"]["se"],
        "reward_gain": trained["difference"]["mean"],
        "reward_gain_se": trained["difference"]["se"],
        "diversity": report["diversity"]["tuned"]["mean"],
    }
    logged |= {n: row["tuned"]["mean"] for n, row in report["rewards"].items() if row is not trained}
    return {f"test/{name}": value for name, value in logged.items() if value is not None}

"""Two gloo processes on the CPU, and small fits that any strategy runs in them."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toys import PromptedNet, SumReward, trainer

import lightning_tilt.tasks
from lightning_tilt.callbacks import ExponentialMovingAverage, TrajectorySampler
from lightning_tilt.data import DrawsDataModule, PromptDataModule
from lightning_tilt.models import GaussianMixturePredictor, NeuralTilt, StableDiffusion, StableDiffusion3
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.shards import whole

PROMPTS = ["a", "bb", "ccc", "dddd", "e", "ff", "ggg", "hhhh"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_two(work: Callable[..., None], *args: Any) -> None:
    """`work(rank, *args)` in two processes that find each other; raises what either raised."""
    mp.spawn(_one, (free_port(), work, args), nprocs=2)


def _one(rank: int, port: int, work: Callable[..., None], args: Sequence[Any]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
        "NODE_RANK": "0", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        work(rank, *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Gradients(lightning.Callback):
    """Keeps the gradients of each update, whole, and the samples of the first rollout; saves the last step."""

    def __init__(self, file: Path, last: int) -> None:
        self.file, self.last = file, last
        self.found: list[dict[str, torch.Tensor]] = []
        self.end: dict[int, torch.Tensor] = {}
        self.prompts: dict[int, Any] = {}
        self.figures: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = [(n, p) for n, p in pl_module.named_parameters() if p.grad is not None]
        self.found.append({n: whole(p.grad).clone() for n, p in named})
        if not self.end:
            path = pl_module.sampler.trajectory
            self.end = {int(i): x.clone() for i, x in zip(path.sample, path.end, strict=True)}
            self.prompts = dict(zip(self.end, path.prompts or [None] * len(path), strict=True))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.figures = {n: float(v) for n, v in trainer.callback_metrics.items() if "seconds" not in n}
        if trainer.global_step == self.last:
            trainer.save_checkpoint(self.file)


def predictor(model: str, folders: dict[str, Path]) -> Any:
    """By name: "mlp", "density", or family_tuning of a tiny pipeline."""
    torch.manual_seed(0)
    if model == "mlp":
        return PromptedNet(RectifiedFlow())
    if model == "density":
        net = NeuralTilt(GaussianMixturePredictor([1.0], [[0.0, 0.0]], torch.eye(2)[None]), hidden=8, layers=1)
        torch.nn.init.normal_(net.last.weight, std=0.1)
        return net
    family, tuning = model.split("_")
    kind = StableDiffusion if family == "sd15" else StableDiffusion3
    made = kind(folders[family], tuning=tuning)
    with torch.no_grad():
        for p in made.trained_parameters().values():  # adapters that start at 0 have half of their gradients 0
            p.add_(0.05 * torch.randn(p.shape))
    return made


def fitted(
    folder: Path, name: str, model: str, folders: dict[str, Path], *, loss: str = "AdjointMatchingTask",
    batch: int = 2, steps: int = 2, prompts: Sequence[str] = PROMPTS, settings: dict[str, Any] | None = None,
    optimizer: Any = None, sampler: dict[str, Any] | None = None, ckpt: Path | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Fit for some updates, with EMA and a checkpoint; what was seen is saved in `folder/name{rank}.pt`."""
    task = getattr(lightning_tilt.tasks, loss)(
        predictor=predictor(model, folders), reward=SumReward(), lam=2.0, **(settings or {}),
        optimizer=optimizer or (lambda p: torch.optim.SGD(p, lr=0.003)),
    )  # fmt: skip
    seen, average = Gradients(folder / f"{name}.ckpt", steps), ExponentialMovingAverage(0.5)
    rolls = TrajectorySampler(**({"steps": 4, "samples_per_condition": 3, "seed": 1} | (sampler or {})))
    # Deterministic order whatever the strategy does with the global generators.
    data = DrawsDataModule(samples=batch, batches=8) if model == "density" else PromptDataModule(
        list(prompts), batch_size=batch
    )  # fmt: skip
    run = trainer([rolls, average, seen, *kwargs.pop("callbacks", [])], max_steps=steps, **kwargs)
    run.fit(task, datamodule=data, ckpt_path=ckpt, weights_only=True)
    record = {
        "gradients": seen.found, "end": seen.end, "prompts": seen.prompts, "figures": seen.figures,
        "weights": {n: whole(p.detach()).clone() for n, p in task.named_parameters() if p.requires_grad},
        "average": {n: whole(v).clone() for n, v in average.average.items()}, "said": task._said,
    }  # fmt: skip
    torch.save(record, folder / f"{name}{run.global_rank}.pt")
    return task

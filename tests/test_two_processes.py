"""Two processes draw the samples and take the gradient that one would."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from processes import free_port
from toys import PromptedNet, Recorder, SumReward, trainer

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.data import DrawsDataModule, PromptDataModule
from lightning_tilt.models import GaussianMixturePredictor, PotentialTransport, the_mixture
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.tasks import AdjointMatchingTask, NETSTask

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh"]


def run(batch_size: int, folder: Path, name: str, **kwargs: Any) -> None:
    torch.manual_seed(0)
    task = AdjointMatchingTask(
        predictor=PromptedNet(RectifiedFlow()), reward=SumReward(), lam=2.0,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    recorder = Recorder()
    sampler = TrajectorySampler(steps=5, samples_per_condition=3, seed=1)
    fit = trainer([sampler, recorder], max_steps=2, **kwargs)
    fit.fit(task, datamodule=PromptDataModule(PROMPTS, batch_size=batch_size))
    path = recorder.trajectories[0]
    record = {
        "gradients": recorder.gradients,
        "weights": {n: p.detach() for n, p in task.named_parameters()},
        "end": {int(i): x for i, x in zip(path.sample, path.end, strict=True)},
        "reward": fit.callback_metrics["train/reward"],
    }
    torch.save(record, folder / f"{name}{fit.global_rank}.pt")


def run_density(samples: int, folder: Path, name: str, **kwargs: Any) -> None:
    """Action matching, whose weights and means are those of all samples of a density."""
    torch.manual_seed(0)
    net = PotentialTransport(GaussianMixturePredictor.of(the_mixture()[0]), hidden=8, layers=1)
    torch.nn.init.normal_(net.last.weight, std=0.3)
    task = NETSTask(
        predictor=net, reward=SumReward(), lam=1.0, objective="action_matching",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    recorder = Recorder()
    fit = trainer([TrajectorySampler(steps=5, samples_per_condition=1, seed=1), recorder], max_steps=2, **kwargs)
    fit.fit(task, datamodule=DrawsDataModule(samples=samples, batches=2))
    path = recorder.trajectories[0]
    record = {
        "gradients": recorder.gradients,
        "weight": {int(i): w for i, w in zip(path.sample, path.marginal_weight.mT, strict=True)},
        "source": {int(i): s for i, s in zip(path.sample, path.marginal_source.mT, strict=True)},
    }
    torch.save(record, folder / f"{name}{fit.global_rank}.pt")


def one_of_two(rank: int, folder: Path, port: int, density: bool = False) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank), "NODE_RANK": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    if density:
        run_density(4, folder, "two", strategy="ddp", devices=2, num_nodes=1)
    else:
        run(2, folder, "two", strategy="ddp", devices=2, num_nodes=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*num_workers.*")
def test_weights_along_the_path_span_the_processes(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (tmp_path, free_port(), True), nprocs=2)
    run_density(8, tmp_path, "one")
    one, first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one0", "two0", "two1"))
    for name in ("weight", "source"):
        together = first[name] | second[name]
        assert set(together) == set(one[name]) and len(together) == 8
        for number, value in one[name].items():
            torch.testing.assert_close(together[number], value, rtol=1e-5, atol=1e-6)
    for step in (0, 1):
        for name, gradient in one["gradients"][step].items():
            torch.testing.assert_close(first["gradients"][step][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (tmp_path, free_port()), nprocs=2)
    run(4, tmp_path, "one")
    one, first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one0", "two0", "two1"))
    together = first["end"] | second["end"]
    assert set(together) == set(one["end"]) and not set(first["end"]) & set(second["end"])
    for number, x in one["end"].items():
        torch.testing.assert_close(together[number], x)
    torch.testing.assert_close(first["reward"], one["reward"])
    for step in (0, 1):
        for name, gradient in one["gradients"][step].items():
            for other in (first, second):
                torch.testing.assert_close(other["gradients"][step][name], gradient, rtol=1e-5, atol=1e-6)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(second["weights"][name], weight, rtol=1e-5, atol=1e-6)

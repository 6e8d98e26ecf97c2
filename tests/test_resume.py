"""A fit that goes on from any of its checkpoints ends where one without a break does, bit for bit."""

import os
import random
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet import RESUMED, RESUMING
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from toys import PromptedNet, SumReward, trainer

from lightning_tilt.callbacks import ExponentialMovingAverage, TrajectorySampler
from lightning_tilt.data import DrawsDataModule, PromptDataModule
from lightning_tilt.interfaces import Prompts
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards.mixture_density import TiltedMixture
from lightning_tilt.tasks import AdjointMatchingTask, AdjointSamplingTask, TiltMatchingTask, TrajectoryBalanceTask

EPOCHS_BEGUN = tuple(f"epoch_progress/{of}/{what}" for of in ("total", "current") for what in ("ready", "started"))
PROMPTS = [f"{'p' * i}" for i in range(1, 8)]
MIXTURE = ([0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], [[[0.3, 0.0], [0.0, 0.3]], [[0.2, 0.0], [0.0, 0.4]]])


class Restless(SumReward):
    """A reward that draws from every global generator."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        noise = torch.rand(len(images)) + torch.from_numpy(np.random.rand(len(images))).float() + random.random()
        return super().score(images, prompts) * (1 + 0.1 * noise)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=4)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)


def make(kind: str) -> tuple[Any, TrajectorySampler, Any, dict[str, Any]]:
    """Module, sampler, data and Trainer's arguments of a small run of some kind."""
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    prompts = PromptDataModule(PROMPTS, batch_size=2)
    draws = DrawsDataModule(samples=6, batches=3, val_samples=4)
    common: dict[str, Any] = {"optimizer": optimizer, "lr_scheduler": warm_up}
    conditional: dict[str, Any] = {"predictor": PromptedNet(RectifiedFlow()), "reward": Restless()} | common
    density: dict[str, Any] = {"predictor": NeuralTilt(GaussianMixturePredictor(*MIXTURE), hidden=8, layers=1)} | common
    few: dict[str, Any] = {"steps": 4, "samples_per_condition": 2, "seed": 5}
    if kind == "on policy":
        return AdjointMatchingTask(**conditional), TrajectorySampler(**few), prompts, {}
    if kind == "accumulated":
        return AdjointMatchingTask(**conditional), TrajectorySampler(**few), prompts, {"accumulate_grad_batches": 3}
    if kind == "plateau":
        return AdjointMatchingTask(**(conditional | {"lr_scheduler": plateau})), TrajectorySampler(**few), prompts, {}
    if kind == "replayed":
        sampler = TrajectorySampler(**few, rollout_every=2, buffer_size=3)
        return AdjointMatchingTask(**conditional), sampler, prompts, {}
    if kind == "log Z":
        task = TrajectoryBalanceTask(reward=SumReward(), **density)
        return task, TrajectorySampler(**few), draws, {}
    if kind == "levels":
        task = TiltMatchingTask(reward=SumReward(), level_ess=0.99, lam=3.0, **density)
        return task, TrajectorySampler(**few, rollout_every=2), draws, {}
    assert kind == "end points"
    predictor = NeuralTilt(GaussianBase([2], scale=1.5), hidden=8, layers=1)
    reward = TiltedMixture(*MIXTURE, A=[[0.5, 0.0], [0.0, 0.5]], c=[0.0, 0.0])
    task = AdjointSamplingTask(predictor=predictor, reward=reward, time_sampling="importance", **common)
    return task, TrajectorySampler(**few, rollout_every=3, buffer_size=2, replay_samples=8), draws, {}


def run(kind: str, folder: Path, resume: Path | None = None, updates: int = 7, **kwargs: Any) -> dict[str, Any]:
    """The last checkpoint of a run."""
    module, sampler, data, extra = make(kind)
    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    callbacks = [sampler, ExponentialMovingAverage(0.9), every]
    callbacks += kwargs.pop("callbacks", [])
    fit = trainer(callbacks, enable_checkpointing=True, max_steps=updates, num_sanity_val_steps=0, **(extra | kwargs))
    with warnings.catch_warnings():
        for message in RESUMING:
            warnings.filterwarnings("ignore", message=message)
        fit.fit(module, data, ckpt_path=resume)
    return dict(torch.load(folder / "last.ckpt", weights_only=True))


class Told(lightning.Callback):
    """Sends this process a signal at some network call, and counts those that follow."""

    def __init__(self, number: int, call: int) -> None:
        self.number, self.call, self.calls = number, call, 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        predict = pl_module.predictor.predict

        def counted(*args: Any) -> Tensor:
            self.calls += 1
            if self.calls == self.call:
                os.kill(os.getpid(), self.number)
            return predict(*args)

        pl_module.predictor.predict = counted


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two checkpoints differ, in anything but the paths of their files."""
    # Lightning does not count the beginning of an epoch that a resumed fit begins with, nor repeat the validation of an
    # update that was saved before it; nothing depends on either.
    if "ModelCheckpoint" in path or "val_loop" in path or path.endswith(EPOCHS_BEGUN):
        return None
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}/{k}"))), None)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)}"
        return next((d for i in range(len(a)) if (d := difference(a[i], b[i], f"{path}/{i}"))), None)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else f"{path}: tensors"
    return None if a == b else f"{path}: {a!r} and {b!r}"


@pytest.mark.parametrize("kind", ["on policy", "accumulated", "plateau", "replayed", "log Z", "levels", "end points"])
def test_a_fit_goes_on_from_each_of_its_checkpoints(kind: str, tmp_path: Path) -> None:
    whole = run(kind, tmp_path / "whole")
    assert whole["global_step"] == 7 or kind == "levels"
    for step in range(1, whole["global_step"]):
        resumed = run(kind, tmp_path / f"from{step}", tmp_path / f"whole/step={step}.ckpt")
        found = difference(whole, resumed)
        assert found is None, f"from update {step}: {found}"


def test_a_fit_goes_on_from_update_to_update(tmp_path: Path) -> None:
    whole = run("on policy", tmp_path / "whole", updates=10)
    for step in range(1, 11):
        last = tmp_path / f"{step - 1}/last.ckpt" if step > 1 else None
        resumed = run("on policy", tmp_path / f"{step}", last, updates=step)
    found = difference(whole, resumed)
    assert found is None, found


# A batch makes 4 calls of the rollout, 3 of the sweep and the loss's; 3 batches are accumulated.
@pytest.mark.parametrize(
    ("kind", "call", "number"),
    [
        ("on policy", 2, signal.SIGTERM), ("on policy", 21, signal.SIGTERM), ("on policy", 23, signal.SIGINT),
        ("accumulated", 29, signal.SIGTERM), ("accumulated", 50, signal.SIGTERM), ("replayed", 30, signal.SIGTERM),
        ("end points", 20, signal.SIGTERM),
    ],
)  # fmt: skip
def test_a_signal_drops_the_rollout_in_hand(
    kind: str, call: int, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, told = signal.getsignal(signal.SIGTERM), Told(number, call)
    with pytest.raises(SystemExit) as left:
        run(kind, tmp_path / "told", callbacks=[told])
    assert left.value.code == 128 + number and told.calls == call, "not one call more"
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"go on with the same command and --ckpt_path {tmp_path}/told/last.ckpt" in capsys.readouterr().err
    resumed = run(kind, tmp_path / "told", tmp_path / "told/last.ckpt")
    found = difference(run(kind, tmp_path / "whole"), resumed)
    assert found is None, found


@pytest.mark.parametrize(("kind", "step"), [("on policy", 4), ("on policy", 2), ("accumulated", 2)])
def test_a_signal_before_the_first_update_of_a_resumed_run(kind: str, step: int, tmp_path: Path) -> None:
    """Among them runs that were saved at the end of an epoch, twice over."""
    whole = run(kind, tmp_path / "whole")
    last = tmp_path / f"whole/step={step}.ckpt"
    for again in range(2):
        with pytest.raises(SystemExit):
            run(kind, tmp_path / f"{again}", last, callbacks=[Told(signal.SIGTERM, 2)])
        last = tmp_path / f"{again}/last.ckpt"
    found = difference(whole, run(kind, tmp_path / "end", last))
    assert found is None, found


def test_without_checkpoints_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, sampler, data, _ = make("on policy")
    fit = trainer([sampler, Told(signal.SIGTERM, 3)], max_steps=3, default_root_dir=tmp_path, limit_val_batches=0)
    with pytest.raises(SystemExit):
        fit.fit(module, data)
    assert "keeps no checkpoints" in capsys.readouterr().err and not list(tmp_path.iterdir())


class Endless(IterableDataset[list[str]]):
    """No length."""

    def __iter__(self) -> Any:
        while True:
            yield ["a", "bb"]


class Listed(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return PROMPTS[i]


@RESUMED
@pytest.mark.parametrize(
    ("loader", "culprit"),
    [
        (lambda: DataLoader(Endless(), batch_size=None), "has no length"),
        (lambda: DataLoader(Listed(), batch_size=2, collate_fn=list), "does not know its place"),
        (lambda: DataLoader(Listed(), batch_size=3, collate_fn=list, shuffle=True), "shuffles by a random state"),
    ],
)
def test_loaders_that_cannot_go_on_exactly_are_named(loader: Any, culprit: str, tmp_path: Path) -> None:
    # The last one has two batches an epoch: its checkpoint is at the end of one.
    def go(resume: Path | None = None, exact: bool = True) -> None:
        module, _, _, _ = make("on policy")
        sampler = TrajectorySampler(steps=3, samples_per_condition=1, exact_resume=exact)
        every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
        fit = trainer([sampler, every], enable_checkpointing=True, max_steps=4 if resume else 2)
        fit.fit(module, loader(), ckpt_path=resume)

    go()
    with pytest.raises(ValueError, match=f"cannot go on exactly: .*{culprit}.*exact_resume: false"):
        go(tmp_path / "last.ckpt")
    go(tmp_path / "last.ckpt", exact=False)


def test_a_path_in_a_checkpoint_is_not_written_to(tmp_path: Path) -> None:
    run("on policy", tmp_path, updates=2)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (key,) = (k for k in content["callbacks"] if k.startswith("ModelCheckpoint"))
    victim = tmp_path.parent / "victim.txt"
    victim.write_text("mine")
    content["callbacks"][key]["last_model_path"] = str(victim)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(SystemExit):
        run("on policy", tmp_path, tmp_path / "last.ckpt", callbacks=[Told(signal.SIGTERM, 2)])
    assert victim.read_text() == "mine"


def test_after_a_fit_signals_are_whose_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run("on policy", tmp_path, updates=1)
    assert signal.getsignal(signal.SIGTERM) == before


@RESUMED
def test_what_only_looks_needs_nothing_of_another_loss(tmp_path: Path) -> None:
    run("log Z", tmp_path, updates=1)
    task, sampler, data, _ = make("levels")
    fit = trainer([sampler])
    fit.validate(task, data, ckpt_path=tmp_path / "last.ckpt")
    assert torch.isfinite(fit.callback_metrics["val/reward"])
    task, sampler, data, _ = make("levels")
    with pytest.raises(ValueError, match="another loss"):
        trainer([sampler], max_steps=2).fit(task, data, ckpt_path=tmp_path / "last.ckpt")

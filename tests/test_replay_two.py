"""A buffer is the same on any number of processes: what it holds, what is drawn, and whoever goes on with it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import in_two
from quiet import RESUMED
from test_resume import make
from toys import Recorder, SumReward, trainer

from lightning_tilt.callbacks.buffer import dealt
from lightning_tilt.data import DrawsDataModule, PromptDataModule
from lightning_tilt.trajectory import Trajectory

pytestmark = [pytest.mark.slow, RESUMED]

LEFT, END = 5, 8
KINDS = ["end points", "replayed"]
"""Adjoint Sampling, whose updates mix rollouts of a density; Adjoint Matching, which draws whole ones, of prompts."""


def go(folder: Path, name: str, kind: str, world: int, resume: str | None = None) -> None:
    module, sampler, data, _ = make(kind)
    if kind == "end points":
        data = DrawsDataModule(samples=8 // world, batches=3)
        sampler.replay_samples = 12 // world
    else:
        data = PromptDataModule(["a", "bb", "ccc", "dddd", "e", "ff", "ggg", "hhhh"], batch_size=4 // world)
        module.reward = SumReward()  # draws nothing from the processes' own generators
    seen = Recorder()
    keep = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    both: dict[str, Any] = {"strategy": "ddp", "devices": 2, "num_nodes": 1} if world == 2 else {}
    fit = trainer([sampler, seen, keep], enable_checkpointing=True, max_steps=END, limit_val_batches=0, **both)
    fit.fit(module, data, ckpt_path=None if resume is None else folder / f"{resume}/step={LEFT}.ckpt")
    record = {
        "gradients": seen.gradients,
        "said": module._said,
        "weights": {n: p.detach() for n, p in module.named_parameters() if p.requires_grad},
        "drawn": [torch.cat([p.sample[:, None].to(p.end), p.end.flatten(1)], 1) for p in seen.trajectories],
    }
    torch.save(record, folder / f"{name}{fit.global_rank}.pt")


def of_two(rank: int, folder: Path) -> None:
    for kind in KINDS:
        go(folder, f"{kind} two", kind, 2)
        go(folder, f"{kind} one two", kind, 2, f"{kind} one")
        go(folder, f"{kind} two two", kind, 2, f"{kind} two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("replayed")
    for kind in KINDS:
        go(folder, f"{kind} one", kind, 1)
    in_two(of_two, folder)
    for kind in KINDS:
        go(folder, f"{kind} two one", kind, 1, f"{kind} two")
    yield folder


def kept(file: Path) -> list[Trajectory]:
    """The rollouts of a checkpoint's buffer, of all processes together."""
    state = torch.load(file, weights_only=True)["callbacks"]["TrajectorySampler"]
    parts = [part["buffer"] for part in state["ranks"] if part["buffer"]]
    records = dealt(parts, state["samples_per_condition"], 1, 0)
    return [Trajectory.from_dict({k: v for k, v in r.items() if k != "uses"}) for r in records]


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_hold_the_same(kind: str, folder: Path) -> None:
    for step in (LEFT, END):
        one = kept(folder / f"{kind} one/step={step}.ckpt")
        assert len(one) == 2 if kind == "end points" else len(one) > 1
        for other in ("two", "one two", "two one", "two two"):
            if step == LEFT and other != "two":
                continue
            both = kept(folder / f"{kind} {other}/step={step}.ckpt")
            assert [t.rollout for t in both] == [t.rollout for t in one]
            for mine, theirs in zip(one, both, strict=True):
                assert torch.equal(mine.sample, theirs.sample) and mine.prompts == theirs.prompts
                torch.testing.assert_close(theirs.states, mine.states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", ["two", "one two", "two one", "two two"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replayed_and_learnt_is_the_same(kind: str, other: str, folder: Path) -> None:
    """Two processes, and runs named `who left it who went on`, against one process without a break."""
    one = torch.load(folder / f"{kind} one0.pt", weights_only=True)
    parts = [torch.load(file, weights_only=True) for file in sorted(folder.glob(f"{kind} {other}[01].pt"))]
    assert len(parts) == (1 if other.endswith("one") else 2)
    if kind == "end points":
        said = "One update trains on 12 samples: 12 replayed end points"
        assert parts[0]["said"] == said + " over 2 processes" * (len(parts) - 1)
    first = 0 if other == "two" else LEFT
    for step in range(first, END):
        drawn = torch.cat([part["drawn"][step - first] for part in parts])
        # In the order of sample and first coordinate: several rollouts have the same numbers.
        mine, theirs = (d[sorted(range(len(d)), key=lambda i: d[i, :2].tolist())] for d in (one["drawn"][step], drawn))
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)
        for name, gradient in one["gradients"][step].items():
            largest = float(gradient.abs().max())
            for part in parts:
                torch.testing.assert_close(
                    part["gradients"][step - first][name], gradient, rtol=1e-4, atol=max(1e-5 * largest, 1e-7)
                )
    left = torch.load(folder / f"{kind} one/step={LEFT}.ckpt", weights_only=True)["state_dict"]
    for name, weight in one["weights"].items():
        torch.testing.assert_close(parts[0]["weights"][name], weight, rtol=1e-4, atol=1e-5)
    assert max(float((left[name] - weight).abs().max()) for name, weight in one["weights"].items()) > 1e-3

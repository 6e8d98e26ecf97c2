"""NaN and infinity, wherever they come from: named, skipped or refused, by all processes alike, and never kept."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import free_port
from torch import Tensor
from torch.utils.data import DataLoader
from toys import PromptedNet, Recorder, SumReward, fit, trainer

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.data import PromptDataModule
from lightning_tilt.data.loader import Loader
from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards import Constraint
from lightning_tilt.tasks import AdjointMatchingTask, EfficientAdjointMatchingTask
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import DDIM

BATCHES = [["one", "three"], ["seven", "nine"], ["two", "eleven"], ["four", "six"]]


class BadAdjoint(AdjointMatchingTask):
    """The sweep overflows for one prompt."""

    def prepare(self, trajectory: Trajectory) -> Trajectory:
        path = super().prepare(trajectory)
        assert path.adjoint is not None and path.prompts is not None
        hit = torch.tensor([p == "three" for p in path.prompts])[None, :, None]
        return replace(path, adjoint=torch.where(hit, torch.inf, path.adjoint))


class BadLoss(AdjointMatchingTask):
    """A loss that is not finite, or whose gradient is not, where the batch has a certain prompt."""

    where = "loss"
    prompts = ("seven", "bb")

    def loss(self, trajectory: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logged = super().loss(trajectory)
        assert trajectory.prompts is not None
        if not set(self.prompts) & set(trajectory.prompts):
            return loss, logged
        if self.where == "loss":
            return loss * torch.inf, logged
        return loss + (loss * 0).sqrt(), logged


class Bad(Reward):
    """NaN for some prompts."""

    needs_prompts = True

    def __init__(self, *prompts: str) -> None:
        super().__init__()
        self.bad = prompts

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        assert prompts is not None
        hit = torch.tensor([p in self.bad for p in prompts])
        return torch.where(hit, torch.nan, 1.0) * images.flatten(1).sin().sum(1)


def make(kind: Any = AdjointMatchingTask, reward: Reward | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    settings: dict[str, Any] = {"lam": 2.0, "optimizer": lambda p: torch.optim.Adam(p, lr=0.1)} | kwargs
    return kind(predictor=PromptedNet(RectifiedFlow()), reward=reward or SumReward(), **settings)


def sampler(**kwargs: Any) -> TrajectorySampler:
    return TrajectorySampler(**({"steps": 4, "samples_per_condition": 2} | kwargs))


class Watch(lightning.Callback):
    """The weights before each batch, and at the end."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.skipped: list[float] = []

    def on_train_batch_start(self, run: Any, module: Any, *args: Any) -> None:
        self.seen.append(torch.cat([p.detach().flatten() for p in module.predictor.parameters()]))

    def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
        self.skipped.append(float(run.callback_metrics.get("train/skipped", torch.zeros(()))))

    on_train_end = on_train_batch_start

    @property
    def moved(self) -> list[bool]:
        return [not torch.equal(a, b) for a, b in zip(self.seen, self.seen[1:], strict=False)]


def test_an_adjoint_that_overflows_is_named() -> None:
    line = (
        r"^2 of 4 samples of train rollout 0 have the adjoint that is not finite \(optimiser step 0, rank 0\): "
        r"'three'\. Mend the reward, or pass sampler\.on_bad_reward: skip\.$"
    )
    with pytest.raises(FloatingPointError, match=line):
        fit(make(BadAdjoint), sampler(), BATCHES[:1])


def test_an_adjoint_that_overflows_is_skipped_as_if_it_were_not_there() -> None:
    skipped = fit(make(BadAdjoint), sampler(on_bad_reward="skip"), BATCHES[:1])
    alone = fit(make(BadAdjoint), sampler(), [["one"]])
    path = skipped.trajectories[0]
    assert path.weight.tolist() == [1, 1, 0, 0] and not path.adjoint[:, 2:].any() and not path.states[:, 2:].any()
    for name, gradient in alone.gradients[0].items():
        torch.testing.assert_close(skipped.gradients[0][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("loss", "the loss is not finite"),
        ("gradient", "the gradient of the loss, a mean over all processes, is not finite"),
    ],
)
def test_a_loss_that_is_not_finite_is_named(where: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BadLoss, "where", where)
    line = rf"^{said} \(optimiser step 1, rank 0\): rollout 1 with 'nine', 'seven'\. Lower lam .*on_bad_reward: skip"
    with pytest.raises(FloatingPointError, match=line):
        fit(make(BadLoss), sampler(), BATCHES)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BadLoss, "where", where)
    watch, module = Watch(), make(BadLoss)
    fit(module, sampler(on_bad_reward="skip"), BATCHES, callbacks=[watch], gradient_clip_val=1.0)
    assert watch.moved == [True, False, True, True] and watch.skipped == [0, 1, 1, 1]
    assert bool(watch.seen[-1].isfinite().all())
    # The count goes on after a resume.
    keep = ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=2)
    for steps, path in ((2, None), (3, tmp_path / "a.ckpt")):
        run = trainer([sampler(on_bad_reward="skip"), keep], max_steps=steps, enable_checkpointing=True)
        run.fit(make(BadLoss), Loader(dataset=BATCHES, batch_size=None), ckpt_path=path)
    assert float(run.callback_metrics["train/skipped"]) == 1


def test_a_window_of_batches_is_judged_as_one() -> None:
    """One bad loss spoils the sum of its window; a batch without a good sample only adds nothing to it."""
    watch = Watch()
    fit(make(BadLoss), sampler(on_bad_reward="skip"), BATCHES, callbacks=[watch], max_steps=2,
        accumulate_grad_batches=2)  # fmt: skip
    assert watch.moved == [False, False, False, True] and watch.skipped[-1] == 1
    watch = Watch()
    fit(make(reward=Bad("seven", "nine", "two", "eleven")), sampler(on_bad_reward="skip"), BATCHES, callbacks=[watch],
        max_steps=2, accumulate_grad_batches=2)  # fmt: skip
    assert watch.moved == [False, True, False, True] and watch.skipped[-1] == 0
    watch = Watch()
    fit(make(reward=Bad("seven", "nine", "one", "three")), sampler(on_bad_reward="skip"), BATCHES, callbacks=[watch],
        max_steps=2, accumulate_grad_batches=2)  # fmt: skip
    assert watch.moved == [False, False, False, True] and watch.skipped == [0, 1, 1, 1]
    with pytest.raises(FloatingPointError, match=r"optimiser step 0, rank 0\): rollout 1 with 'nine', 'seven'\. "):
        fit(make(BadLoss), sampler(), BATCHES, max_steps=2, accumulate_grad_batches=2)


def test_the_buffer_keeps_no_bad_sample() -> None:
    """Whole rollouts: zeros of weight 0 in its place; without one good sample the rollout is not kept at all."""
    reward = Bad("three", "two", "eleven")
    steps = sampler(rollout_every=2, buffer_size=3, on_bad_reward="skip")
    recorder = fit(make(reward=reward), steps, [b for b in BATCHES for _ in (0, 1)])
    kept = steps._buffer._rollouts
    assert [p.rollout for p in recorder.trajectories[::2]] == [0, 1, 2, 3]
    assert [p.rollout for p in kept] == [0, 1, 3]
    assert [p.weight.tolist() for p in kept] == [[1, 1, 0, 0], [1] * 4, [1] * 4]
    assert recorder.trajectories[4].weight.sum() == 0 and recorder.trajectories[5].rollout in (0, 1)
    for path in kept:
        for value in (path.states, path.reward, path.reward_gradient, path.adjoint, path.base_mean, path.log_w):
            assert value is not None and bool(value.isfinite().all())
        assert not path.states[:, path.weight == 0].any()


def test_only_good_samples_are_drawn_from_a_buffer_of_end_points() -> None:
    reward = Bad("three", "two", "eleven", "one")
    ode = {"transition": DDIM(0.0), "base_last_step": False, "samples_per_condition": 4}
    steps = sampler(rollout_every=1, buffer_size=3, replay_samples=6, on_bad_reward="skip", **ode)
    watch = Watch()
    recorder = fit(make(EfficientAdjointMatchingTask, reward), steps, BATCHES, callbacks=[watch])
    assert all(bool(p.end.isfinite().all()) for p in recorder.trajectories)
    # Nothing good in the first rollout: there is nothing to draw from, and no update.
    assert recorder.trajectories[0].weight.sum() == 0 and watch.moved[0] is False and all(watch.moved[1:])
    assert all(p.weight.tolist() == [1] * 6 for p in recorder.trajectories[1:])
    assert len(steps._buffer) == 2


# -- two processes


PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh"]


def run(case: str, policy: Any, batch_size: int, folder: Path, name: str, **kwargs: Any) -> None:
    """Two updates, with one bad prompt in one batch of one process."""
    rewards = {
        "reward": Bad("bb"),
        "validate": Bad("bb"),
        "constraint": Constraint(Bad("bb"), SumReward(), at_least=3.0, step=0.1),
    }
    module = make(BadLoss if case == "loss" else AdjointMatchingTask, rewards.get(case),
                  optimizer=lambda p: torch.optim.SGD(p, lr=0.1))  # fmt: skip
    recorder = Recorder()
    steps = TrajectorySampler(steps=4, samples_per_condition=3, seed=1, on_bad_reward=policy)
    look = {} if case == "validate" else {"limit_val_batches": 0}
    fitted = trainer([steps, recorder], max_steps=2, **look, **kwargs)
    record: dict[str, Any] = {"said": ""}
    try:
        fitted.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=batch_size))
    except FloatingPointError as error:
        record["said"] = str(error)
    record |= {
        "weights": {n: p.detach() for n, p in module.named_parameters()},
        "skipped": steps.skipped,
        "multiplier": float(module.reward.multiplier) if case == "constraint" else 0.0,
    }
    torch.save(record, folder / f"{name}{fitted.global_rank}.pt")


def one_of_two(rank: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for port, (case, policy) in zip(ports, CASES, strict=False):
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
        }  # fmt: skip
        run(case, policy, 2, folder, f"{case}_{policy}_two", strategy="ddp", devices=2, num_nodes=1)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


CASES = [("reward", "stop"), ("reward", "skip"), ("loss", "stop"), ("loss", "skip"), ("constraint", "skip"),
         ("validate", "stop")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*they are left out")
def test_two_processes_decide_together(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (tmp_path, [free_port() for _ in CASES]), nprocs=2)
    for case, policy in CASES:
        first, second = (torch.load(tmp_path / f"{case}_{policy}_two{r}.pt", weights_only=True) for r in (0, 1))
        assert first["said"] == second["said"] and first["skipped"] == second["skipped"]
        assert first["multiplier"] == second["multiplier"]
        if policy == "stop":
            assert re.search(r"not finite \(optimiser step [01], rank [01]\): .*'bb'", first["said"])
            assert first["said"].count("rank") == 1, "who has nothing bad is not named"
            continue
        run(case, policy, 4, tmp_path, f"{case}_{policy}_one")
        one = torch.load(tmp_path / f"{case}_{policy}_one0.pt", weights_only=True)
        assert first["skipped"] == one["skipped"] == (1 if case == "loss" else 0)
        assert first["multiplier"] == pytest.approx(one["multiplier"], rel=1e-5)
        assert case != "constraint" or one["multiplier"] > 0.1
        for name, value in one["weights"].items():
            torch.testing.assert_close(first["weights"][name], value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(second["weights"][name], value, rtol=1e-5, atol=1e-6)


def test_fp16s_scaler_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow of the scaled gradient is no error: the scaler makes no update."""
    monkeypatch.setattr(BadLoss, "where", "gradient")
    watch, module = Watch(), make(BadLoss)
    steps = sampler()
    run = trainer([steps, watch], max_steps=2)
    monkeypatch.setattr(type(run), "precision", property(lambda self: "16-mixed"))
    run.fit(module, DataLoader(BATCHES[:2], batch_size=None))
    assert steps.skipped == 1

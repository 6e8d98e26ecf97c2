"""Checkpoints from which a fit cannot go on, or not exactly: one line names what is missing or has changed."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TOY, overlay, tilt
from test_resume import PROMPTS, make, run
from toys import trainer

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.checkpoints import read_checkpoint
from lightning_tilt.cli_checkpoint import changed_settings
from lightning_tilt.data import DrawsDataModule, PromptDataModule

Spoil = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run of two updates, in mid-epoch."""
    folder = tmp_path_factory.mktemp("first")
    run("on policy", folder, updates=2)
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the command line."""
    folder = tmp_path_factory.mktemp("finished")
    assert tilt("fit", *overlay(TOY, folder)).status == 0
    return folder


def spoilt(path: Path, folder: Path, spoil: Spoil) -> Path:
    content = torch.load(path, weights_only=True)
    spoil(content)
    torch.save(content, folder / "spoilt.ckpt")
    return folder / "spoilt.ckpt"


def go_on(path: Path, stage: str = "fit", data: Any = None, optimizer: Any = None, **sampler: Any) -> None:
    module, _, prompts, _ = make("on policy")
    if optimizer is not None:
        module._optimizer = optimizer
    few = TrajectorySampler(steps=4, samples_per_condition=2, seed=5, **sampler)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware")
        getattr(trainer([few], max_steps=3, limit_val_batches=0), stage)(module, data or prompts, ckpt_path=path)


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (lambda c: c.pop("callbacks"), "no state of the TrajectorySampler"),
        (lambda c: c["callbacks"].pop("TrajectorySampler"), "no state of the TrajectorySampler"),
        (lambda c: c.pop("base"), "does not say which base it is of"),
        (lambda c: c.pop("loss"), "no state of the loss"),
    ],
)
def test_what_exactness_needs_is_asked_for(spoil: Spoil, culprit: str, first: Path, tmp_path: Path) -> None:
    path = spoilt(first, tmp_path, spoil)
    with pytest.raises(ValueError, match=f"cannot go on exactly: .*{culprit}.*exact_resume: false"):
        go_on(path)
    with pytest.warns(UserWarning, match=culprit):
        go_on(path, exact_resume=False)
    go_on(path, "validate")


@pytest.mark.parametrize("keys", [("optimizer_states", "lr_schedulers"), ("loops",), ("lr_schedulers",)])
def test_weights_alone_are_no_place_to_go_on_from(keys: tuple[str, ...], first: Path, tmp_path: Path) -> None:
    path = spoilt(first, tmp_path, lambda c: [c.pop(key) for key in keys])
    with pytest.raises(ValueError, match=f"no {' and no '.join(keys)}: .* save_weights_only: false"):
        go_on(path, exact_resume=False)
    go_on(path, "test")


@pytest.mark.parametrize(
    ("key", "value"), [("hyper_parameters", 5), ("state_dict", []), ("callbacks", []), ("optimizer_states", {})]
)
def test_a_part_of_another_kind_is_damage(key: str, value: Any, first: Path, tmp_path: Path) -> None:
    path = spoilt(first, tmp_path, lambda c: c.update({key: value}))
    with pytest.raises(ValueError, match=f"is damaged: its {key} is a {type(value).__name__}, not a"):
        read_checkpoint(path)
    result = tilt("fit", *overlay(TOY, tmp_path / "run"), "--ckpt_path", path)
    assert result.status == 1 and len(result.errors) == 1 and "is damaged" in result.errors[0]


def test_states_without_their_content_are_damage(first: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is damaged: its loops do not say how far a fit was"):
        go_on(spoilt(first, tmp_path, lambda c: c["loops"].update(fit_loop=[])))
    with pytest.raises(ValueError, match="is damaged: the state of TrajectorySampler in it is no dict"):
        read_checkpoint(spoilt(first, tmp_path, lambda c: c["callbacks"].update(TrajectorySampler=5)))
    with pytest.raises(ValueError, match="is damaged: the sampler's state in it has no seed"):
        go_on(spoilt(first, tmp_path, lambda c: c["callbacks"]["TrajectorySampler"].pop("seed")))


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_weights_that_are_not_finite_are_named(stage: str, first: Path, tmp_path: Path) -> None:
    path = spoilt(first, tmp_path, lambda c: c["state_dict"]["predictor.network.0.bias"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"weights are not finite: predictor\.network\.0\.bias; take an earlier"):
        go_on(path, stage)


def test_another_optimizer_is_named(first: Path) -> None:
    with pytest.raises(
        ValueError, match=r"another optimizer than SGD: it has amsgrad, betas, .* and no dampening, mom"
    ):
        go_on(first, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    go_on(first, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))


def test_batches_of_another_size_are_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was 2, and now it is 3\. Give it data\.batch_size 2; .*exact_resume"):
        go_on(first, data=PromptDataModule(PROMPTS, batch_size=3))
    with pytest.warns(UserWarning, match="was 2, and now it is 3"):
        go_on(first, data=PromptDataModule(PROMPTS, batch_size=3), exact_resume=False)
    draws = DrawsDataModule(samples=4)
    draws.trainer = trainer([TrajectorySampler()])
    draws.trainer.state.fn = "fit"  # type: ignore[assignment]
    draws.load_state_dict(draws.state_dict())
    with pytest.raises(ValueError, match=r"was 8, and now it is 4\. Give it data\.samples 8"):
        draws.load_state_dict({"batch": 8})


def test_changed_settings_are_told(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    args = [*overlay(TOY, folder, trainer={"max_steps": 3}), "--ckpt_path", folder / "checkpoints/last.ckpt"]
    changed = r"checkpoint's: model\.reward: QuadraticReward -> LinearReward; sampler\.steps: 3 -> 4$"
    flags = ["--model.reward", "LinearReward", "--model.reward.b", "[1.0,0.0]", "--sampler.steps", "4"]
    with pytest.warns(UserWarning, match=changed):
        assert tilt("fit", *args, *flags).status == 0


def test_settings_are_compared_by_name() -> None:
    one = {
        "hyper_parameters": {"lam": 1.0, "reward": {"class_path": "a.B", "init_args": {"c": [1, 2]}}},
        "settings": {},
    }
    other = {"hyper_parameters": {"lam": 2.0, "reward": {"class_path": "a.B", "init_args": {"c": [3]}}}, "settings": {}}
    assert changed_settings(one, one) == changed_settings({}, one) == []
    assert changed_settings(one, other) == ["model.lam: 1.0 -> 2.0", "model.reward.c: [1, 2] -> [3]"]

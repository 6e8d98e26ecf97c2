"""The metrics.csv of a fit that was interrupted reads like that of one that was not."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet import RESUMED
from test_resume import Told, difference, make, run
from toys import trainer

from lightning_tilt.callbacks import ExponentialMovingAverage
from lightning_tilt.loggers import RunLogger, read_metrics


def logged(kind: str, folder: Path, resume: Path | None = None, **kwargs: Any) -> dict[str, Any]:
    return run(kind, folder, resume, logger=RunLogger(folder), log_every_n_steps=1, **kwargs)


def rows(folder: Path) -> list[dict[str, float]]:
    """Without empty cells, and without what the clock says."""
    columns = {k: v for k, v in read_metrics(folder / "metrics.csv").items() if "seconds" not in k}
    return [
        {k: v for k, v in zip(columns, row, strict=True) if v == v} for row in zip(*columns.values(), strict=True)
    ]  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {
    "on policy": {},
    "accumulated": {"check_val_every_n_epoch": None, "val_check_interval": 4},  # also between two updates
    "replayed": {"val_check_interval": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_after_the_checkpoint_are_not_repeated(kind: str, tmp_path: Path) -> None:
    logged(kind, tmp_path / "whole", **KINDS[kind])
    expected = rows(tmp_path / "whole")
    assert sum("val/reward" in row for row in expected) >= 1 and sum("train/loss" in row for row in expected) == 7
    for step in range(1, 7):
        shutil.copytree(tmp_path / "whole", tmp_path / f"{step}")
        logged(kind, tmp_path / f"{step}", tmp_path / f"whole/step={step}.ckpt", **KINDS[kind])
        assert rows(tmp_path / f"{step}") == expected, f"from update {step}"


# An epoch has four batches of 10 calls, its validation four of 4; it leaves before the call after the signal.
@pytest.mark.parametrize(("call", "validated"), [(41, 0), (55, 0), (56, 1)])
def test_a_validation_that_was_interrupted_is_made(call: int, validated: int, tmp_path: Path) -> None:
    whole = logged("on policy", tmp_path / "whole")
    with pytest.raises(SystemExit):
        logged("on policy", tmp_path / "told", callbacks=[Told(signal.SIGTERM, call)])
    assert sum("val/reward" in row for row in rows(tmp_path / "told")) == validated
    last = tmp_path / "told/last.ckpt"
    if not validated:  # and so is that of the run that goes on
        with pytest.raises(SystemExit):
            logged("on policy", tmp_path / "told", last, callbacks=[Told(signal.SIGTERM, 6)])
        assert torch.load(last, weights_only=True)["callbacks"]["TrajectorySampler"]["due"]
    counted = Told(signal.SIGTERM, 0)
    found = difference(whole, logged("on policy", tmp_path / "told", last, callbacks=[counted]))
    assert found is None, found
    assert rows(tmp_path / "told") == rows(tmp_path / "whole")
    assert counted.calls == 3 * 10 + 16 * (1 - validated)


@pytest.mark.parametrize("at_end", [True, False])
@RESUMED
def test_a_fit_goes_on_from_the_end_of_an_epoch(at_end: bool, tmp_path: Path) -> None:
    """Saved when the epoch is over, or when its validation is."""
    whole = logged("on policy", tmp_path / "whole")

    def go(updates: int, resume: Path | None = None) -> None:
        module, sampler, data, _ = make("on policy")
        keep = ModelCheckpoint(tmp_path, filename="{step}", save_on_train_epoch_end=at_end, save_top_k=-1)
        last = ModelCheckpoint(tmp_path, every_n_train_steps=7, filename="end")
        fit = trainer(
            [sampler, ExponentialMovingAverage(0.9), keep, last], enable_checkpointing=True, max_steps=updates,
            num_sanity_val_steps=0, logger=RunLogger(tmp_path), log_every_n_steps=1,
        )  # fmt: skip
        fit.fit(module, data, ckpt_path=resume)

    go(6)
    go(7, tmp_path / "step=4.ckpt")
    end = torch.load(tmp_path / "end.ckpt", weights_only=True)
    for key, value in whole["state_dict"].items():
        assert torch.equal(end["state_dict"][key], value)
    assert rows(tmp_path) == rows(tmp_path / "whole")

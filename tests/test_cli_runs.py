"""A run's folder and its checkpoints: nothing is lost, and what was saved is enough to go on."""

import json
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import PICTURES, TOY, overlay, tilt

from lightning_tilt.callbacks import TiltReport
from lightning_tilt.loggers import read_metrics
from lightning_tilt.rewards import QuadraticReward
from lightning_tilt.tasks import AdjointMatchingTask

OUTPUTS = ("config.yaml", "metrics.csv", "report.json", *PICTURES, "checkpoints/last.ckpt")
DRAWS = ("--data", "DrawsDataModule", "--data.samples", 8, "--data.batches", 4, "--data.val_samples", 16)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy run of two updates: read it, or copy it."""
    folder = tmp_path_factory.mktemp("finished")
    result = tilt("fit", *overlay(TOY, folder))
    assert result.status == 0, result.err
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in its own folder: a copy would be a folder that was moved."""
    assert tilt("fit", *overlay(TOY, tmp_path / "run")).status == 0
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def test_checkpoint_is_plain_data_and_loads(finished: Path) -> None:
    path = finished / "checkpoints/last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["_class_path"] == "lightning_tilt.tasks.AdjointMatchingTask"
    task = AdjointMatchingTask.load_from_checkpoint(path, weights_only=True)
    assert isinstance(task.reward, QuadraticReward) and task.lam.lam == 1.0
    mine = task.state_dict()
    assert set(mine) == set(saved["state_dict"]) and all(k.startswith("predictor.") for k in mine)
    assert all(torch.equal(mine[name], value) for name, value in saved["state_dict"].items())
    assert task.configure_optimizers()["optimizer"].param_groups[0]["betas"] == (0.9, 0.95)


def test_flags_and_files_beat_the_hyperparameters_of_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "lam.yaml").write_text("model: {init_args: {lam: 30.0}}")
    args = ["fit", "--ckpt_path", finished / "checkpoints/last.ckpt", "--data", "DrawsDataModule", "--print_config"]

    def model(*flags: object) -> Any:
        return tilt(*args, *flags).config["model"]

    assert model("--model.lam", 50)["init_args"]["lam"] == 50.0
    assert model("--config", tmp_path / "lam.yaml")["init_args"]["lam"] == 30.0
    assert model("--config", tmp_path / "lam.yaml", "--model.lam=60")["init_args"]["lam"] == 60.0
    alone = model()
    assert alone["class_path"] == "lightning_tilt.tasks.AdjointMatchingTask" and alone["init_args"]["lam"] == 1.0
    assert alone["init_args"]["reward"]["init_args"]["c"] == [-0.5, 1.0]
    assert alone == yaml.safe_load((finished / "config.yaml").read_text())["model"]


def test_a_checkpoint_alone_rebuilds_the_model(finished: Path, tmp_path: Path) -> None:
    path = finished / "checkpoints/last.ckpt"
    sampler = ["--sampler.steps", 3, "--sampler.samples_per_condition", 1]
    flags = [*DRAWS, *sampler, "--trainer.default_root_dir", tmp_path]
    rebuilt = tilt("test", "--ckpt_path", path, *flags)
    assert rebuilt.status == 0, rebuilt.err
    named = tilt("test", "--config", TOY, "--ckpt_path", path, *flags)
    untrained = tilt("test", "--config", TOY, *flags)

    def reward(result: Any) -> str:
        found = re.search(r"test/reward[\s│]+(-?[\d.]+)", result.out)
        assert found is not None
        return found[1]

    assert reward(rebuilt) == reward(named) != reward(untrained)


def test_looking_at_a_run_changes_nothing_in_it(copied: Path) -> None:
    before = contents(copied)
    for command in ("validate", "test", "predict"):
        args = [*overlay(TOY, copied), "--ckpt_path", copied / "checkpoints/last.ckpt"]
        assert tilt(command, *args).status == 0
    after = contents(copied)
    assert {name for name in OUTPUTS if after[name] != before[name]} <= {"metrics.csv"}
    # Rows are added below the others, columns beside them.
    rows = read_metrics(copied / "metrics.csv")
    assert rows["train/loss"][:2] == read_metrics_of(before)["train/loss"]
    assert sum(v == v for v in rows["val/reward"]) == sum(v == v for v in rows["test/reward"]) == 1


def read_metrics_of(before: dict[str, bytes]) -> dict[str, list[float]]:
    header, *rows = [line.split(",") for line in before["metrics.csv"].decode().split()]
    return {name: [float(row[i]) for row in rows] for i, name in enumerate(header)}


def test_a_second_run_moves_the_first_aside(copied: Path) -> None:
    (copied / "notes.txt").write_text("mine")
    first = contents(copied)
    second = tilt("fit", *overlay(TOY, copied), "--model.lam", 2)
    assert second.status == 0 and contents(copied / "previous/001") == first
    assert json.loads((copied / "report.json").read_text())["lam"] == 2
    between = contents(copied)
    assert tilt("fit", *overlay(TOY, copied)).status == 0
    assert contents(copied / "previous/002") == between and contents(copied / "previous/001") == first
    # The third run repeats the first: the same numbers, but for the time they took.
    third, once = ({k: v for k, v in found.items() if "second" not in k} for found in (
        read_metrics(copied / "metrics.csv"), read_metrics(copied / "previous/001/metrics.csv")
    ))  # fmt: skip
    assert third == once
    assert (copied / "notes.txt").read_text() == "mine"


def test_a_resumed_run_goes_on_and_keeps_what_was_there(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    args = overlay(TOY, run, trainer={"max_steps": 4})
    assert tilt("fit", *args, "--ckpt_path", run / "checkpoints/last.ckpt").status == 0
    assert not (run / "previous").exists()
    for name in ("config.yaml", "report.json", *PICTURES):
        kept = run / f"{Path(name).stem}.1{Path(name).suffix}"
        assert kept.read_bytes() == before[name] and (run / name).is_file()
    assert (run / "metrics.csv").read_bytes().startswith(before["metrics.csv"])
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.ckpt", "epoch=0-step=4.ckpt"}
    report = json.loads((run / "report.json").read_text())
    assert report["updates"] == 4

    # It is the run that would have gone on without a break.
    assert tilt("fit", *overlay(TOY, tmp_path / "straight", trainer={"max_steps": 4})).status == 0
    straight, resumed = (read_metrics(f / "metrics.csv") for f in (tmp_path / "straight", run))
    assert resumed["step"] == [0, 1, 2, 3]
    assert resumed["train/loss"] == pytest.approx(straight["train/loss"], rel=1e-6)
    whole = json.loads((tmp_path / "straight/report.json").read_text())
    assert report["evaluations"] == whole["evaluations"]
    assert report["reward_tuned"]["mean"] == pytest.approx(whole["reward_tuned"]["mean"], rel=1e-6)


def test_a_resumed_run_obeys_flags_and_moves_aside_as_one(run: Path) -> None:
    args = overlay(TOY, run, trainer={"max_steps": 3})
    with pytest.warns(UserWarning, match=r"other settings than its checkpoint's: model\.lam: 1\.0 -> 50\.0$"):
        assert tilt("fit", *args, "--ckpt_path", run / "checkpoints/last.ckpt", "--model.lam", 50).status == 0
    assert read_metrics(run / "metrics.csv")["train/lam"] == [1, 1, 50]
    assert json.loads((run / "report.json").read_text())["lam"] == 50
    assert tilt("fit", *overlay(TOY, run)).status == 0
    moved = {path.name for path in (run / "previous/001").iterdir()}
    assert {"report.json", "report.1.json", "config.1.yaml", "curves.1.png", "checkpoints"} <= moved
    assert not list(run.glob("*.1.*"))


@pytest.fixture
def sigint() -> Iterator[None]:
    """Lightning leaves interrupts ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("stage", ["_sample_base", "_write"])
def test_an_interrupt_of_a_report_says_how_to_go_on(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TiltReport, stage, interrupted)
    result = tilt("fit", *overlay(TOY, tmp_path))
    assert result.status == 128 + signal.SIGINT
    last = f"2 updates are made: the same command and --ckpt_path {tmp_path}/checkpoints/last.ckpt goes on"
    how = "fit begins anew" if stage == "_sample_base" else last
    assert result.err.endswith(f"\nlightning-tilt: stopped by SIGINT; {how}\n")


def test_what_samples_the_base_or_steers_nothing_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    folder = ("--trainer.default_root_dir", tmp_path, "--trainer.limit_predict_batches", 1)
    # Not pytest.warns, which says again, without its filter, what jsonargparse warns of the first time.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = tilt("predict", "--config", TOY, *DRAWS, *folder, "--smc.particles", 8)
    assert result.status == 0, result.err
    assert "--smc.particles: without --steering smc nothing is steered" in [str(w.message) for w in said]
    assert "No --ckpt_path: the model is as its config makes it, untrained by any run" in caplog.messages

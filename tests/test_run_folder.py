"""The run's folder: metrics are appended to, nothing is overwritten."""

import csv
import json
import math
from pathlib import Path

import pytest

from lightning_tilt.loggers import RunLogger, read_metrics
from lightning_tilt.run_folder import RUN_OUTPUTS, keep_previous, set_aside, write_csv, write_json


def test_metrics_get_columns_as_they_appear(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "run")
    logger.log_metrics({"a": 1.5}, 0)
    logger.log_metrics({"a": 2.5, "b": 3.0}, 1)
    logger.log_metrics({"b": 4.0}, 2)
    assert (logger.path, logger.log_dir, logger.save_dir) == (
        tmp_path / "run/metrics.csv",
        *[str(tmp_path / "run")] * 2,
    )
    assert logger.path.read_text().splitlines() == ["step,a,b", "0,1.5,", "1,2.5,3.0", "2,,4.0"]
    columns = read_metrics(logger.path)
    assert columns["step"] == [0, 1, 2] and columns["a"][:2] == [1.5, 2.5] and math.isnan(columns["a"][2])
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_metrics_of_a_resumed_run_are_appended(tmp_path: Path) -> None:
    RunLogger(tmp_path).log_metrics({"a": 1.0}, 0)
    before = (tmp_path / "metrics.csv").read_bytes()
    logger = RunLogger(tmp_path)
    logger.log_metrics({"a": 2.0}, 1)
    assert (tmp_path / "metrics.csv").read_bytes().startswith(before)
    logger.log_metrics({"c": 3.0}, 2)
    assert read_metrics(tmp_path / "metrics.csv")["a"][:2] == [1, 2]
    assert read_metrics(tmp_path / "metrics.csv")["c"][2] == 3


def test_metrics_cut_short_by_a_crash_are_still_read(tmp_path: Path) -> None:
    RunLogger(tmp_path).log_metrics({"a": 1.0, "b": 2.0}, 0)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1,2.5")
    columns = read_metrics(tmp_path / "metrics.csv")
    assert columns["a"] == [1.0, 2.5] and math.isnan(columns["b"][1])
    # The row that comes next starts a line of its own.
    RunLogger(tmp_path).log_metrics({"a": 3.0, "b": 4.0}, 2)
    assert read_metrics(tmp_path / "metrics.csv")["step"] == [0, 1, 2]
    assert read_metrics(tmp_path / "metrics.csv")["b"][2] == 4.0


def test_rows_that_come_again_are_dropped(tmp_path: Path) -> None:
    first = RunLogger(tmp_path)
    for step in range(4):
        first.log_metrics({"loss": step / 2}, step)
        if step % 2 == 1:
            first.log_metrics({"val": float(step)}, step)
    with first.path.open("a") as file:
        file.write("1")  # of step 12, cut short
    logger = RunLogger(tmp_path)
    logger.go_on_after(1)
    lines = ["step,loss,val", "0,0.0,", "1,0.5,", "1,,1.0"]
    assert logger.path.read_text().splitlines() == lines
    # What the checkpoint's last step writes again takes its place; other metrics of it, and all later ones, come after.
    logger.log_metrics({"val": 7.0}, 1)
    logger.log_metrics({"ess": 0.5}, 1)
    logger.log_metrics({"loss": 9.0}, 2)
    logger.log_metrics({"loss": 9.0}, 2)
    again = ["2,9.0,,", "2,9.0,,"]
    assert logger.path.read_text().splitlines() == [
        "step,loss,val,ess", "0,0.0,,", "1,0.5,,", "1,,7.0,", "1,,,0.5", *again,
    ]  # fmt: skip
    RunLogger(tmp_path / "nowhere").go_on_after(3)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.csv"}


def test_json_is_written_whole_and_earlier_ones_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    for i in range(3):
        write_json(path, {"i": i})
    kept = [path.parent / name for name in ("report.1.json", "report.2.json", "report.json")]
    assert [json.loads(file.read_text())["i"] for file in kept] == [0, 1, 2]
    with pytest.raises(TypeError):
        write_json(path, {"i": object()})
    assert json.loads(path.read_text()) == {"i": 2} and len(list(path.parent.iterdir())) == 3


def test_setting_aside_takes_the_first_free_number(tmp_path: Path) -> None:
    set_aside(tmp_path / "nothing.png")
    assert not list(tmp_path.iterdir())
    (tmp_path / "lora.1").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/weights").write_text("mine")
    set_aside(tmp_path / "lora")
    assert (tmp_path / "lora.2/weights").read_text() == "mine" and not (tmp_path / "lora").exists()


def test_previous_runs_are_numbered_and_strangers_stay(tmp_path: Path) -> None:
    assert keep_previous(tmp_path / "nowhere") is None and keep_previous(tmp_path) is None
    (tmp_path / "prompts.txt").write_text("mine")
    (tmp_path / "report.txt").write_text("mine")
    for count in (1, 2):
        for name in ("report.json", "report.1.json", "before_after.2.png", "metrics.csv"):
            (tmp_path / name).write_text(str(count))
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/last.ckpt").write_text(str(count))
        kept = keep_previous(tmp_path)
        assert kept == tmp_path / "previous" / f"00{count}"
        assert {p.name for p in kept.iterdir()} == {
            "report.json", "report.1.json", "before_after.2.png", "metrics.csv", "checkpoints",
        }  # fmt: skip
        assert (kept / "checkpoints/last.ckpt").read_text() == (kept / "report.json").read_text() == str(count)
    assert {p.name for p in tmp_path.iterdir()} == {"previous", "prompts.txt", "report.txt"}


def test_everything_that_callbacks_write_is_an_output_of_a_run() -> None:
    from lightning_tilt.callbacks import ExportWeights, PredictionWriter

    assert {ExportWeights().folder, PredictionWriter().folder, "report.json", "curves.png"} <= set(RUN_OUTPUTS)


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    texts = ["=cmd|' /C calc'!A0", "+1", "-x", "@SUM(1)", "a = b", '数字, "7"', -1.5, None]
    write_csv(tmp_path / "a.csv", [texts])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.reader(file)
    assert row == ["'=cmd|' /C calc'!A0", "'+1", "'-x", "'@SUM(1)", "a = b", '数字, "7"', "-1.5", ""]


@pytest.mark.parametrize("name", ["../../..", "..", "", ".", "/tmp/x", "a/b", "a/"])
def test_outputs_lie_in_the_folder_itself(name: str) -> None:
    from lightning_tilt.callbacks import ExportWeights, PredictionWriter

    for callback in (ExportWeights, PredictionWriter):
        with pytest.raises(ValueError, match=rf"{callback.__name__}\.folder is a name in the run's folder, and '"):
            callback(folder=name)

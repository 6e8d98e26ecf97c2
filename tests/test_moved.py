"""A run that goes on in a folder of another name: `last.ckpt` is its newest checkpoint, and no other run's is lost."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from command import TOY, overlay, tilt
from repository import ROOT
from test_resume import difference
from test_resume import run as fit


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two updates, started by a relative path."""
    folder = tmp_path_factory.mktemp("first")
    assert tilt("fit", *overlay(TOY, folder), "--trainer.default_root_dir", "run", cwd=folder).status == 0
    return folder / "run"


def step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def go_on(folder: Path, updates: int, checkpoint: Path | None = None, relative: bool = False) -> None:
    args = overlay(TOY, folder.parent / "config", trainer={"max_steps": updates})
    given = os.path.relpath(folder, ROOT) if relative else str(folder)
    source = checkpoint or f"{given}/checkpoints/last.ckpt"
    result = tilt("fit", *args, "--trainer.default_root_dir", given, "--ckpt_path", source)
    assert result.status == 0, result.err


@pytest.mark.parametrize("how", ["copied", "relative", "link", "moved twice"])
def test_a_run_goes_on_in_a_folder_of_another_name(how: str, first: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(first, tmp_path / "run")
    if how == "link":
        os.symlink(folder, tmp_path / "link")
        folder = tmp_path / "link"
    for updates in (3, 4):
        go_on(folder, updates, relative=how == "relative")
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert (
            names == {"last.ckpt", f"epoch=0-step={updates}.ckpt"} and step(folder / "checkpoints/last.ckpt") == updates
        )
        if how == "moved twice":
            folder = folder.rename(tmp_path / f"after{updates}")
    assert not (folder / "previous").exists() and len((folder / "metrics.csv").read_text().splitlines()) == 5


def test_branching_twice_keeps_both_branches(first: Path, tmp_path: Path) -> None:
    source = first / "checkpoints/last.ckpt"
    before = source.read_bytes()
    go_on(tmp_path / "branch", 3, source)
    go_on(tmp_path / "branch", 4)
    go_on(tmp_path / "branch", 3, source)
    go_on(tmp_path / "branch", 5)
    assert source.read_bytes() == before
    assert step(tmp_path / "branch/checkpoints/last.ckpt") == 5
    assert step(tmp_path / "branch/previous/001/checkpoints/last.ckpt") == 4
    assert not list((tmp_path / "branch").rglob("last-v*")) and not (tmp_path / "branch/previous/002").exists()


def test_without_the_command_line_the_other_branch_keeps_a_number(tmp_path: Path) -> None:
    fit("on policy", tmp_path / "first", updates=2)
    source = tmp_path / "first/last.ckpt"
    once = fit("on policy", tmp_path / "branch", source, updates=3)
    twice = fit("on policy", tmp_path / "branch", source, updates=4)
    kept = torch.load(tmp_path / "branch/last.1.ckpt", weights_only=True)
    assert twice["global_step"] == 4 and difference(once, kept) is None
    assert not list((tmp_path / "branch").glob("last-v*"))


def test_going_back_within_a_folder_writes_last_again(tmp_path: Path) -> None:
    fit("on policy", tmp_path, updates=3)
    assert fit("on policy", tmp_path, tmp_path / "step=1.ckpt", updates=2)["global_step"] == 2
    assert {path.name for path in tmp_path.glob("last*")} == {"last.ckpt"}


def test_a_path_that_climbs_out_is_not_carried_over(tmp_path: Path) -> None:
    fit("on policy", tmp_path / "first", updates=2)
    shutil.copytree(tmp_path / "first", tmp_path / "second/run")
    last = tmp_path / "second/run/last.ckpt"
    content = torch.load(last, weights_only=True)
    (key,) = (k for k in content["callbacks"] if k.startswith("ModelCheckpoint"))
    (tmp_path / "second/victim").write_text("mine")
    content["callbacks"][key]["kth_best_model_path"] = str(tmp_path / "first/../victim")
    content["callbacks"][key]["last_model_path"] = str(tmp_path / "first/../victim")
    torch.save(content, last)
    assert fit("on policy", tmp_path / "second/run", last, updates=3)["global_step"] == 3
    assert (tmp_path / "second/victim").read_text() == "mine"

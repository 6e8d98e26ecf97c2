"""Packaged configurations: found from any folder, listed, and copied without touching what is there."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import CONFIGS, YAMLS, tilt
from repository import ROOT, files

from lightning_tilt import __version__
from lightning_tilt.__main__ import main
from lightning_tilt.assets import locate
from lightning_tilt.cli_configs import copy_config, list_configs, summary
from lightning_tilt.data import read_prompts
from lightning_tilt.models.skeletons import skeleton_configs

DEMO = "configs/digits/sd15_adjoint_matching.yaml"
NAMED = ["configs/digits/prompts.txt", "configs/digits/report_prompts.txt"]


def test_all_are_listed_with_what_they_do() -> None:
    run = tilt("configs")
    scripts = [path for path in files("configs") if path.suffix == ".sh"]
    assert run.status == 0
    assert [line.split()[0] for line in run.out.splitlines()] == sorted(map(str, [*YAMLS, *scripts]))
    assert f"{DEMO} " in run.out
    for name in list_configs():
        said = summary(name)
        assert 20 < len(said) < 260, name
        text = (ROOT / name).read_text().replace("\n#", "")
        assert said in re.sub(" +", " ", text), name


def test_names_lead_to_the_package_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(NAMED[0]).read_bytes() == (ROOT / NAMED[0]).read_bytes()
    assert len(read_prompts(NAMED[0])) == 30
    assert "unet" in skeleton_configs("lightning_tilt/assets/digits-sd15")
    for name in ("configs/digits/none.txt", "lightning_tilt/assets/none", "owner/name"):
        assert locate(name) == Path(name)
    with pytest.raises(FileNotFoundError, match=r"no prompt file 'configs/digits/none.txt'"):
        read_prompts("configs/digits/none.txt")
    own = tmp_path / NAMED[0]
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert read_prompts(NAMED[0]) == ["mine"]


@pytest.mark.parametrize("how", [["--config", DEMO], [f"--config={DEMO}"], ["-c", DEMO]])
def test_a_packaged_config_runs_from_an_empty_folder(how: list[str], tmp_path: Path) -> None:
    here = tilt("fit", *how, "--model.lam", "2", "--print_config", cwd=tmp_path).config
    assert here == tilt("fit", "--config", DEMO, "--model.lam", "2", "--print_config").config
    assert here["model"]["init_args"]["predictor"]["init_args"]["path"] == "lightning_tilt/assets/digits-sd15"
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_ones_own_comes_first(tmp_path: Path) -> None:
    copy_config(DEMO, tmp_path)
    file = tmp_path / DEMO
    file.write_text(file.read_text().replace("lam: 50.0", "lam: 3.0"))
    run = tilt("fit", "--config", DEMO, "--print_config", cwd=tmp_path)
    assert run.config["model"]["init_args"]["lam"] == 3.0


def test_a_misspelt_config_is_one_line(tmp_path: Path) -> None:
    run = tilt("fit", "--config", "configs/digits/sd15_ajoint_matching.yaml", cwd=tmp_path)
    assert run.status == 2
    assert run.err.count("\n") == 1
    assert f"did you mean {DEMO} or" in run.err
    run = tilt("configs", "digits/sd15_lang", cwd=tmp_path)
    assert (run.status, run.out) == (2, "")
    assert (
        "no packaged configuration is called 'digits/sd15_lang'; did you mean configs/digits/sd15_long.yaml" in run.err
    )
    assert "`lightning-tilt configs` lists them" in tilt("configs", "xyzzy", cwd=tmp_path).err
    assert tilt("configs", "--forse", cwd=tmp_path).status == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [DEMO, "digits/sd15_adjoint_matching.yaml", "digits/sd15_adjoint_matching"])
def test_a_copy_has_what_it_names(name: str, tmp_path: Path) -> None:
    run = tilt("configs", name, cwd=tmp_path)
    assert run.out.split() == [DEMO, *NAMED]
    assert sorted(map(str, (p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()))) == sorted(
        [DEMO, *NAMED]
    )
    for file in (DEMO, *NAMED):
        assert (tmp_path / file).read_bytes() == (ROOT / file).read_bytes()


def test_a_script_brings_all_that_it_runs(tmp_path: Path) -> None:
    run = tilt("configs", "cluster/sd3_slurm.sh", "there", cwd=tmp_path)
    copied = {str(p.relative_to(tmp_path / "there")) for p in (tmp_path / "there").rglob("*") if p.is_file()}
    assert copied == {
        "configs/cluster/sd3_slurm.sh", "configs/sd3/adjoint_matching.yaml", "configs/cluster/fsdp2_sd3.yaml",
        "configs/cluster/slurm.yaml", "configs/prompts/train.txt", "configs/prompts/report.txt",
    }  # fmt: skip
    assert "cd there" in run.out


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_is_copied_with_all_files_that_it_names(config: Path, tmp_path: Path) -> None:
    copies = copy_config(str(config), tmp_path)
    for named in re.findall(r"configs/\S+", "\n".join(_code(copy) for copy in copies if copy.suffix != ".txt")):
        assert tmp_path / named in copies


def test_the_digits_by_log_variance_are_the_run_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import digits_losses

    own = yaml.safe_load((ROOT / "configs/digits/sd15_log_variance.yaml").read_text())
    measured = digits_losses.config("log_variance", updates=60)
    for config in (own, measured):  # where it goes, and the chain of the report, which is the sampler's
        del config["trainer"]["default_root_dir"]
        (report,) = (c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"] == "TiltReport")
        report |= {"steps": own["sampler"]["steps"], "transition": {"class_path": "DDIM"}}
    assert own == measured


def _code(file: Path) -> str:
    return "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    assert tilt("configs", "digits/sd15_long", cwd=tmp_path).status == 0
    prompts = tmp_path / NAMED[0]
    prompts.write_text("mine")
    run = tilt("configs", DEMO, cwd=tmp_path)
    assert (run.status, run.out, run.err.count("\n")) == (2, "", 1)
    assert f"error: {NAMED[0]} would be overwritten" in run.err
    assert not (tmp_path / DEMO).exists()
    assert prompts.read_text() == "mine"
    assert tilt("configs", DEMO, "--force", cwd=tmp_path).status == 0
    assert prompts.read_bytes() == (ROOT / NAMED[0]).read_bytes()
    assert tilt("configs", "digits/sd15_full", cwd=tmp_path).status == 0  # equal files are no conflict


@pytest.mark.parametrize("command", [["configs"], ["--version"], ["cite", "--config", DEMO]])
def test_a_reader_that_has_read_enough_is_no_error(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "lightning_tilt", *command]
    run = subprocess.run(program, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert run.returncode == 128 + signal.SIGPIPE
    assert "pipe" not in run.stderr.lower()


def test_version_and_commands_that_are_not_there(tmp_path: Path) -> None:
    assert tilt("--version").out == f"lightning-tilt {__version__}\n"
    for typed, said in (("confgs", "did you mean configs?"), ("fot", "did you mean fit?"), ("xyzzy", "there are fit,")):
        run = tilt(typed, cwd=tmp_path)
        assert run.status == 2 and f"there is no command {typed!r}; {said}" in run.err
    run = tilt("fit", cwd=tmp_path)
    assert run.status == 2 and "fit.data, fit.model; give --config FILE: `lightning-tilt configs` lists" in run.err


def test_a_file_without_settings_is_named(tmp_path: Path) -> None:
    for content, said in (("# nothing\n", "it is empty"), ("[1, 2]", "it is a list"), ("a: [", "is no YAML")):
        (tmp_path / "mine.yaml").write_text(content)
        run = tilt("fit", "--config", "mine.yaml", cwd=tmp_path)
        assert run.status == 2 and "--config mine.yaml " in run.err and said in run.err


@pytest.mark.parametrize("name", ["toy/grpo", "toy/grpo.yaml", "configs/toy/grpo", "configs/toy/grpo.yaml"])
def test_a_run_takes_the_names_that_the_copies_go_by(name: str, tmp_path: Path) -> None:
    run = tilt("fit", "--config", name, "--dry_run", "citation", cwd=tmp_path)
    assert (
        run.status == 0 and "@misc{lightning_tilt" in run.out and "2505.07818" in run.out
    )  # the package, and the loss


def test_a_short_name_is_the_copy_as_soon_as_there_is_one(tmp_path: Path) -> None:
    assert tilt("configs", "toy/grpo", cwd=tmp_path).status == 0
    (tmp_path / "configs/toy/grpo.yaml").write_text("")
    run = tilt("fit", "--config", "toy/grpo", cwd=tmp_path)
    assert run.status == 2 and "--config configs/toy/grpo.yaml holds no settings: it is empty" in run.err


def test_an_interrupt_while_libraries_load_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_tilt.cli.main", interrupted)
    monkeypatch.setattr(sys, "argv", ["lightning-tilt", "fit"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "\nlightning-tilt: stopped by SIGINT\n"

"""Mistakes on the command line, in files and in what they name: one line with the culprit and the mend."""

import json
from pathlib import Path

import pytest
from command import DIGITS, TOY, Result, overlay, tilt

from lightning_tilt.run_folder import need_writable

BASE = "model.predictor.base"
MISSPELT = [
    (["--sampler.stepz", "3"], "--sampler.stepz is not an option; did you mean --sampler.steps"),
    (["--trainer.max_stepz=3"], "--trainer.max_stepz is not an option; did you mean --trainer.max_steps"),
    (["--seed_everythin", "1"], "--seed_everythin is not an option; did you mean --seed_everything"),
    (["--sampler.step", "3"], "--sampler.step is not an option; did you mean --sampler.steps"),  # no abbreviations
    (["--data.sample", "3"], "--data: DrawsDataModule does not take 'sample'; did you mean samples"),
    (["--model.lamb", "3"], "--model: AdjointMatchingTask does not take 'lamb'; did you mean lam?"),
    (["--model.reward.AA", "3"], "--model.reward: QuadraticReward does not take 'AA'; did you mean A?"),
    (
        ["--model.predictor.hiden", "3"],
        "--model.predictor: NeuralTilt does not take 'hiden'; did you mean hidden or guide?",
    ),
    ([f"--{BASE}.weight", "3"], f"--{BASE}: GaussianMixturePredictor does not take 'weight'; did you mean weights?"),
    (["--model.optimizer.lrr", "3"], "--model.optimizer: Adam does not take 'lrr'; did you mean lr?"),
    (["--model", "AdjointMatchinTask"], "--model: no class is called 'AdjointMatchinTask'; did you mean AdjointM"),
    (["--model.reward", "LinearRewrd"], "--model.reward: no class is called 'LinearRewrd'; did you mean LinearReward"),
    (["--model.reward", "mine.Nowhere"], "--model.reward: No module named 'mine'"),
    (["--model.lam", "many"], "--model.lam: 'many' is neither a valid value nor the path of a class"),
    (["--sampler.steps", "three"], "--sampler.steps: Expected a <class 'int'>. Got value: three"),
    (["--sampler.on_bad_reward", "ignore"], "--sampler.on_bad_reward: Expected"),
    (["--evaluation.embedding", "Ink"], "--evaluation.embedding: Ink is a class, but not of the kind that is wanted"),
    (["--evaluation.rewards", "HPSv2"], "Expected a <class 'dict'>; it takes names: --evaluation.rewards.NAME VALUE"),
    (
        ["--evaluation.rewards+=Ink"],
        "--evaluation.rewards is no list; a named entry is added by --evaluation.rewards.N",
    ),
    (["--model.reward.help"], "an option that ends in .help expects a class: --model.reward.help HPSv2"),
    (["--config", "nowhere.yaml"], "there is no file 'nowhere.yaml', nor does the package have one"),
    (["--config", "toy/adjoint_matchin"], "did you mean configs/toy/adjoint_matching.yaml"),
    (["--trainer.callbacks+=ModelCheckpont"], "no class is called 'ModelCheckpont'; did you mean ModelCheckpoint"),
    (["--model.predictor.path", "nowhere"], "NeuralTilt does not take 'path'"),
]
IN_YAML = [
    ("sampler: {stepz: 3}", "--sampler.stepz is not an option; did you mean --sampler.steps"),
    ("samplr: {steps: 3}", "--samplr.steps is not an option; did you mean --sampler.steps"),
    ("sampler: {transition: {class_path: DDIM, init_args: {eta: 1}}}", "DDIM does not take 'eta'; it takes ddim_eta"),
    ("model: {init_args: {lambda: 3}}", "--model: AdjointMatchingTask does not take 'lambda'; did you mean lam?"),
    ("model: {init_args: {predictor: {init_args: {hiden: 3}}}}", "--model.predictor: NeuralTilt does not take 'hiden'"),
    ("model: {init_args: {predictor: {init_args: {base: {init_args: {mean: 3}}}}}}",
     f"--{BASE}: GaussianMixturePredictor does not take 'mean'; did you mean means?"),
    ("data: {init_args: {sample: 3}}", "--data: DrawsDataModule does not take 'sample'; did you mean samples"),
    ("trainer: {callbacks: [{class_path: TiltReport, init_args: {base_sample: 3}}]}",
     "--trainer.callbacks: TiltReport does not take 'base_sample'; did you mean base_samples"),
    ("trainer: {callbacks: [{class_path: TiltReprt}]}", "no class is called 'TiltReprt'; did you mean TiltReport?"),
    ("model: {init_args: [", "wrong.yaml is no YAML: while parsing"),
]  # fmt: skip


def assert_one_line(result: Result, status: int, line: str) -> None:
    assert (result.status, result.out) == (status, "")
    assert len(result.errors) == 1 and result.err.splitlines()[-1] == result.errors[0]
    assert result.errors[0].startswith("lightning-tilt: error: ") and line in result.errors[0]


@pytest.mark.parametrize(("args", "line"), MISSPELT, ids=[" ".join(args) for args, _ in MISSPELT])
def test_misspelt_on_the_command_line(args: list[str], line: str) -> None:
    result = tilt("fit", "--config", TOY, *args)
    assert_one_line(result, 2, line)
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(("text", "line"), IN_YAML, ids=[text for text, _ in IN_YAML])
def test_misspelt_in_a_yaml(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    result = tilt("fit", "--config", TOY, "--config", tmp_path / "wrong.yaml")
    assert_one_line(result, 2, line)
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["ft"], ["fit"]], ids=str)
def test_missing_or_wrong_subcommand(args: list[str]) -> None:
    assert_one_line(tilt(*args), 2, "fit")


def test_wrong_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    args = ["validate", *overlay(TOY, tmp_path), "--data", "PromptDataModule", "--data.prompts"]
    assert_one_line(tilt(*args, tmp_path / "empty.txt"), 1, "empty.txt' holds no prompt; write one a line")
    assert_one_line(tilt(*args, tmp_path / "no.txt"), 1, "there is no prompt file '")
    assert_one_line(tilt(*args, tmp_path), 1, "is a folder; give a text file with one prompt a line")


def test_wrong_model_folders(tmp_path: Path, sd15_folder: Path) -> None:
    args = ["validate", *overlay(DIGITS, tmp_path), "--model.predictor.path"]
    result = tilt(*args, tmp_path / "nowhere")
    assert_one_line(result, 1, "there is no folder '")
    assert "give a folder with a model_index.json, or a Hub name" in result.errors[0]
    broken = tmp_path / "broken"
    broken.mkdir()
    index = json.loads((sd15_folder / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "MyScheduler"]}))
    assert_one_line(tilt(*args, broken), 1, "names an unknown scheduler 'MyScheduler', so its noise levels are unknown")


REWARDS = """
import torch
from lightning_tilt.rewards import Reward

class Bad(Reward):
    def score(self, images, prompts):
        return images.flatten(1).sum(1) * float("nan")

class TwoColumns(Reward):
    def score(self, images, prompts):
        return images

class Undefined(Reward):
    def score(self, images, prompts):
        return nothing
"""


def test_wrong_rewards(tmp_path: Path) -> None:
    (tmp_path / "bad_rewards.py").write_text(REWARDS)
    args = ["fit", *overlay(TOY, tmp_path / "run"), "--model.reward"]
    bad = tilt(*args, "bad_rewards.Bad", cwd=tmp_path)
    assert_one_line(bad, 1, "6 of 6 samples of report rollout 0 have a reward")
    assert "Mend the reward, or pass sampler.on_bad_reward: skip." in bad.errors[0]
    wrong = tilt(*args, "bad_rewards.TwoColumns", cwd=tmp_path)
    assert_one_line(wrong, 1, "TwoColumns.score returned shape (6, 2) for 6 samples; it should be (6,)")
    # A defect in somebody's code is no one-liner: the traceback says where.
    with pytest.raises(NameError, match="nothing"):
        tilt(*args, "bad_rewards.Undefined", cwd=tmp_path)


def test_tracebacks_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["validate", *overlay(TOY, tmp_path), "--sampler.steps", "0"]
    told = "sampler.steps must be at least 1, not 0 (LIGHTNING_TILT_DEBUG=1 shows the traceback)"
    assert_one_line(tilt(*args), 1, told)
    monkeypatch.setenv("LIGHTNING_TILT_DEBUG", "1")
    with pytest.raises(ValueError, match="must be at least 1"):
        tilt(*args)


def test_missing_checkpoint(tmp_path: Path) -> None:
    result = tilt("fit", *overlay(TOY, tmp_path), "--ckpt_path", tmp_path / "no.ckpt")
    assert_one_line(result, 1, "no.ckpt")


def test_unreadable_checkpoint(tmp_path: Path) -> None:
    args = ["fit", *overlay(TOY, tmp_path), "--ckpt_path", tmp_path / "bad.ckpt"]
    for content in (b"", b"no checkpoint", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "bad.ckpt").write_bytes(content)
        assert_one_line(tilt(*args), 1, "bad.ckpt cannot be read as a checkpoint")


UNFIT = """
import torch
from lightning_tilt.rewards import Reward

class Blind(Reward):
    is_differentiable = False
    def score(self, images, prompts):
        return images.flatten(1).sum(1)
"""


def test_a_mistake_leaves_the_earlier_run_in_place(tmp_path: Path) -> None:
    (tmp_path / "unfit_rewards.py").write_text(UNFIT)
    run = tmp_path / "run"
    args = ["fit", *overlay(TOY, run)]
    left = {"report.json": "{}", "config.yaml": "lam: 3", "metrics.csv": "step\n1\n"}
    for name, text in left.items():
        (run / name).write_text(text)
    for wrong, line in (
        (["--sampler.steps", "0"], "sampler.steps must be at least 1"),
        (["--data", "PromptDataModule", "--data.prompts", "nowhere.txt"], "there is no prompt file"),
        # Refused by the loss when the fit is set up, and by a callback when it starts.
        (["--model.reward", "unfit_rewards.Blind"], "needs the gradient of the reward, and Blind has none"),
        (["--trainer.callbacks+=ExportWeights"], "NeuralTilt has no save(folder)"),
    ):
        assert_one_line(tilt(*args, *wrong, cwd=tmp_path), 1, line)
    assert all((run / name).read_text() == text for name, text in left.items())
    assert not (run / "previous").exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_folder_that_cannot_be_written_to_is_refused_first(command: str, tmp_path: Path) -> None:
    folder = Path("/dev/null/run") if command != "fit" else Path("/proc/run")
    result = tilt(command, *overlay(TOY, tmp_path), "--trainer.default_root_dir", folder)
    assert_one_line(result, 1, f"the run's folder '{folder}' cannot be written to (N")
    assert "give another one: --trainer.default_root_dir FOLDER" in result.err and result.err.count("\n") == 1


def test_nothing_is_left_where_a_folder_can_be_written_to(tmp_path: Path) -> None:
    need_writable(tmp_path / "not/yet/there")
    assert list(tmp_path.iterdir()) == []


def test_the_options_of_a_class_are_listed() -> None:
    result = tilt("fit", "--config", TOY, "--model.reward.help", "ImageReward")
    assert result.status == 0 and "--reward.micro_batch" in result.out and "usage: lightning-tilt" in result.out
    assert_one_line(tilt("fit", "--model.reward.help", "HPSv2"), 2, "fit --config FILE --model.reward.help HPSv2")


def test_numbers_of_the_system_are_left_out(tmp_path: Path) -> None:
    from lightning_tilt.cli_errors import users_mistake

    with pytest.raises(FileNotFoundError) as error:
        (tmp_path / "no").open()
    assert users_mistake(error.value) == f"No such file or directory: '{tmp_path / 'no'}'"


def test_a_strategy_that_the_trainer_refuses(tmp_path: Path) -> None:
    result = tilt("fit", *overlay(TOY, tmp_path), "--trainer.accelerator", "cpu", "--trainer.strategy", "fsdp")
    assert_one_line(result, 1, "fsdp")


def test_a_setting_that_the_trainer_refuses(tmp_path: Path) -> None:
    result = tilt("fit", *overlay(TOY, tmp_path), "--trainer.enable_progress_bar", "false")
    assert_one_line(result, 1, "enable_progress_bar=False")

"""The command line: every config runs, blocks compose, flags beat files, help is worth reading."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import CONFIGS, DIGITS, PICTURES, TOY, overlay, tilt
from repository import ROOT

from lightning_tilt.loggers import read_metrics

OWN = """
import torch
from lightning import LightningModule
from lightning_tilt import AdjointMatching
from lightning_tilt.models import GaussianMixturePredictor, NeuralTilt
from lightning_tilt.rewards import Reward

class LeftHalf(Reward):
    def score(self, images, prompts):
        return images[..., : images.shape[-1] // 2].flatten(1).mean(1)

class Existing(LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        self.predictor = NeuralTilt(GaussianMixturePredictor([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]]), width)
        self.process, self.reward = self.predictor.process, LeftHalf()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Mine(AdjointMatching, Existing):
    pass
"""


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_is_parsed(config: Path) -> None:
    parsed = tilt("fit", "--config", config, "--print_config").config
    assert {"model", "data", "sampler", "trainer"} <= set(parsed)
    assert parsed["model"]["class_path"].startswith("lightning_tilt.tasks.")
    assert parsed["trainer"]["default_root_dir"].startswith("runs/")


@pytest.mark.parametrize("config", [c for c in CONFIGS if {"toy", "digits"} & set(c.parts)], ids=str)
@pytest.mark.filterwarnings("ignore:.*starts at alpha_0 > 0")
def test_every_small_config_is_fitted(config: Path, tmp_path: Path) -> None:
    result = tilt("fit", *overlay(config, tmp_path))
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["updates"] == 2 and report["seed"] == 0
    assert read_metrics(tmp_path / "metrics.csv")["step"] == [0, 1]
    assert all((tmp_path / name).is_file() for name in (*PICTURES, "config.yaml", "checkpoints/last.ckpt"))
    if "digits" in config.parts:
        assert {"accuracy_base", "accuracy_tuned"} <= set(report)
        exported = [c for c in tilt("fit", "--config", config, "--print_config").config["trainer"]["callbacks"]
                    if c["class_path"].endswith("ExportWeights")]  # fmt: skip
        assert any((tmp_path / (exported[0]["init_args"]["folder"] or "lora")).iterdir())
        # After every update, so that a run that is killed loses one.
        steps = [c for c in yaml.safe_load((ROOT / config).read_text())["trainer"]["callbacks"]
                 if c["class_path"] == "ModelCheckpoint"]  # fmt: skip
        assert steps[0]["init_args"]["every_n_train_steps"] == 1 and steps[0]["init_args"]["save_last"]


def test_configs_compose_and_flags_beat_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sampler: {steps: 5, seed: 3}\nmodel: {init_args: {lam: 2.5}}\n")
    (tmp_path / "b.yaml").write_text("sampler: {steps: 6}\n")
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    flags = ["--sampler.samples_per_condition", 9, "--data.prompts", tmp_path / "words.txt", "--model.lam=7"]
    files = ["--config", DIGITS, "--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml"]
    config = tilt("fit", *files, *flags, "--model.predictor.path", "some/folder", "--print_config").config
    assert (config["sampler"]["steps"], config["sampler"]["seed"]) == (6, 3)
    assert config["sampler"]["samples_per_condition"] == 9
    assert config["data"]["init_args"]["prompts"] == str(tmp_path / "words.txt")
    assert config["model"]["init_args"]["lam"] == 7.0
    predictor = config["model"]["init_args"]["predictor"]
    assert predictor["init_args"]["path"] == "some/folder"
    assert predictor["class_path"] == "lightning_tilt.models.StableDiffusion"
    assert tilt("fit", *files, "--sampler.steps", 7, "--print_config").config["sampler"]["steps"] == 7
    assert tilt("fit", *files, "--print_config").config["model"]["init_args"]["lam"] == 2.5


def test_a_predictor_path_and_a_reward_are_swapped_and_run(tmp_path: Path, sd15_folder: Path) -> None:
    args = overlay(DIGITS, tmp_path)
    result = tilt("validate", *args, "--model.reward", "DigitClassifier", "--model.predictor.path", sd15_folder,
                  "--model.predictor.targets", "[to_q]", "--data.val_prompts", "[two]")  # fmt: skip
    assert result.status == 0, result.err
    # A log-probability, and Ink is none.
    assert float(re.search(r"val/reward[\s│]+(-?[\d.]+)", result.out)[1]) < 0  # type: ignore[index]


def test_validate_prints_rewards_with_their_errors_and_diversity(tmp_path: Path) -> None:
    result = tilt("validate", *overlay(TOY, tmp_path))
    for name in ("val/reward", "val/reward_se", "val/diversity"):
        assert re.search(rf"{name} .*\d", result.out), result.out
    assert tilt("test", *overlay(TOY, tmp_path)).out.count("test/") == 5


def test_predict_leaves_images_a_grid_and_a_table(tmp_path: Path, sd15_folder: Path) -> None:
    args = [*overlay(DIGITS, tmp_path), "--model.predictor.path", sd15_folder, "--model.predictor.targets", "[to_q]"]
    result = tilt("predict", *args, "--data.predict_prompts", "[two, nine]")
    assert result.status == 0, result.err
    folder = tmp_path / "predictions"
    assert {p.name for p in folder.iterdir()} == {*(f"0000{i}.png" for i in range(4)), "grid.png", "samples.csv"}
    rows = [line.split(",") for line in (folder / "samples.csv").read_text().splitlines()]
    assert rows[0] == ["sample", "prompt", "reward"]
    assert [row[:2] for row in rows[1:]] == [[f"0000{i}.png", "two" if i < 2 else "nine"] for i in range(4)]
    assert all(0 <= float(row[2]) <= 1 for row in rows[1:])
    # A second prediction, of fewer images, does not mix with the first.
    tilt("predict", *args, "--data.predict_prompts", "['=two']")
    assert len(list(folder.glob("0*.png"))) == 2
    assert len(list((tmp_path / "predictions.1").glob("0*.png"))) == 4
    # In the table for spreadsheets what looks like a formula is marked as a text.
    assert (folder / "samples.csv").read_text().splitlines()[1].startswith("00000.png,'=two,")


def test_predict_leaves_the_states_of_a_density(tmp_path: Path) -> None:
    import numpy as np

    assert tilt("predict", *overlay(TOY, tmp_path)).status == 0
    states = np.load(tmp_path / "predictions/samples.npy")
    assert states.shape == (24, 2) and np.isfinite(states).all()
    assert len((tmp_path / "predictions/samples.csv").read_text().splitlines()) == 25


def test_own_reward_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(OWN)
    result = tilt("fit", *overlay(TOY, tmp_path / "run"), "--model.reward", "my_rewards.LeftHalf", cwd=tmp_path)
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "run/report.json").read_text())["reward"] == "LeftHalf"


def test_own_module_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "my_modules.py").write_text(OWN)
    flags = ["--model", "my_modules.Mine", "--model.width", 5, "--model.lam", 2, "--data", "DrawsDataModule",
             "--data.samples", 4, "--trainer.max_steps", 2, "--sampler.steps", 3, "--trainer.default_root_dir", "run",
             "--trainer.log_every_n_steps", 1]  # fmt: skip
    result = tilt("fit", *flags, cwd=tmp_path)
    assert result.status == 0, result.err
    assert read_metrics(tmp_path / "run/metrics.csv")["train/lam"] == [2, 2]
    model = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]
    assert (model["class_path"], model["init_args"]["width"]) == ("my_modules.Mine", 5)


@pytest.mark.parametrize(
    ("args", "prefix"),
    [
        (["--help"], "sampler"),
        (["--model.help", "AdjointMatchingTask"], "model"),
        (["--data.help", "PromptDataModule"], "data"),
    ],
)
def test_help_has_a_sentence_for_every_parameter(args: list[str], prefix: str) -> None:
    text = tilt("fit", *args).out
    entries = re.findall(rf"^  --({prefix}\.\w+)(?!\.help)[ \n](.*?)(?=^\S|^  --|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(entries) >= 8
    for name, description in entries:
        # Between the metavariable and the type that jsonargparse adds.
        sentence = re.sub(r"\((required, )?type:.*", "", description, flags=re.DOTALL).split()
        words = [w for w in sentence if not re.fullmatch(r"[A-Z_]+|\{.*\}|\[.*\]", w)]
        assert len(words) >= 3, f"--{name} is not described: {description}"


def test_the_command_is_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_tilt", "fit", "--config", TOY, "--sampler.stepz", "3"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "lightning-tilt: error: --sampler.stepz is not an option; did you mean --sampler.steps or --sampler.seed or "
        "--sampler?"
    ]


@pytest.mark.parametrize("flag", [["--model.predictor.height", "null"], ["--model.predictor.init_args.height=null"]])
def test_a_null_two_classes_deep_is_null(flag: list[str]) -> None:
    parsed = tilt("fit", "--config", DIGITS, "--model.predictor.height", 64, *flag, "--print_config").config
    predictor = parsed["model"]["init_args"]["predictor"]["init_args"]
    assert predictor["height"] is None and predictor["rank"] == 16

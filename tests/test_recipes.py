"""The recipes for real models: each is fitted for two updates with a tiny random model of its class in the place."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import CONFIGS, overlay, tilt
from repository import ROOT
from tiny_clip import save_clip

from lightning_tilt.data import read_prompts
from lightning_tilt.loggers import read_metrics

RECIPES = [c for c in CONFIGS if {"sd15", "sd3", "sd35"} & set(c.parts)]
FAST = [Path("configs/sd15/adjoint_matching.yaml"), Path("configs/sd3/adjoint_matching_full.yaml")]
CARDS = {"24", "40", "80", "141"}


def content(recipe: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / recipe).read_text()))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, id=str(r), marks=[] if r in FAST else [pytest.mark.slow]) for r in RECIPES]
)
@pytest.mark.filterwarnings("ignore:.*starts at alpha_0 > 0")
def test_every_recipe_fits_a_tiny_model_of_its_class(
    recipe: Path, tmp_path: Path, sd15_folder: Path, sd3_folder: Path, clip: Path
) -> None:
    """Everything but the size: bfloat16, checkpointing, micro-batches, accumulation, average, report, export."""
    folder = sd15_folder if "sd15" in recipe.parts else sd3_folder
    reward = {"class_path": "CLIPScore", "init_args": {"path": str(clip)}}
    data = {"batch_size": 1, "prompts": ["a", "b"], "val_prompts": ["c"]}
    args = overlay(
        recipe, tmp_path, data={"class_path": "PromptDataModule", "init_args": data},
        model={"init_args": {"reward": reward, "supervised_steps": 1, "last_steps": 1}},
    )  # fmt: skip
    flags = ["--model.predictor.path", folder, "--model.predictor.embeddings", tmp_path / "embeddings",
             "--model.predictor.height", 16, "--model.predictor.width", 16, "--trainer.accelerator", "cpu"]  # fmt: skip
    result = tilt("fit", *args, *flags)
    assert result.status == 0, result.err
    accumulated = content(recipe)["trainer"]["accumulate_grad_batches"]
    assert len(read_metrics(tmp_path / "metrics.csv")["step"]) >= 2 and accumulated >= 2
    full = content(recipe)["model"]["init_args"]["predictor"]["init_args"].get("tuning") == "full"
    exported = list((tmp_path / ("weights" if full else "lora")).rglob("*.safetensors"))
    assert exported and (tmp_path / "checkpoints/last.ckpt").is_file() and (tmp_path / "report.json").is_file()
    assert len(list((tmp_path / "embeddings").iterdir())) == 4  # a, b, c and ""


def test_recipes_say_for_which_memory_they_are() -> None:
    cards = set()
    for recipe in RECIPES:
        head = (ROOT / recipe).read_text().split("seed_everything")[0]
        card, peak = re.findall(r"of (\d+) GB: computed peak ([\d.]+) GB", head)[0]
        assert float(peak) < 1.0737 * float(card) - 1, recipe  # cards have GiB; one is left for fragmentation
        cards.add(card)
        predictor = content(recipe)["model"]["init_args"]["predictor"]["init_args"]
        assert predictor["path"].count("/") == 1 and predictor["gradient_checkpointing"] is True
        assert predictor["dtype"] == "bfloat16"
        full = predictor.get("tuning") == "full"
        assert content(recipe)["trainer"]["precision"] == ("bf16-mixed" if full else "32-true")
        assert content(recipe)["trainer"]["callbacks"][0]["class_path"] == "EncodePrompts"
    assert cards == CARDS


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_peak_in_a_recipes_head_is_the_estimates(recipe: Path) -> None:
    head = (ROOT / recipe).read_text().split("seed_everything")[0]
    printed = tilt("fit", "--config", recipe, "--dry_run", "memory").out
    peak = re.search(r"^  peak .* ([\d.]+)$", printed, re.MULTILINE)
    assert peak is not None and f"computed peak {peak[1]} GB" in head


def test_prompts_to_tune_on_and_to_report_on() -> None:
    train, report = (read_prompts(ROOT / f"configs/prompts/{name}.txt") for name in ("train", "report"))
    assert len(train) == len(set(train)) == 100 and len(report) == len(set(report)) == 10
    assert not set(train) & set(report)
    assert max(len(p.split()) for p in (*train, *report)) < 20  # all of them fit into 77 tokens


@pytest.mark.parametrize("model", ["digits-sd15", pytest.param("digits-sd3", marks=pytest.mark.slow)])
def test_the_gpu_benchmark_runs_on_a_tiny_model(model: str, tmp_path: Path) -> None:
    out = tmp_path / "results.md"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--path", f"lightning_tilt/assets/"
               f"{model}", "--out", str(out), "--steps", "3", "--samples", "2", "--peak_tflops", "1",
               "--updates", "2"]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, timeout=600, capture_output=True)
    rows = [line.split("|") for line in out.read_text().splitlines() if line.startswith("| digits")]
    assert [row[2].strip() for row in rows] == ["adapters", "all weights"]
    for row in rows:
        seconds, least, most, first, forwards, rate, share = (float(row[i].strip(" %")) for i in range(4, 11))
        assert 0 < least <= seconds <= most and first > 0 and forwards > 0
        assert 0 < 100 * rate <= share < 100  # of a card that can do one; the share counts what is recomputed too
    assert "`make bench ONLY=gpu`, seed 0" in out.read_text()


@pytest.mark.slow
def test_sd15_at_its_real_size_on_the_cpu() -> None:
    """64 x 64 latents, two steps, random weights: it runs, within a quarter of the memory that was foretold."""
    import json

    done = subprocess.run(
        [sys.executable, "benchmarks/smoke.py"], cwd=ROOT, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["denoiser"] == 859_520_964 and found["loss"] == found["loss"]
    assert found["forwards"] == found["forwards_estimate"]
    assert found["peak"] == pytest.approx(found["estimate"], rel=0.25)

"""What is exported works in plain diffusers, in a process that has never heard of this package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plain_diffusers import PROMPTS
from safetensors.torch import load_file, save_file
from tiny import kick, small_decoder
from toys import PromptedNet, SumReward, trainer

from lightning_tilt.callbacks import Evaluation, ExponentialMovingAverage, ExportWeights, TiltReport, TrajectorySampler
from lightning_tilt.chain import Chain
from lightning_tilt.data import PromptDataModule
from lightning_tilt.models import StableDiffusion
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards import Ink
from lightning_tilt.tasks import AdjointMatchingTask
from lightning_tilt.transition import DDIM

STEPS = 4
PROGRAM = Path(__file__).with_name("plain_diffusers.py")


def task(predictor: Any) -> AdjointMatchingTask:
    return AdjointMatchingTask(
        predictor=predictor, reward=Ink(), lam=2.0, checkpoint=False, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
    )


def export(predictor: Any, folder: Path, *more: Any, updates: int = 1) -> None:
    """A fit that moves nothing, and then everything that is exported of it."""
    callbacks = [ExportWeights(), ExportWeights(what="pipeline"), *more, TrajectorySampler(steps=STEPS, seed=1)]
    fitter = trainer(callbacks, default_root_dir=folder, max_steps=updates, limit_val_batches=0)
    fitter.fit(task(predictor), datamodule=PromptDataModule(PROMPTS, batch_size=2))


def ours(predictor: Any, noise: torch.Tensor, eta: float) -> torch.Tensor:
    """Images of the predictor's own chain, all steps the tuned model's."""
    chain = Chain(predictor.process, DDIM(ddim_eta=eta), predictor.process.grid(STEPS))
    condition = predictor.encode(PROMPTS, 2)
    with torch.no_grad():
        states, _ = chain.rollout(predictor, condition, noise, base_last_step=False)
        images: torch.Tensor = predictor.decode(states[-1])
    return images


CASES = [("sd15", "lora"), ("sd15", "full"), ("sd3", "lora")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, sd15_folder: Path, sd3_folder: Path) -> dict[tuple[str, str], Any]:
    """For each case the predictor, the noise, and what one fresh process drew of all that was exported."""
    from lightning_tilt.models import StableDiffusion, StableDiffusion3

    kinds: dict[str, Any] = {"sd15": (StableDiffusion, sd15_folder), "sd3": (StableDiffusion3, sd3_folder)}
    found: dict[tuple[str, str], Any] = {}
    arguments = []
    for family, tuning in CASES:
        torch.manual_seed(4)
        kind, base = kinds[family]
        predictor = kind(base, tuning=tuning, **({"rank": 4, "alpha": 6.0} if tuning == "lora" else {}))
        kick(predictor)
        folder = tmp_path_factory.mktemp(f"{family}-{tuning}")
        before = {name: p.clone() for name, p in predictor.named_parameters()}
        export(predictor, folder)
        # The network in use has its adapters still, and weights that nothing has touched.
        assert all(torch.equal(p, before[name]) for name, p in predictor.named_parameters())
        noise = torch.randn(STEPS + 1, 2, *predictor.state_shape)
        save_file({"noise": noise}, folder / "in.safetensors")
        arguments += [family, str(base), str(folder)]
        found[family, tuning] = (predictor, noise, folder)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], cwd=folder, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {key: (p, noise, load_file(folder / "out.safetensors")) for key, (p, noise, folder) in found.items()}


@pytest.mark.parametrize(("family", "tuning"), CASES)
def test_a_fresh_process_with_plain_diffusers_draws_the_same_images(family: str, tuning: str, drawn: Any) -> None:
    predictor, noise, found = drawn[family, tuning]
    mine = ours(predictor, noise, 0.0)
    with torch.no_grad():
        start = predictor.process.grid(STEPS)[:1].expand(2)
        output = predictor.predict(noise[0], start, predictor.encode(PROMPTS, 2))
    with predictor.base() as untuned:
        assert (ours(untuned, noise, 0.0) - mine).abs().max() > 1e-3  # what is compared is not the base
    for name in ("weights", "whole"):
        torch.testing.assert_close(found[f"{name}.output"], output, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[f"{name}.images"], mine, rtol=0, atol=1e-4)
        if family == "sd15":
            torch.testing.assert_close(found[f"{name}.memoryless"], ours(predictor, noise, 1.0), rtol=0, atol=1e-4)


def head(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_average_is_exported_and_the_card_has_the_figures(tmp_path: Path, load: Any) -> None:
    predictor = load("sd15")
    start = {n: p.detach().clone() for n, p in predictor.trained_parameters().items()}
    kick(predictor)
    (tmp_path / "config.yaml").write_text("lam: 2  # ``` and ```` in it\n")
    (tmp_path / "evaluation.json").write_text('{"an older": "run"}')
    os.utime(tmp_path / "evaluation.json", (0, 0))

    class Average(ExponentialMovingAverage):
        def on_train_start(self, *args: Any) -> None:
            super().on_train_start(*args)
            self.average = {n: p.clone() for n, p in start.items()}

        def on_train_batch_end(self, *args: Any) -> None: ...

    export(predictor, tmp_path, Average(0.5), TiltReport(base_samples=4, tuned_samples=4, prompts=PROMPTS))
    # The average is the untrained start, whose adapters do nothing: the pipeline is the base.
    from diffusers import DiffusionPipeline

    whole = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    untuned = {name.replace(".base_layer", ""): p for name, p in predictor.network.state_dict().items()}
    assert all(torch.equal(p, untuned[name]) for name, p in whole.unet.state_dict().items())
    card = (tmp_path / "lora/README.md").read_text()
    assert "base_model" not in head(card) and "license" not in head(card) and "# license:" in card
    assert head(card)["library_name"] == "diffusers"
    for words in ("| reward | ", "reward `Ink`, lam 2, 1 updates", "4 steps of DDIM", "memoryless", "load_lora_weights",
                  "eta=1.0", "`````yaml\nlam: 2"):  # fmt: skip
        assert words in card, words
    assert "DiffusionPipeline.from_pretrained(FOLDER, " in (tmp_path / "pipeline/README.md").read_text()


def test_a_test_exports_the_checkpoint_that_it_judged(tmp_path: Path, load: Any) -> None:
    predictor = load("sd15")
    kick(predictor)
    callbacks = [ExportWeights("card", when="test"), TrajectorySampler(steps=2, seed=1), Evaluation(samples=2)]
    tester = trainer(callbacks, default_root_dir=tmp_path)
    for _ in range(2):
        tester.test(task(predictor), datamodule=PromptDataModule(PROMPTS), verbose=False)
    card = (tmp_path / "card/README.md").read_text()
    assert "On 2 test prompts, 4 samples of either model" in card and "| path KL | - | " in card
    assert (tmp_path / "card.1/README.md").is_file() and not (tmp_path / "lora").exists()
    assert next((tmp_path / "card").glob("*.safetensors")).is_file()


def test_the_card_of_an_embedded_base_runs_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = StableDiffusion("lightning_tilt/assets/digits-sd15", rank=2)
    export(predictor, tmp_path)
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "lora/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "from lightning_tilt.assets import folder" in code and "from_pretrained(folder('digits-sd15')" in code
    scope: dict[str, Any] = {"FOLDER": str(tmp_path / "lora")}
    exec(code, scope)
    assert scope["image"].size == (32, 32)


def test_a_hub_name_is_the_base_of_the_card(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load("sd15")
    predictor.pipeline.register_to_config(_name_or_path="owner/model")
    export(predictor, tmp_path)
    assert head((tmp_path / "lora/README.md").read_text())["base_model"] == "owner/model"


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_the_card_names_the_small_decoder_that_the_reward_saw(family: str, load: Any, tmp_path: Path) -> None:
    decoder = small_decoder(tmp_path / "small")
    export(load(family, tiny_vae=str(tmp_path / "small")), tmp_path)
    for name, where in (("lora", "the base pipeline has"), ("pipeline", "the pipeline here has")):
        card = (tmp_path / name / "README.md").read_text()
        assert f"images that the small decoder `{tmp_path}/small` made; {where} its own VAE" in card
        scope: dict[str, Any] = {"FOLDER": tmp_path / name}
        exec(card.split("```python\n")[1].split("```")[0], scope)
        loaded = scope["pipeline"].vae.state_dict()
        assert loaded.keys() == decoder.state_dict().keys()
        assert all(torch.equal(loaded[key], value) for key, value in decoder.state_dict().items())
    export(load(family), tmp_path / "own")
    assert "decoder" not in (tmp_path / "own/pipeline/README.md").read_text()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_code_of_a_card_runs_where_the_base_is_of_several_formats(
    tuning: str, sd15_folder: Path, tmp_path: Path
) -> None:
    """Word for word, in this process: nothing but FOLDER is filled in."""
    from transformers import CLIPTextModel

    base = Path(shutil.copytree(sd15_folder, tmp_path / "base"))
    CLIPTextModel.from_pretrained(base / "text_encoder").half().save_pretrained(base / "text_encoder")
    predictor = StableDiffusion(base, tuning=tuning)  # type: ignore[arg-type]
    kick(predictor)
    export(predictor, tmp_path)
    for name in ("lora", "pipeline"):
        code = (tmp_path / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
        scope: dict[str, Any] = {"FOLDER": str(tmp_path / name)}
        exec(code, scope)
        assert scope["image"].size == (16, 16)
        assert {part.dtype for part in (scope["pipeline"].unet, scope["pipeline"].text_encoder)} == {torch.float32}


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"ExportWeights\.what is one of weights, pipeline, not 'all'"):
        ExportWeights(what="all")  # type: ignore[arg-type]
    fitter = trainer([ExportWeights(what="pipeline"), TrajectorySampler(steps=2)])
    module = AdjointMatchingTask(predictor=PromptedNet(RectifiedFlow()), reward=SumReward())
    with pytest.raises(TypeError, match=r"PromptedNet has no save_pipeline\(folder\)"):
        fitter.fit(module, datamodule=PromptDataModule(["a"]))

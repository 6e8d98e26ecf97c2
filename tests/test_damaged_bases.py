"""Bases whose files are not whole: each is refused in one line that names the part, and none runs on random weights."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DIGITS, overlay, tilt
from safetensors.torch import load_file, save_file
from tiny import plain, vae

from lightning_tilt.models import StableDiffusion, StableDiffusion3

NETWORKS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def base(sd15_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd15_folder, tmp_path / "base"))


def refused(path: Path, kind: type[Exception], *words: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        StableDiffusion(path, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (repr(str(path)), *words)), message


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    write(file, change(load_file(file)))


def write(file: Path, state: dict[str, torch.Tensor]) -> None:
    """A new file in the place of the old one, which loaded weights may still be mapped to."""
    save_file(state, file.with_suffix(".new"), {"format": "pt"})
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize("part", NETWORKS)
def test_missing_and_foreign_weights_are_refused(part: str, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("transformers").setLevel(logging.WARNING)
    file, whole = base / part / NETWORKS[part], load_file(base / part / NETWORKS[part])
    lost = sorted(whole)[:3]
    rewrite(file, lambda state: {k: v for k, v in state.items() if k not in lost})
    capfd.readouterr()
    refused(base, ValueError, f"its {part}", "3 weights", "fetch it again")
    assert "MISSING" not in "".join(capfd.readouterr())  # the one line says it
    write(file, {**whole, lost[0]: torch.zeros(7)})
    refused(base, ValueError, f"its {part}")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("part", NETWORKS)
def test_truncated_weights_are_refused(part: str, share: float, base: Path) -> None:
    file = base / part / NETWORKS[part]
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises((FileNotFoundError, ValueError), match=f"its {part} could not be loaded: ") as caught:
        StableDiffusion(base)
    assert "\n" not in str(caught.value)


def test_what_the_index_names_has_to_be_there(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        (base / name).rename(base / "away")
        refused(base, FileNotFoundError, f"has no folder {name!r}")
        (base / "away").rename(base / name)
    for part, file in NETWORKS.items():
        (base / part / "config.json").rename(base / "away")
        refused(base, FileNotFoundError, f"its {part} has no config.json")
        (base / "away").rename(base / part / "config.json")
        (base / part / file).rename(base / "away")
        refused(base, FileNotFoundError, f"its {part} has no weights", "*.safetensors")
        (base / "away").rename(base / part / file)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / "tokenizer" / file).rename(base / "away")
        refused(base, FileNotFoundError, "its tokenizer has no ", "vocab.json" if file == "tokenizer.json" else file)
        (base / "away").rename(base / "tokenizer" / file)
    StableDiffusion(base)


def test_damaged_descriptions_are_refused(base: Path) -> None:
    file = base / "model_index.json"
    index = json.loads(file.read_text())
    for changed, words in [
        ([], "holds no names with values"),
        ({**index, "unet": ["diffusers", "NoSuchNet"]}, "names ['diffusers', 'NoSuchNet'] as its unet"),
        ({**index, "unet": ["os", "system"]}, "names ['os', 'system'] as its unet"),
        ({**index, "unet": [None, None]}, "names no unet"),
        ({**index, "tokenizer": [None, None]}, "names no tokenizer"),
        ({**index, "scheduler": 5}, "unknown scheduler 5"),
        ({k: v for k, v in index.items() if k != "vae"}, "names no vae"),
    ]:
        file.write_text(json.dumps(changed))
        refused(base, ValueError, words)
    file.write_text(json.dumps(index))
    scheduler = base / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "num_train_timesteps": -5}))
    refused(base, ValueError, "its tokenizers and scheduler could not be loaded")
    for content, words in (("[]", "holds no names with values"), ("{", "is no JSON")):
        (base / "unet/config.json").write_text(content)
        refused(base, ValueError, "unet/config.json of", words)


def test_pickles_need_a_word(base: Path) -> None:
    expected = StableDiffusion(base, tuning="full").network.state_dict()
    for part, file in NETWORKS.items():
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(base / part / file), base / part / name)
        (base / part / file).rename(base / "away")
        refused(base, ValueError, f"its {part} are a pickle, {name}", "allow_pickle: true")
        (base / "away").rename(base / part / file)
    for part, file in NETWORKS.items():
        (base / part / file).unlink()
    found = StableDiffusion(base, tuning="full", allow_pickle=True).network.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class Payload:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("part", NETWORKS)
def test_code_in_a_pickle_is_never_run(part: str, base: Path, tmp_path: Path) -> None:
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (base / part / NETWORKS[part]).unlink()
    torch.save({"weight": Payload(tmp_path / "witness")}, base / part / name)
    with pytest.raises((ValueError, OSError), match=f"its {part} could not be loaded: ") as caught:
        StableDiffusion(base, allow_pickle=True)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "witness").exists()


def test_older_names_and_left_over_weights_are_no_damage(base: Path) -> None:
    """As published: SD 1.5's VAE has its attention under older names, its text encoder a buffer of positions."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    expected = {part: getattr(StableDiffusion(base).pipeline, part).state_dict() for part in ("vae", "text_encoder")}

    def rename(name: str) -> str:
        for new, old in older.items():
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
        return name

    rewrite(base / "vae" / NETWORKS["vae"], lambda state: {rename(k): v for k, v in state.items()})
    assert any(".query." in name for name in load_file(base / "vae" / NETWORKS["vae"]))
    rewrite(
        base / "text_encoder/model.safetensors",
        lambda state: {
            **{k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()},
            "text_model.embeddings.position_ids": torch.arange(8)[None],
        },
    )
    for part, weights in expected.items():
        found = getattr(StableDiffusion(base).pipeline, part).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(("family", "kind"), [("sd15", StableDiffusion), ("sd3", StableDiffusion3)])
def test_parts_are_those_of_diffusers_alone(family: str, kind: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    mine, theirs = kind(folder, tuning="full").pipeline, plain(family, folder)
    assert mine.name_or_path == str(folder) and set(mine.components) == set(theirs.components)
    for name, part in theirs.components.items():
        if isinstance(part, torch.nn.Module):
            found = mine.components[name].state_dict()
            assert all(torch.equal(found[key], weight) for key, weight in part.state_dict().items())


def test_a_variant_is_taken_where_it_is(base: Path) -> None:
    file = base / "unet" / NETWORKS["unet"]
    doubled = {name: 2 * weight for name, weight in load_file(file).items()}
    save_file(doubled, file.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    found = StableDiffusion(base, tuning="full", variant="fp16").network.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in doubled.items())
    refused(base, FileNotFoundError, "no weights of the variant 'bf16'", variant="bf16")


def test_a_small_decoder_is_whole_or_refused(base: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    channels = {"encoder_block_out_channels": (8,) * 2, "decoder_block_out_channels": (8,) * 2}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**channels, **blocks).save_pretrained(tmp_path / "small")
    StableDiffusion(base, tiny_vae=str(tmp_path / "small"))
    rewrite(tmp_path / "small" / NETWORKS["vae"], lambda state: dict(sorted(state.items())[1:]))
    with pytest.raises(ValueError, match=r"tiny_vae .*1 weights of AutoencoderTiny are missing"):
        StableDiffusion(base, tiny_vae=str(tmp_path / "small"))
    vae().save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="tiny_vae"):
        StableDiffusion(base, tiny_vae=str(tmp_path / "large"))


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    from lightning_tilt.assets import folder

    base = Path(shutil.copytree(folder("digits-sd15"), tmp_path / "base"))
    rewrite(base / "text_encoder/model.safetensors", lambda s: {k: v for k, v in s.items() if "layers.0" not in k})
    result = tilt("fit", *overlay(DIGITS, tmp_path / "run"), "--model.predictor.path", base)
    assert result.status == 1 and len(result.errors) == 1, result.err
    assert "its text_encoder is damaged or another network's: 16 weights of CLIPTextModel" in result.errors[0]


def test_a_hub_name_keeps_its_name(base: Path, tmp_path: Path) -> None:
    """As the Hub's client caches it; read by another process, for the client reads its settings once."""
    commit = "a" * 40
    repository = tmp_path / "hub/models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(base, repository / "snapshots" / commit)
    code = "from lightning_tilt.models import StableDiffusion; print(StableDiffusion('owner/model').origin)"
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, timeout=300)
    assert done.stdout == "owner/model\n", done.stderr

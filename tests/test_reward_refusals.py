"""What is said of a reward's files that are not what they seem, and of a Hub that is out of reach."""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from tiny_clip import save_clip
from tiny_rewards import HPS_FILE, TinyHPSv2, TinyImageReward, save_hps, save_image_reward

from lightning_tilt.rewards import CLIPScore
from lightning_tilt.rewards.weights import find_file, read_weights


def refused(make: Callable[[], object], kind: type[Exception], *parts: str) -> str:
    with pytest.raises(kind) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and "weights_only" not in message
    assert [part for part in parts if part not in message] == [], message
    return message


class Payload:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def test_code_in_a_clip_is_not_run_and_said_to_be_code(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    torch.save({"weight": Payload(tmp_path / "witness")}, clip / "pytorch_model.bin")
    message = refused(lambda: CLIPScore(str(clip)), ValueError, "CLIPScore", "no code of it was run", str(clip))
    assert "fetch" not in message and not (tmp_path / "witness").exists()


def test_tensors_in_a_pickle_are_read(tmp_path: Path) -> None:
    clip, x = save_clip(tmp_path / "clip"), torch.rand(1, 3, 16, 16)
    expected = CLIPScore(str(clip)).score(x, ["a"])
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    torch.testing.assert_close(CLIPScore(str(clip)).score(x, ["a"]), expected, rtol=1e-5, atol=0)


def test_a_page_is_no_pickle(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_text("<!DOCTYPE html>\n<html>not found</html>")
    message = refused(lambda: read_weights("HPSv2", file), ValueError, str(file), "it begins with '<!DOCTYPE html>'")
    assert "code" not in message
    file.write_bytes(pickle.dumps(Payload(tmp_path / "witness")))
    refused(lambda: read_weights("HPSv2", file), ValueError, "holds more than tensors", "none of it was run")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "has no 'size'"),
        ("[]", "preprocessor_config.json"),
        ('{"size": "large"}', "holds no names with sizes"),
        ('{"do_resize": false, "image_mean": ["a"], "image_std": [1]}', "holds no names with sizes"),
    ],
)
def test_a_garbled_preprocessor_is_named(content: str, words: str, tmp_path: Path) -> None:
    clip = save_clip(tmp_path)
    (clip / "preprocessor_config.json").write_text(content)
    refused(lambda: CLIPScore(str(clip)), ValueError, "CLIPScore", str(clip), words)


def test_another_networks_configuration_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("transformers").setLevel(logging.WARNING)
    clip = save_clip(tmp_path)
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"] |= {"hidden_size": 32, "num_hidden_layers": 3}
    (clip / "config.json").write_text(json.dumps(config))
    capfd.readouterr()
    refused(lambda: CLIPScore(str(clip)), ValueError, "CLIPScore", "another network", "vision_model.")
    assert "MISMATCH" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("reached", [True, False])
def test_an_unreachable_hub_is_asked_once(reached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file is then only looked for among those that were fetched before."""
    asked: list[tuple[str, bool]] = []

    def download(repository: str, name: str, local_files_only: bool = False) -> str:
        asked.append((name, local_files_only))
        if not reached:
            raise LocalEntryNotFoundError(f"no connection for {name}" if not local_files_only else "not cached")
        raise EntryNotFoundError(f"404 for {name}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    words = "404 for a.pt" if reached else "no connection for a.safetensors"
    refused(lambda: find_file("HPSv2", "owner/model", "a.pt"), FileNotFoundError, "a.pt of 'owner/model'", words)
    assert asked == [("a.safetensors", False), ("a.pt", not reached)]


def test_a_wrong_checkpoint_is_told_before_the_tokenizer_is_fetched(tmp_path: Path) -> None:
    for folder in ("hps", "blip"):
        (tmp_path / folder).mkdir()
    hps, blip = save_hps(tmp_path / "hps"), save_image_reward(tmp_path / "blip")
    for file in (hps / HPS_FILE, blip / "ImageReward.pt"):
        torch.save({"a": torch.zeros(1)}, file)
    refused(lambda: TinyHPSv2(path=str(hps), tokenizer="owner/none"), ValueError, "HPSv2", "another network")
    refused(lambda: TinyImageReward(str(blip), "owner/none"), ValueError, "ImageReward", "missing")

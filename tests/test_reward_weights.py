"""Checkpoints of rewards: which file is read, what is refused, and that nothing but tensors comes in."""

import ast
import hashlib
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from published_layouts import random_weights
from safetensors.torch import save_file
from tiny_clip import save_clip
from tiny_rewards import AESTHETIC_FILE, HPS_FILE, TinyHPSv2, TinyImageReward, hps_shapes, save_aesthetic, save_hps
from tiny_rewards import save_image_reward as save_blip

from lightning_tilt.rewards import AestheticScore, CLIPScore, HPSv2Package, OpenCLIPScore, PickScore
from lightning_tilt.rewards.key_maps import open_clip_to_transformers
from lightning_tilt.rewards.weights import find_file, read_weights

PROMPTS = ["3"]


@pytest.fixture
def hps(tmp_path: Path) -> Path:
    return save_hps(tmp_path)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return save_aesthetic(save_clip(tmp_path))


def load(folder: Path, **options: Any) -> TinyHPSv2:
    return TinyHPSv2(path=str(folder), tokenizer=str(folder if folder.is_dir() else folder.parent), **options)


def refused(make: Callable[[], object], kind: type[Exception], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / HPS_FILE, weights_only=True)["state_dict"]
    return state


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def test_every_form_of_the_checkpoint_gives_the_same_reward(hps: Path, tmp_path: Path) -> None:
    """As published; as safetensors in open_clip's names, and in transformers'; with DDP's prefix; in the old format."""
    state, x = state_of(hps), torch.rand(1, 3, 16, 16)
    whole = {k: v.float().contiguous() for k, v in state.items()}
    forms = {"named": tmp_path / "named.pt", "ddp": tmp_path / "ddp.pt", "old": tmp_path / "old.pth"}
    forms |= {k: tmp_path / f"{k}.safetensors" for k in ("open_clip", "transformers")}
    torch.save(state, forms["named"])
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, forms["ddp"])
    torch.save({"state_dict": state}, forms["old"], _use_new_zipfile_serialization=False)
    save_file(whole, forms["open_clip"])
    save_file(open_clip_to_transformers(whole), forms["transformers"])
    expected = load(hps).score(x, PROMPTS)
    for form, file in forms.items():
        score = load(file).score(x, PROMPTS)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-6, msg=f"{form}: {score} for {expected}")


def test_safetensors_beside_a_pickle_are_taken_in_its_place(hps: Path) -> None:
    x, before = torch.rand(1, 3, 16, 16), load(hps)
    other = {k: v.contiguous() for k, v in random_weights(hps_shapes(), seed=1).items()}
    save_file(other, (hps / HPS_FILE).with_suffix(".safetensors"))
    for path in (hps, hps / HPS_FILE):
        assert not torch.equal(load(path).score(x, PROMPTS), before.score(x, PROMPTS))


def test_a_file_from_the_hub_s_cache(hps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The safe format is asked for first; what the repository has is taken."""
    asked = []

    def download(repository: str, name: str, local_files_only: bool) -> str:
        asked.append((repository, name))
        assert not local_files_only
        if name.endswith(".safetensors"):
            raise EntryNotFoundError(f"404: no {name}")
        return str(hps / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    TinyHPSv2(tokenizer=str(hps))
    names = ["HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt"]
    assert asked == [("xswu/HPSv2", name) for name in names]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: TinyHPSv2(), ("HPSv2 could not fetch HPS_v2.1_compressed.pt of 'xswu/HPSv2'", "a local file")),
        (lambda: TinyHPSv2(2.0), ("HPS_v2_compressed.pt",)),
        (lambda: TinyImageReward(), ("ImageReward could not fetch ImageReward.pt of 'THUDM/ImageReward'",)),
        (lambda: PickScore(), ("PickScore could not load a CLIP from 'yuvalkirstain/PickScore_v1'", "a folder")),
        (lambda: CLIPScore("nobody/nothing"), ("CLIPScore could not load a CLIP from 'nobody/nothing'",)),
        (lambda: AestheticScore("nobody/nothing"), (f"AestheticScore could not fetch {AESTHETIC_FILE}",)),
    ],
)
def test_an_unreachable_hub(make: Callable[[], object], parts: tuple[str, ...]) -> None:
    refused(make, FileNotFoundError, *parts)


def test_missing_files(tmp_path: Path, hps: Path) -> None:
    gone = tmp_path / "nowhere"
    for path in (gone, gone / "file.pt", tmp_path / "other.safetensors"):
        refused(lambda path=path: load(path), FileNotFoundError, "HPSv2 found no file", str(path), HPS_FILE)  # type: ignore[misc]
    (tmp_path / "empty").mkdir()
    refused(lambda: load(tmp_path / "empty"), FileNotFoundError, str(tmp_path / "empty" / HPS_FILE))
    refused(lambda: TinyHPSv2(path=str(hps), tokenizer=str(gone)), FileNotFoundError, "a tokenizer", str(gone))
    refused(lambda: PickScore(str(gone)), FileNotFoundError, "PickScore", str(gone), "no such folder")
    refused(lambda: AestheticScore(str(gone / "head.pth")), FileNotFoundError, "AestheticScore", "head.pth")


def test_truncated_files(hps: Path) -> None:
    file = hps / HPS_FILE
    content = file.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.999):
        file.write_bytes(content[: int(share * len(content))])
        refused(lambda: load(hps), ValueError, "HPSv2", str(file), "truncated", "fetch it again")
    safe = file.with_suffix(".safetensors")
    save_file({"a": torch.zeros(100)}, safe)
    content = safe.read_bytes()
    for share in (0.0, 0.1, 0.9):
        safe.write_bytes(content[: int(share * len(content))])
        refused(lambda: load(hps), ValueError, "HPSv2", str(safe), "truncated")


def test_a_pickle_that_could_run_code_is_never_loaded(hps: Path) -> None:
    file, witness = hps / HPS_FILE, hps / "witness"
    state = state_of(hps)
    for content in ({"state_dict": state, "more": Payload(witness)}, Payload(witness)):
        torch.save(content, file)
        refused(lambda: load(hps), ValueError, "HPSv2", str(file), "is refused", ".safetensors")
        file.write_bytes(pickle.dumps(content))
        refused(lambda: load(hps), ValueError, "HPSv2", str(file))
    assert not witness.exists()


def test_foreign_checkpoints(hps: Path) -> None:
    file, state = hps / HPS_FILE, state_of(hps)
    lost = "visual.transformer.resblocks.1.attn.in_proj_bias"
    cases: list[tuple[Any, tuple[str, ...]]] = [
        ({k: v for k, v in state.items() if k != lost}, ("layers.1.self_attn.k_proj.bias", "and 1 more missing")),
        ({**state, "visual.extra": torch.zeros(1)}, ("visual.extra left over",)),
        ({**state, "ln_final.weight": torch.zeros(5)}, ("text_model.final_layer_norm.weight of another shape",)),
        ({"a": torch.zeros(1)}, ("another network", "and 92 more missing", "a left over")),
        ({"state_dict": {}}, ("no names with tensors",)),
        ({"epoch": 3}, ("no names with tensors",)),
        ([torch.zeros(1)], ("no names with tensors",)),
        (torch.zeros(3), ("no names with tensors",)),
    ]
    for content, parts in cases:
        torch.save(content, file)
        refused(lambda: load(hps), ValueError, "HPSv2", str(file), *parts)


def test_foreign_checkpoints_of_the_others(tmp_path: Path, clip: Path) -> None:
    head = torch.load(clip / AESTHETIC_FILE, weights_only=True)
    del head["layers.6.bias"]
    torch.save(head, clip / AESTHETIC_FILE)
    refused(lambda: AestheticScore(str(clip), str(clip)), ValueError, "AestheticScore", "layers.6.bias missing")
    blip = tmp_path / "blip"
    blip.mkdir()
    state = torch.load(save_blip(blip) / "ImageReward.pt", weights_only=True)
    for name in ("blip.visual_encoder.cls_token", "blip.text_encoder.embeddings.LayerNorm.bias", "mlp.layers.0.bias"):
        torch.save({k: v for k, v in state.items() if k != name}, blip / "ImageReward.pt")
        refused(lambda: TinyImageReward(str(blip), str(blip)), ValueError, "ImageReward", "missing")


def test_a_clip_that_lacks_weights_or_is_damaged(clip: Path) -> None:
    """transformers alone would draw them at random, with a warning."""
    from safetensors.torch import load_file

    file = clip / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "visual_projection.weight"}, file, {"format": "pt"})
    refused(lambda: PickScore(str(clip)), ValueError, "PickScore", "1 weights are missing", "visual_projection.weight")
    file.write_bytes(file.read_bytes()[:1000])
    refused(lambda: PickScore(str(clip)), ValueError, "PickScore could not read the CLIP", str(clip))
    file.unlink()
    refused(lambda: PickScore(str(clip)), FileNotFoundError, "PickScore could not load a CLIP")


def test_checksums(hps: Path, clip: Path) -> None:
    right, wrong = sha256(hps / HPS_FILE), "0" * 64
    assert load(hps, sha256=right.upper()).version == "2.1"
    refused(lambda: load(hps, sha256=wrong), ValueError, "HPSv2", HPS_FILE, right, wrong)
    refused(lambda: load(hps, sha256="abc"), ValueError, "64 hexadecimal digits", "'abc'")
    weights = sha256(clip / "model.safetensors")
    for kind in (PickScore, CLIPScore):
        kind(str(clip), sha256=weights)
        refused(lambda kind=kind: kind(str(clip), sha256=wrong), ValueError, kind.__name__, weights)  # type: ignore[misc]
    head = sha256(clip / AESTHETIC_FILE)
    AestheticScore(str(clip), str(clip), sha256=head, clip_sha256=weights)
    refused(lambda: AestheticScore(str(clip), str(clip), sha256=weights), ValueError, AESTHETIC_FILE)
    refused(lambda: AestheticScore(str(clip), str(clip), clip_sha256=head), ValueError, "model.safetensors")


def test_a_checksum_is_compared_before_anything_is_read(hps: Path) -> None:
    (hps / HPS_FILE).write_bytes(b"rubbish")
    refused(lambda: load(hps, sha256="0" * 64), ValueError, "has the sha256", sha256(hps / HPS_FILE))


def test_home_is_understood(hps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(hps))
    assert find_file("HPSv2", f"~/{HPS_FILE}", HPS_FILE) == hps / HPS_FILE
    assert find_file("HPSv2", "~", HPS_FILE, as_named=True) == hps / HPS_FILE
    shutil.move(hps / HPS_FILE, hps / "renamed.bin")
    assert set(read_weights("HPSv2", find_file("HPSv2", "~/renamed.bin", HPS_FILE))) == set(hps_shapes())


@pytest.mark.parametrize(
    ("make", "extra"),
    [(lambda: OpenCLIPScore("ViT-B-32", "openai"), "openclip"), (lambda: HPSv2Package(), "hpsv2")],
)
def test_a_missing_extra_names_the_command(
    make: Callable[[], object], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the package is installed: the import is made to fail."""
    for module in ("open_clip", "hpsv2", "hpsv2.img_score"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(make, ModuleNotFoundError, "needs", f'pip install "lightning-tilt[{extra}]"')


def test_no_reward_but_these_needs_a_package_that_is_not_required() -> None:
    """Read from the sources: the extras' packages are reached through `optional` alone."""
    from lightning_tilt import rewards

    extras = {"open_clip", "hpsv2", "ImageReward", "torchvision", "clip", "timm"}
    for file in Path(rewards.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not extras & {name.partition(".")[0] for name in names}, file.name

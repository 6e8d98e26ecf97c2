"""Embeddings of prompts on disk: the same bits, found again, never another's, and no encoder where all are there."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from command import DIGITS, overlay, tilt
from tiny import PROMPTS, save_sd15

from lightning_tilt.models import StableDiffusion, StableDiffusion3
from lightning_tilt.models.embeddings import PromptEmbeddings

FAMILIES = ["sd15", "sd3"]
HALF = torch.bfloat16


def told(predictor: Any, prompts: list[str] = PROMPTS) -> dict[str, torch.Tensor]:
    return dict(predictor.encode(prompts, len(prompts)).tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_run_needs_no_encoder(family: str, load: Any, tmp_path: Path) -> None:
    fresh = told(load(family))
    first = load(family, embeddings=tmp_path / "cache")
    first.cache_prompts(PROMPTS)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == len(PROMPTS)  # "" is among them
    second = load(family, embeddings=tmp_path / "cache", without_encoders=True)
    assert len(second.encoders) == 0 and second.pipeline.text_encoder is None
    for name, tensor in told(second).items():
        assert torch.equal(tensor, fresh[name])
    with pytest.raises(FileNotFoundError, match=r"prompt 'a zebra' has no embedding .*--dry_run prompts"):
        told(second, ["a zebra"])
    assert sorted((tmp_path / "cache").iterdir()) == files
    # A folder by another name is the same model; what is remembered survives a move, as the files do.
    second.double()
    assert torch.equal(told(second)["encoder_hidden_states"], fresh["encoder_hidden_states"])


def test_dropped_encoders_leave_memory_and_the_prompts_stay(load: Any, tmp_path: Path) -> None:
    predictor = load("sd3", embeddings=tmp_path)
    before, weights = told(predictor), sum(p.numel() for p in predictor.encoders[0].module.parameters())
    predictor.drop_encoders()
    assert weights and len(predictor.encoders) == 0 and predictor.pipeline.text_encoder_3 is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in told(predictor).items())
    predictor.embeddings.forget()
    assert all(torch.equal(tensor, before[name]) for name, tensor in told(predictor).items())
    with pytest.raises(ValueError, match=r"only where predictor\.embeddings names a folder"):
        load("sd15").drop_encoders()
    with pytest.raises(ValueError, match="without_encoders needs embeddings"):
        load("sd15", without_encoders=True)


def test_another_encoder_length_or_precision_is_another_embedding(load: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    options: list[dict[str, Any]] = [{}, {"max_sequence_length": 5}, {"text_encoder_3": False}, {"dtype": "bfloat16"}]
    seen = [told(load("sd3", embeddings=folder, **o), ["b"])["encoder_hidden_states"] for o in options]
    assert len(list(folder.iterdir())) == 4
    again = [told(load("sd3", embeddings=folder, **o), ["b"])["encoder_hidden_states"] for o in options]
    assert len(list(folder.iterdir())) == 4
    for old, new in zip(seen, again, strict=True):
        assert torch.equal(old, new) and old.dtype == new.dtype


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_one_other_bit_is_another_encoder(share: float, tmp_path: Path) -> None:
    """Wherever in the file of weights it is."""
    folder, model = tmp_path / "cache", save_sd15(tmp_path / "model")
    told(StableDiffusion(model, embeddings=folder), ["b"])
    weights = model / "text_encoder/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[int(share * (len(raw) - 1))] ^= 1
    weights.write_bytes(bytes(raw))
    told(StableDiffusion(model, embeddings=folder), ["b"])
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "text"])
def test_a_damaged_file_is_made_again_or_named(damage: str, load: Any, tmp_path: Path) -> None:
    predictor = load("sd15", embeddings=tmp_path)
    right = told(predictor, ["a", "b"])["encoder_hidden_states"]
    file, other = (predictor.embeddings.file(p, torch.float32) for p in "ab")
    whole = file.read_bytes()
    broken = {"cut": whole[:-7], "empty": b"", "foreign": other.read_bytes(), "text": b"not a tensor at all"}
    file.write_bytes(broken[damage])
    without = load("sd15", embeddings=tmp_path, without_encoders=True)
    with pytest.warns(UserWarning, match="cannot be used"), pytest.raises(FileNotFoundError, match="prompt 'a'"):
        told(without, ["a"])
    fresh = load("sd15", embeddings=tmp_path)
    with pytest.warns(UserWarning, match=f"{file.name}.* is made again"):
        assert torch.equal(told(fresh, ["a", "b"])["encoder_hidden_states"], right)
    assert file.read_bytes() == whole


def test_no_prompt_chooses_a_path(tmp_path: Path) -> None:
    store = PromptEmbeddings(4, tmp_path / "cache")
    for prompt in ("../../etc/passwd", "/absolute", "a\0b", "é" * 5000, "con\n"):
        store.add(prompt, HALF, {"e": torch.ones(2, dtype=HALF)})
        assert store.file(prompt, HALF).parent == tmp_path / "cache"
    assert [p.name for p in tmp_path.iterdir()] == ["cache"] and len(list((tmp_path / "cache").iterdir())) == 5


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        PromptEmbeddings(1, tmp_path / "file")
    with pytest.raises(OSError, match="cannot be written to"):
        PromptEmbeddings(1, tmp_path / "file/below").add("a", HALF, {"e": torch.ones(1)})


def _write(folder: Path, start: Any) -> None:
    start.wait()
    store = PromptEmbeddings(1, folder)
    for i in range(30):
        store.add(f"prompt {i % 3}", HALF, {"e": torch.full((1000,), float(i % 3))})


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Event()
    writers = [context.Process(target=_write, args=(tmp_path, start)) for _ in range(2)]
    for writer in writers:
        writer.start()
    start.set()
    store = PromptEmbeddings(1, tmp_path)
    for i in range(200):  # a reader never sees half a file: it would warn, and warnings are errors
        found = store._read(f"prompt {i % 3}", HALF)
        assert found is None or bool((found["e"] == i % 3).all())
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_the_command_line_encodes_ahead_and_a_fit_drops_the_encoders(tmp_path: Path) -> None:
    report = {"class_path": "TiltReport", "init_args": {"base_samples": 4, "tuned_samples": 4}}
    args = [*overlay(DIGITS, tmp_path, trainer={"callbacks": [{"class_path": "EncodePrompts"}, report]}),
            "--data.prompts", "[two, nine]", "--model.predictor.embeddings", tmp_path / "e"]  # fmt: skip
    encoded = tilt("fit", *args, "--dry_run", "prompts")
    assert encoded.status == 0, encoded.err
    assert "3 prompts have their embeddings in" in encoded.out and not (tmp_path / "config.yaml").exists()
    files = sorted((tmp_path / "e").iterdir())
    assert len(files) == 4
    for more in (["--model.predictor.without_encoders", "true"], []):
        result = tilt("fit", *args, *more)
        assert result.status == 0, result.err
        assert (tmp_path / "report.json").is_file() and sorted((tmp_path / "e").iterdir()) == files
    missing = tilt("fit", *args, "--model.predictor.without_encoders", "true", "--data.prompts", "[seven hundred]")
    assert missing.status == 1 and "'seven hundred' has no embedding" in missing.errors[0]
    assert tilt("validate", *args, "--dry_run", "prompts").errors[0].endswith("--dry_run prompts is for fit" + SHOWN)
    # As a saved configuration has it.
    (tmp_path / "null.yaml").write_text("model: {init_args: {predictor: {init_args: {embeddings: null}}}}\n")
    parsed = tilt("fit", *args[:4], "--config", tmp_path / "null.yaml", "--print_config").config["model"]["init_args"]
    assert parsed["predictor"]["init_args"]["embeddings"] is None
    nowhere = tilt("fit", "--config", DIGITS, "--dry_run", "prompts")
    assert "--model.predictor.embeddings FOLDER" in nowhere.errors[0]


SHOWN = " (LIGHTNING_TILT_DEBUG=1 shows the traceback)"


def test_sd3_without_t5_has_its_own(load: Any, tmp_path: Path) -> None:
    short = load("sd3", embeddings=tmp_path, text_encoder_3=False)
    assert isinstance(short, StableDiffusion3) and len(short.encoders) == 2
    assert short.embeddings.identity["parts"] == ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_pipeline_has_its_encoders_though_they_were_dropped(family: str, load: Any, tmp_path: Path) -> None:
    predictor = load(family, embeddings=tmp_path / "cache")
    before = told(predictor)
    predictor.drop_encoders()
    predictor.save_pipeline(tmp_path / "pipeline")
    kind = {"sd15": StableDiffusion, "sd3": StableDiffusion3}[family]
    again = told(kind(tmp_path / "pipeline"))
    # Not bit for bit: what a matrix product rounds to can depend on where its factors lie in memory.
    torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-6)
    assert len(predictor.encoders) == 0 and predictor.pipeline.text_encoder is None

"""Files that went wrong: the error is one line, and what was there before is intact."""

import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TOY, overlay, tilt
from quiet import RESUMED
from test_resume import PROMPTS, make, trainer
from torch import nn

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.callbacks.buffer import ReplayBuffer, dealt
from lightning_tilt.checkpoints import AtomicCheckpointIO, read_checkpoint, write_atomically
from lightning_tilt.data import PromptDataModule
from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces.identity import base_identity, same_base
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "run"
    assert tilt("fit", *overlay(TOY, folder)).status == 0
    return folder


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_atomically({"a": torch.ones(3)}, path)
    with small_disk(100_000), pytest.raises(OSError, match=r"last\.ckpt could not be written .* is intact: make room"):
        write_atomically({"a": torch.zeros(10**6)}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"] and torch.load(path)["a"].tolist() == [1, 1, 1]


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/this_must_not_exist",)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "page", "code", "pickle", "other"])
def test_other_files_are_refused_in_one_line(kind: str, run: Path, tmp_path: Path) -> None:
    path, good = tmp_path / "x.ckpt", (run / "checkpoints/last.ckpt").read_bytes()
    if kind == "cut":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no checkpoint at all")
    elif kind == "page":
        path.write_text("<!DOCTYPE html>\n<html>404</html>")
    elif kind == "code":
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "x": Code()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code()))
    else:
        torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"x\.ckpt (cannot be read as|is no) (a )?checkpoint") as caught:
        read_checkpoint(path)
    said = {"page": "a web page", "code": r"holds code (posix.system)", "cut": "cut short", "empty": "cut short"}
    assert "\n" not in str(caught.value) and said.get(kind, "checkpoint") in str(caught.value)
    assert "weights_only" not in str(caught.value) and "mmap" not in str(caught.value)
    with pytest.raises(ValueError):
        AtomicCheckpointIO().load_checkpoint(path)
    result = tilt("fit", *overlay(TOY, tmp_path / "run"), "--ckpt_path", path)
    assert result.status == 1 and len(result.errors) == 1 and "x.ckpt" in result.errors[0]
    assert not Path("/tmp/this_must_not_exist").exists()


def test_a_checkpoint_of_another_base_or_model_is_refused(run: Path) -> None:
    last = run / "checkpoints/last.ckpt"
    args = [*overlay(TOY, run, trainer={"max_steps": 3}), "--ckpt_path", last]
    before = last.read_bytes()
    weights = "--model.init_args.predictor.init_args.base.init_args.weights"
    other = tilt("fit", *args, f"{weights}=[0.2,0.6,0.2]")
    assert other.status == 1 and "another base: its density differ" in other.errors[0]
    wider = tilt("fit", *args, "--model.init_args.predictor.init_args.hidden=16")
    assert wider.status == 1 and "is of another model: its predictor." in wider.errors[0]
    assert last.read_bytes() == before
    told = (pytest.warns(UserWarning, match=match) for match in ("loaded all the same", "weights: .* -> "))
    with next(told), next(told):
        assert tilt("fit", *args, f"{weights}=[0.2,0.6,0.2]", "--model.init_args.allow_other_base=true").status == 0


def test_a_base_is_known_by_its_values() -> None:
    mixture = ([0.4, 0.6], [[-1.0], [1.0]], [[[0.3]], [[0.2]]])
    first = base_identity(NeuralTilt(GaussianMixturePredictor(*mixture)))
    assert same_base(first, base_identity(NeuralTilt(GaussianMixturePredictor(*mixture), hidden=3))) == []
    moved = ([0.4, 0.6], [[-1.0], [1.001]], [[[0.3]], [[0.2]]])
    assert same_base(first, base_identity(NeuralTilt(GaussianMixturePredictor(*moved)))) == ["density"]
    assert same_base(first, base_identity(NeuralTilt(GaussianBase([2])))) == ["output", "density"]


def test_networks_are_known_in_any_precision(load: Any) -> None:
    first, second = (base_identity(load("sd15", rank=r, dtype=d)) for r, d in ((2, "float32"), (3, "bfloat16")))
    assert {"network", "vae", "encoders"} <= set(first) and same_base(first, second) == []
    other = load("sd15", rank=2)
    with torch.no_grad():
        next(p for p in other.network.parameters() if not p.requires_grad).mul_(1.1)
    assert same_base(first, base_identity(other)) == ["network"]


def test_a_tensor_too_long_for_float32_indices_is_known_to_its_last_value() -> None:
    long, predictor = nn.Module(), NeuralTilt(GaussianBase([2]))
    long.register_buffer("values", torch.zeros(3 * 7680 * 1280, dtype=torch.bfloat16))  # a layer of SD 1.5's size
    predictor.add_module("long", Frozen(long))
    first = base_identity(predictor)
    long.values[-1] = 1.0
    assert same_base(first, base_identity(predictor)) == ["long"]


@RESUMED
def test_prompts_that_changed_are_named(tmp_path: Path) -> None:
    def go(data: PromptDataModule, exact: bool = True, resume: bool = True) -> None:
        module, _, _, _ = make("on policy")
        sampler = TrajectorySampler(steps=3, samples_per_condition=1, exact_resume=exact)
        fit = trainer([sampler], max_steps=2 if resume else 1, limit_val_batches=0)
        fit.fit(module, data, ckpt_path=tmp_path / "x.ckpt" if resume else None)
        fit.save_checkpoint(tmp_path / ("y.ckpt" if resume else "x.ckpt"))

    go(PromptDataModule(PROMPTS, batch_size=2), resume=False)
    with pytest.raises(ValueError, match="prompt 3 was another one and is 'new' now"):
        go(PromptDataModule([*PROMPTS[:2], "new", *PROMPTS[3:]], batch_size=2))
    with pytest.raises(ValueError, match="there were 7 prompts, and now there are 6"):
        go(PromptDataModule(PROMPTS[:6], batch_size=2))
    with pytest.raises(ValueError, match=r"data\.seed was 0, and now it is 1"):
        go(PromptDataModule(PROMPTS, batch_size=2, seed=1))
    go(PromptDataModule([*PROMPTS[:2], "new", *PROMPTS[3:]], batch_size=2), exact=False)


def test_a_hub_that_cannot_be_reached_is_named(run: Path) -> None:
    before = (run / "checkpoints/last.ckpt").read_bytes()
    config = "configs/digits/sd15_adjoint_matching.yaml"
    result = tilt("fit", *overlay(config, run), "--model.predictor.path", "nobody/no-such-model")
    assert result.status in (1, 2) and "nobody/no-such-model" in result.errors[0]
    assert (run / "checkpoints/last.ckpt").read_bytes() == before


def test_a_buffer_is_dealt_out_to_other_processes() -> None:
    """What one process would have kept of four conditions, from two parts, and back."""
    module, sampler, _, _ = make("on policy")
    fit = trainer([sampler], max_steps=0)
    module._trainer = fit
    each = sampler.samples_per_condition

    def kept(batch: list[str], world: tuple[int, int]) -> list[dict[str, Any]]:
        buffer = ReplayBuffer(2)
        for number in range(2):
            torch.manual_seed(0)
            buffer.add(sampler.rollout(module, batch, stream="validate", number=number, world=world))
        return buffer.state_dict()

    prompts = ["a", "bb", "ccc", "dddd"]
    one, two = kept(prompts, (1, 0)), [kept(prompts[rank::2], (2, rank)) for rank in range(2)]

    def same(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g["sample"], w["sample"]) and torch.equal(g["index"], w["index"])
            assert g["condition"]["prompts"] == w["condition"]["prompts"] and g["uses"] == w["uses"]
            torch.testing.assert_close(g["noise"], w["noise"], rtol=0, atol=0)

    same(dealt(two, each, 1, 0), one)
    for rank in range(2):
        same(dealt([one], each, 2, rank), two[rank])
    with pytest.raises(ValueError, match="4 conditions, which 3 processes cannot share evenly"):
        dealt([one], each, 3, 0)


def test_processes_share_one_draw_of_a_common_buffer() -> None:
    module, sampler, _, _ = make("on policy")
    module._trainer = trainer([sampler], max_steps=0)
    buffer = ReplayBuffer(2)
    for number in range(2):
        path = sampler.rollout(module, ["a", "bb", "ccc"], stream="validate", number=number)
        buffer.add(path.ends())
    one = buffer.draw_samples(0, 3, 8)
    halves = [buffer.draw_samples(0, 3, 4, 2, rank) for rank in range(2)]
    for rank, half in enumerate(halves):
        assert torch.equal(half.end, one.end[rank::2]) and half.prompts == (one.prompts or [])[rank::2]
    # 12 samples over 5 processes: two each; over 20: all of them for everybody, which has the same mean.
    assert [len(buffer.draw_samples(0, 3, 4, 5, rank)) for rank in range(5)] == [2] * 5
    assert len(buffer.draw_samples(0, 3, 4, 20, 19)) == 12
    buffer.to(torch.device("meta"))
    (first, _) = buffer.state_dict()
    assert first["states"].device.type == "meta" and first["sample"].device.type == first["index"].device.type == "cpu"

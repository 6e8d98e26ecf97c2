"""The rewards of an estimate: each counted by its own code without its weights, or named as not counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from command import DIGITS, overlay, tilt
from tiny_clip import save_clip
from torch import Tensor, nn

from lightning_tilt.estimate.rewards import find_rewards
from lightning_tilt.estimate.tracking import AllocationTracker
from lightning_tilt.frozen import Frozen
from lightning_tilt.rewards import CLIPScore, Reward, WeightedSum


class Own(Reward):
    """A user's, with a network that is made of nobody knows what."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Frozen(nn.Linear(3, 1))

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        score: Tensor = self.network(images.mean((2, 3)))
        return score.squeeze(1)


class OwnSkeleton(Own):
    """One that says that it reads no weights."""

    has_skeleton = True


def config(kind: type | str, **arguments: Any) -> dict[str, Any]:
    path = f"lightning_tilt.rewards.{kind}" if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return {"class_path": path, "init_args": arguments}


@pytest.mark.parametrize(
    ("reward", "weights"),
    [
        (config("HPSv2"), 986_109_441),
        (config("PickScore", dtype="bfloat16"), 986_109_441),
        (config("ImageReward"), 445_278_720 + 787_456 + 131_200 + 8_256 + 1_040 + 17),  # and its head
        (config("CLIPScore", path="openai/clip-vit-large-patch14"), 427_616_513),
        (config("WeightedSum", rewards=[config("Ink"), config(OwnSkeleton)]), 4),
    ],
)
def test_networks_have_their_published_sizes(reward: dict[str, Any], weights: int) -> None:
    found, unknown = find_rewards(reward)
    assert not unknown and len(found) == 1
    parameters = [p for n in found[0].networks for p in n.parameters()]
    assert sum(p.numel() for p in parameters) == weights
    assert reward["init_args"].get("dtype") is None or {p.dtype for p in parameters} == {torch.bfloat16}


def test_what_is_not_known_is_named() -> None:
    parts = [config("Ink"), config(Own), config("CLIPScore", path="some/clip"), config("OpenCLIPScore", model="RN50")]
    found, unknown = find_rewards(config(WeightedSum, rewards=parts))
    assert not found
    assert unknown == [
        "Own, which cannot be built without weights",
        "CLIPScore, whose CLIP 'some/clip' is not known before it is fetched: give a folder that has it",
        "OpenCLIPScore, which cannot be built without weights",
    ]


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_blank_score_needs_what_a_score_needs(micro_batch: int | None, tmp_path: Path) -> None:
    """In chunks too: all bytes of a score and its gradient, but for the prompts' embeddings."""
    reward = CLIPScore(str(save_clip(tmp_path)), micro_batch=micro_batch)
    x = torch.rand(6, 3, 40, 28, requires_grad=True)
    weights = list(reward.network.module.parameters())
    peaks = []
    reward.embed_prompts(["a"])
    for ask in (lambda: reward.score(x, ["a"] * 6), lambda: reward.score_blank(x)):
        with AllocationTracker([x, *weights]) as tracker:
            torch.autograd.grad(ask().sum(), x)
        peaks.append(tracker.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01) and peaks[1] > 4 * x.numel()


def test_a_path_without_a_network_is_the_runs_own_error(tmp_path: Path) -> None:
    args = overlay(DIGITS, tmp_path)
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    save_clip(other)
    (other / "config.json").write_text('{"model_type": "blip"}')
    told = f"could not load a CLIP from '{tmp_path}"
    for flags, culprit in [
        (["CLIPScore", "--model.reward.path", tmp_path / "empty"], told + "/empty'; give a Hub name, or a folder"),
        (["CLIPScore", "--model.reward.path", tmp_path / "none"], "(there is no such folder)"),
        (["CLIPScore", "--model.reward.path", other], "its config.json is of the kind 'blip', not 'clip'"),
        (["HPSv2", "--model.reward.path", tmp_path / "hps.pt"], "HPSv2 found no file"),
        (["HPSv2", "--model.reward.version", "3"], "HPSv2 has the versions 2.0 and 2.1, not '3.0'"),
    ]:
        refused = tilt("fit", *args, "--model.reward", *flags, "--dry_run", "memory")
        assert refused.status == 1 and culprit in refused.errors[0], refused.err

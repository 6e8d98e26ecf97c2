"""What a loss says of the module, the reward and the loader that it is given, before anything is lost in silence."""

import logging
from typing import Any, cast

import pytest
import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from toys import PromptedNet, SumReward, fit, trainer

from lightning_tilt import AdjointMatching, TrajectorySampler
from lightning_tilt.data import PromptDataModule
from lightning_tilt.interfaces import Reward
from lightning_tilt.interfaces.groups import _uneven
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.tasks import AdjointMatchingTask

SAID = "lightning.pytorch.utilities.rank_zero"


class Own(LightningModule):
    """Somebody's module, with a training step of its own."""

    def __init__(self, reward: Reward | None = None) -> None:
        super().__init__()
        self.predictor = PromptedNet(RectifiedFlow())
        self.process, self.reward, self.own_steps = self.predictor.process, reward or SumReward(), 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.own_steps += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Tilted(AdjointMatching, Own):
    """The two together."""


class Both(AdjointMatching, Own):
    """A training step that calls both."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        Own.training_step(self, batch, batch_idx)
        return super().training_step(batch, batch_idx)


class ByHand(Tilted):
    """Optimised by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Lonely(Reward):
    """Its score forgets the prompts."""

    def score(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return images.flatten(1).sum(1)


def small() -> TrajectorySampler:
    return TrajectorySampler(steps=3, samples_per_condition=2)


def test_a_training_step_that_is_not_called_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, SAID):
        module = Tilted()
        fit(module, small(), [["one"]])
    assert module.own_steps == 0
    assert "Own.training_step is not called: Tilted trains on the tilt's loss alone" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, SAID):
        both = Both()
        fit(both, small(), [["one"]])
    assert both.own_steps == 1 and "is not called" not in caplog.text


def test_optimisation_by_hand_is_refused() -> None:
    with pytest.raises(TypeError, match=r"ByHand optimises by hand .* leave automatic_optimization True"):
        fit(ByHand(), small(), [["one"]])


def test_a_score_without_prompts_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Lonely\.score\(images\) does not take the images and the prompts"):
        fit(Tilted(Lonely()), small(), [["one"]])


@pytest.mark.parametrize(
    "batches", [[["seven", "one"], ["two", "three"]], ["seven", "one"], [{"prompt": ["seven"]}], [torch.zeros(2)]]
)
def test_a_plain_list_is_no_loader(batches: Any) -> None:
    """Lightning would train on ["seven", "two"] and ["one", "three"]."""
    with pytest.raises(TypeError, match=r"a plain list of batches is no loader.* DataLoader\(prompts, batch_size=4\)"):
        trainer([small()]).fit(Tilted(), batches)


def test_a_plain_list_to_validate_on_is_told_to_be_a_loader() -> None:
    module = AdjointMatchingTask(predictor=PromptedNet(RectifiedFlow()), reward=SumReward())
    with pytest.raises(TypeError, match=r"not str \(a plain list is no loader: DataLoader"):
        trainer([small()]).validate(module, [["seven", "one"]], verbose=False)


def test_a_loader_of_a_flat_list_brings_lists_of_prompts() -> None:
    recorded: list[Any] = []

    class Seen(TrajectorySampler):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            recorded.append(batch)
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    loader = DataLoader(["seven", "one", "two", "three"], batch_size=2)
    trainer([Seen(steps=3, samples_per_condition=2)], max_steps=2, log_every_n_steps=1).fit(Tilted(), loader)
    assert recorded == [["seven", "one"], ["two", "three"]]


def test_a_last_batch_is_that_of_this_process() -> None:
    """Six prompts in twos come out even; three on each of two processes do not."""
    six = ["one", "two", "three", "four", "five", "six"]
    shared = DistributedSampler(cast(Any, six), num_replicas=2, rank=0)
    assert not _uneven(DataLoader(cast(Any, six), batch_size=2))
    assert _uneven(DataLoader(cast(Any, six), batch_size=2, sampler=shared))
    assert not _uneven(DataLoader(cast(Any, six), batch_size=2, sampler=shared, drop_last=True))


@pytest.mark.parametrize(("size", "uneven"), [(2, True), (3, False)])
def test_the_start_line_knows_that_a_last_batch_is_smaller(
    size: int, uneven: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module = AdjointMatchingTask(predictor=PromptedNet(RectifiedFlow()), reward=SumReward())
    data = PromptDataModule(["one", "two", "three"], batch_size=size)
    with caplog.at_level(logging.INFO, SAID):
        trainer([small()], limit_val_batches=0).fit(module, datamodule=data)
    said = f"One update trains on {2 * size} samples: {size} prompts x 2 samples"
    assert said + (" (fewer where an epoch ends)" if uneven else "") in caplog.messages

"""The host's own steps: learning-rate schedules, and what validation says with several processes."""

import pytest
import torch
from quiet import FORKED
from torch import Tensor
from toys import PromptedNet, SumReward, fit, trainer

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.data import PromptDataModule
from lightning_tilt.interfaces import Prompts
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.tasks import AdjointMatchingTask

Plateau = torch.optim.lr_scheduler.ReduceLROnPlateau


class Picky(SumReward):
    """Not finite for one of the prompts."""

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        assert prompts is not None
        good = torch.tensor([p != "seven" for p in prompts])
        return torch.where(good, super().score(images, prompts), torch.nan)


def sampler() -> TrajectorySampler:
    return TrajectorySampler(steps=3, samples_per_condition=4, seed=1, on_bad_reward="skip")


def test_reduce_on_plateau_watches_the_reward() -> None:
    module = AdjointMatchingTask(
        predictor=PromptedNet(RectifiedFlow()),
        reward=SumReward(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        # Nothing is good enough: after the first, every update is one without progress.
        lr_scheduler=lambda o: Plateau(o, mode="max", factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"),
    )
    fit(module, sampler(), [["one"]] * 4)
    assert module.optimizers().param_groups[0]["lr"] == 0.125  # type: ignore[union-attr]


def test_reduce_on_plateau_of_a_cost_is_refused() -> None:
    module = AdjointMatchingTask(
        predictor=PromptedNet(RectifiedFlow()), reward=SumReward(), lr_scheduler=lambda o: Plateau(o)
    )
    with pytest.raises(ValueError, match="give it mode: max"):
        module.configure_optimizers()


@FORKED
@pytest.mark.filterwarnings("ignore:.*they are left out", "ignore:The ``compute`` method of metric")
def test_validation_of_two_processes_is_that_of_all_samples() -> None:
    """One process has not a single good sample: it must still meet the other where they exchange."""
    found = []
    for words, options in ((["one"], {}), (["one", "seven"], {"devices": 2, "strategy": "ddp_fork"})):
        torch.manual_seed(4)
        module = AdjointMatchingTask(predictor=PromptedNet(RectifiedFlow()), reward=Picky())
        data = PromptDataModule(words, batch_size=1)
        found += trainer([sampler()], **options).validate(module, datamodule=data, verbose=False)
    one, two = found
    assert set(two) == {"val/reward", "val/reward_se", "val/diversity"}
    assert two == pytest.approx(one)

"""Steered samples for validate, test and predict: drawn by weight, keyed, with log Z beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import tilt
from toys import PromptedNet, SumReward, trainer

from lightning_tilt import citation
from lightning_tilt.callbacks import SteeredSampler, TrajectorySampler
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.identities import expectation, log_partition
from lightning_tilt.models import GaussianMixturePredictor, NeuralTilt, the_mixture
from lightning_tilt.module import TiltModule
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.steering import SMC
from lightning_tilt.tasks import AdjointMatchingTask

pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers.*")


def mixture_task() -> AdjointMatchingTask:
    mixture, reward = the_mixture()
    return AdjointMatchingTask(NeuralTilt(GaussianMixturePredictor.of(mixture), hidden=8, layers=1), reward)


def sampler(smc: SMC, **kwargs: Any) -> SteeredSampler:
    return SteeredSampler(TrajectorySampler(**({"steps": 20, "samples_per_condition": 1, "seed": 0} | kwargs)), smc)


def predicted(tmp_path: Path, smc: SMC, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    run = trainer([sampler(smc, **kwargs)], default_root_dir=tmp_path)
    data = DrawsDataModule(samples=2000, predict_samples=2000)
    batches = run.predict(mixture_task(), datamodule=data)
    assert batches is not None
    return batches[0]["images"], batches[0]["reward"], json.loads((tmp_path / "steering.json").read_text())


def test_predictions_follow_the_tilt_and_log_z_is_the_chains_own(tmp_path: Path) -> None:
    x, reward, told = predicted(tmp_path, SMC(particles=4000, replicates=20))
    host = mixture_task()
    base = TrajectorySampler(steps=20, samples_per_condition=1, seed=1).rollout(
        host, torch.zeros(20_000), stream="report", number=0, base=True
    )
    exact, log_z = expectation(base.reward, base.reward), log_partition(base.reward)
    assert len(x) == 2000 and x.shape == (2000, 2)
    error = (exact.se**2 + float(reward.var()) / 1000) ** 0.5  # 2000 draws from 4000 particles share ancestors
    assert abs(float(reward.mean()) - exact.mean) < 4 * error
    found = told["batches"][0]["log_z"]
    assert abs(found["mean"] - log_z.mean) < 4 * (found["se"] ** 2 + log_z.se**2) ** 0.5
    assert len(told["batches"][0]["ess"]) == 20 and told["smc"]["particles"] == 4000
    assert told["sources"] == ["domingoenrich2024adjoint", *SMC.sources]
    assert all(f"{{{key}," in citation(tmp_path) for key in told["sources"])


def test_draws_are_keyed(tmp_path: Path) -> None:
    smc = SMC(particles=256)
    first, _, _ = predicted(tmp_path / "a", smc)
    again, _, _ = predicted(tmp_path / "b", smc)
    other, _, _ = predicted(tmp_path / "c", smc, seed=3)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_prompts_keep_their_own_particles() -> None:
    class Prompted(AdjointMatchingTask):
        """A host that a test may call outside a Trainer."""

    host = Prompted(PromptedNet(RectifiedFlow()), SumReward(), lam=3.0)
    steered = sampler(SMC(particles=16), samples_per_condition=3)
    path = steered.rollout(host, ["one", "three"], stream="predict", number=0)
    assert path.prompts == ["one"] * 3 + ["three"] * 3 and path.steps == 0 and len(path) == 6
    assert steered.found[0]["prompts"] == ["one", "three"] and steered.found[0]["log_z"]["n"] == 8
    torch.testing.assert_close(path.reward, SumReward().score(path.end, None))
    assert set(path.sample[:3].tolist()) <= set(range(16)) and set(path.sample[3:].tolist()) <= set(range(16, 32))


def test_a_host_without_lam_is_refused() -> None:
    with pytest.raises(TypeError, match="lam"):
        sampler(SMC()).rollout(
            TiltModule(PromptedNet(RectifiedFlow()), SumReward()), ["one"], stream="predict", number=0
        )


def test_a_fit_is_not_steered(tmp_path: Path) -> None:
    run = tilt("fit", "--config", "configs/toy/adjoint_matching.yaml", "--steering", "smc",
               "--trainer.default_root_dir", str(tmp_path))  # fmt: skip
    assert run.status == 1 and "validate, test and predict" in run.err and not list(tmp_path.iterdir())


def test_without_a_twist_nothing_is_resampled() -> None:
    """A tuned model's weights fall along the path; resampling by them would pull it back to the base."""
    host = AdjointMatchingTask(PromptedNet(RectifiedFlow()), SumReward(), lam=3.0)
    host.predictor.network[2].weight.data += 2.0
    steered = sampler(SMC(particles=64, twist="none", proposal="tuned", resample_below=0.99))
    path = steered.rollout(host, ["one"], stream="predict", number=0, samples_per_condition=40)
    assert steered.found[0]["ancestors"] == len(path.sample.unique()) < 40
    assert steered.found[0]["resampled"] == 0 and min(steered.found[0]["ess"]) < 0.99

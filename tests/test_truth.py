"""What a report says of a density: reference samples, distances beside their floors, log Z against the exact one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import gaussian, trainer

from lightning_tilt.callbacks import TiltReport, TrajectorySampler
from lightning_tilt.callbacks.truth import distances, truth_of
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt, the_mixture
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards import LinearReward
from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.energies import DoubleWell4
from lightning_tilt.tasks import AdjointMatchingTask
from lightning_tilt.transition import ExactGaussian


class Shifted(Density):
    """exp(-|x - 1|^2/(2 s^2)) in two dimensions."""

    log_z = math.log(2 * math.pi * 0.25)

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - 1) ** 2).sum(1) / (2 * 0.25)

    def reference(self, n: int, seed: int = 0) -> torch.Tensor:
        return 1 + 0.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))

    def figures(self, x: torch.Tensor) -> dict[str, float]:
        return {"right": float((x[:, 0] > 1).float().mean())}


class Unsampled(Density):
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return (x**4).sum(1)


def test_the_truth_of_a_tilted_mixture_is_its_closed_form() -> None:
    mixture, reward = the_mixture()
    truth = truth_of(GaussianMixturePredictor.of(mixture), reward, 1.0)
    assert truth is not None and truth.log_z == pytest.approx(-1.3756, abs=1e-4)
    x = truth.reference(20_000, 0)
    assert x is not None
    error = 4 * x.std(0) / math.sqrt(len(x))
    assert bool(((x.mean(0) - torch.tensor([-0.01, 0.70])).abs() < error + 0.005).all())  # the figures have two digits
    a, b = x[:100], x[100:200]
    log_ratio = mixture.log_prob(a.double()) + reward.score(a.double(), None)
    log_ratio = log_ratio - mixture.log_prob(b.double()) - reward.score(b.double(), None)
    torch.testing.assert_close(truth.energy(b) - truth.energy(a), log_ratio, rtol=0, atol=1e-9)


def test_a_model_without_a_closed_form_has_no_truth() -> None:
    base = GaussianBase([2])
    assert truth_of(base, LinearReward([1.0, 0.0]), 1.0) is None


def test_distances_see_a_wrong_law_and_pass_the_right_one() -> None:
    density = Shifted()
    truth = truth_of(GaussianBase([2]), density, 1.0)
    assert truth is not None and truth.log_z == density.log_z
    right = distances(truth, density.reference(2000, seed=5), seed=0)
    wrong = distances(truth, density.reference(2000, seed=5) + 0.5, seed=0)
    for name in ("sliced_w2", "energy_w2"):
        assert right[name]["value"] < 4 * right[name]["floor"] < wrong[name]["value"]
        assert right[name]["n"] == 2000
    assert wrong["sliced_w2"]["value"] == pytest.approx(0.5, rel=0.1)  # |shift|^2/2 per direction, |shift|^2 = .5
    assert right["right"] == pytest.approx(0.5, abs=0.05)


def test_without_reference_samples_there_are_no_distances() -> None:
    truth = truth_of(GaussianBase([2]), Unsampled(), 1.0)
    assert truth is not None and distances(truth, torch.zeros(10, 2), seed=0) == {}


def _report(tmp_path: Path, base: Any, reward: Any, transition: Any) -> dict[str, Any]:
    module = AdjointMatchingTask(NeuralTilt(base, hidden=8, layers=1), reward, checkpoint=False)
    module.reward.bind(module.predictor)
    report = TiltReport(base_samples=2000, tuned_samples=500)
    callbacks = [TrajectorySampler(steps=6, samples_per_condition=1, transition=transition), report]
    fitted = trainer(callbacks, default_root_dir=tmp_path, max_steps=2)
    fitted.fit(module, datamodule=DrawsDataModule(samples=32, batches=2))
    found: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    return found


@pytest.mark.filterwarnings("ignore:.*num_workers.*")
def test_a_density_on_exact_steps_is_held_to_its_own_normaliser(tmp_path: Path) -> None:
    report = _report(tmp_path, GaussianBase([2]), Shifted(), ExactGaussian())
    assert report["density"] == "Shifted" and report["loss"] == "adjoint_matching"
    assert report["log_z"]["exact"] == report["log_z"]["continuous"] == Shifted.log_z
    assert abs(report["log_z"]["mean"] - Shifted.log_z) < 4 * report["log_z"]["se"]
    assert report["energy_evaluations"] == 64 and report["network_evaluations"] > 64 * 6
    assert {"value", "floor", "n"} == set(report["sliced_w2"]) == set(report["energy_w2"])


@pytest.mark.filterwarnings("ignore:.*num_workers.*")
def test_other_chains_are_held_to_their_own_law(tmp_path: Path) -> None:
    report = _report(tmp_path, gaussian(0.0, 1.0, RectifiedFlow()), LinearReward([0.5]), None)
    log_z = report["log_z"]
    assert log_z["exact"] == report["log_z_base"]["mean"] and log_z["exact_se"] == report["log_z_base"]["se"]
    assert log_z["continuous"] == pytest.approx(0.125)


def test_energies_of_particles_are_compared_for_all_samples() -> None:
    """Only distances up to symmetry, of a quadratic cost, are computed for some of them."""
    truth = truth_of(GaussianBase([4, 2], mean_free=True), DoubleWell4(), 1.0)
    assert truth is not None
    found = distances(truth, DoubleWell4().reference(1500, seed=3), seed=0, repeats=1)
    assert found["energy_w2"]["n"] == 1500 and found["symmetric_w2"]["n"] == 1000

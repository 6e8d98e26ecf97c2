"""The lean adjoint's norm and its bound: an equality for Gaussian bases, an inequality for log-concave ones."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import PromptedNet, SumReward, fit, gaussian

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.callbacks.adjoint_norm import AdjointNorm, jacobian_norms
from lightning_tilt.identities.lean_adjoint import adjoint_bound, lean_adjoint
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt
from lightning_tilt.models.gaussian_mixture import GaussianMixture
from lightning_tilt.process import Cosine, RectifiedFlow, VariancePreserving
from lightning_tilt.rewards import LinearReward, QuadraticReward
from lightning_tilt.tasks import AdjointMatchingTask
from lightning_tilt.transition import DDIM, ExactGaussian

PROCESSES = {"flow": RectifiedFlow(), "shifted": RectifiedFlow(shift=3.0), "cosine": Cosine(),
             "sd15": VariancePreserving.from_betas()}  # fmt: skip


def close_components() -> GaussianMixture:
    """Two components of variance .5 at a distance of 1: unimodal, and log-concave."""
    means = torch.tensor([[-0.5, 0.0], [0.5, 0.0]], dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.4, 0.6]).double(), means, torch.eye(2).double().expand(2, 2, 2) / 2)


def smallest_curvature(mixture: GaussianMixture) -> float:
    """The least eigenvalue of -hess log p on a grid, by differences of the density alone."""
    x, h = torch.linspace(-4, 4, 401, dtype=torch.float64), 1e-3
    grid = torch.stack([x, torch.zeros_like(x)], 1)  # the second axis is that of every component: 1/.5 = 2 along it
    up, down = (mixture.log_prob(grid + torch.tensor([d, 0.0]).double()) for d in (h, -h))
    return float((-(up - 2 * mixture.log_prob(grid) + down) / h**2).min().clamp(max=2.0))


def run(tmp_path: Path, predictor: Any, reward: Any, look: AdjointNorm, transition: Any = None, steps: int = 12) -> Any:
    task = AdjointMatchingTask(predictor, reward, lam=2.0, checkpoint=False).double()
    sampler = TrajectorySampler(steps=steps, samples_per_condition=1, seed=3, transition=transition)
    fit(task, sampler, [torch.zeros(2)], callbacks=[look], default_root_dir=tmp_path)
    assert (tmp_path / "adjoint_norm.png").stat().st_size > 0
    return json.loads((tmp_path / "adjoint_norm.json").read_text())


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [2, 3, 20])
def test_the_bound_is_an_equality_for_a_gaussian_base(name: str, steps: int) -> None:
    """Naive products of the slopes of the DDIM mean, at any K."""
    v, process = 0.3, PROCESSES[name]
    base, t = gaussian(0.7, v, process), process.grid(steps)
    mean_of = DDIM()
    states = torch.randn(steps + 1, 5, 1, dtype=torch.float64)

    def mean(x: Tensor, k: int) -> Tensor:
        output = base.predict(x, t[k].expand(5), base.encode(None, 5))
        return mean_of(process, x, process.interpret(output, "sample", x, t[k]), t[k], t[k + 1]).mean

    a, _ = lean_adjoint(mean, states, torch.ones(5, 1).double(), list(range(steps)))
    bound = adjoint_bound(process, t, 1 / v)
    torch.testing.assert_close(a[:, :, 0], bound[1:, None].expand(steps, 5), rtol=1e-10, atol=1e-12)
    alpha, beta = process.alpha(t), process.beta(t)
    torch.testing.assert_close(bound, alpha / (alpha**2 + beta**2 / v), rtol=1e-12, atol=1e-12)  # t_K = 1
    if steps > 2:  # a chain that ends before the data: relative to its own last slope
        a, _ = lean_adjoint(mean, states[:-1], torch.ones(5, 1).double(), list(range(steps - 1)))
        expected = adjoint_bound(process, t[:-1], 1 / v)[1:, None].expand(steps - 1, 5)
        torch.testing.assert_close(a[:, :, 0], expected, rtol=1e-10, atol=1e-12)


def test_a_log_concave_base_stays_below_its_bound(tmp_path: Path) -> None:
    mixture = close_components()
    m = smallest_curvature(mixture)
    # In closed form 1/v - (d/2v)^2/cosh^2, whose least value is where both components weigh the same.
    assert m == pytest.approx(2 - 1, abs=1e-3)
    predictor = NeuralTilt(GaussianMixturePredictor.of(mixture), hidden=8, layers=1)
    reward = QuadraticReward([[0.6, 0.2], [0.2, 0.5]], [-0.5, 1.0])
    found = run(tmp_path, predictor, reward, AdjointNorm(400, precision=m - 1e-3, jacobians=True, micro_batch=150))
    relative = found["relative"]
    for lists in zip(*(relative[key] for key in ("median", "q95", "max", "growth_max", "bound")), strict=True):
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(lists))  # path by path, not on average alone
    assert relative["median"][-1] == relative["max"][-1] == 1
    assert 0.5 < found["ratio_max"] <= 1 and found["n"] == 400 and found["precision"] == m - 1e-3
    assert found["t"][-1] == 1 and len(found["mean"]) == len(found["bound"]) == 12
    # What one path allows is at least what it did, and at most what the base allows.
    for mean, growth, bound in zip(found["mean"], found["growth"], found["bound"], strict=True):
        assert mean <= growth * (1 + 1e-9) and growth <= bound * (1 + 1e-9)
    sharper = run(tmp_path, predictor, reward, AdjointNorm(400, precision=1.3))
    assert sharper["ratio_max"] > 1  # of more curvature than the base has, the bound is wrong, and seen to be


@pytest.mark.parametrize("transition", [DDIM(), ExactGaussian(4.0)])
def test_a_gaussian_base_is_its_own_bound(tmp_path: Path, transition: Any) -> None:
    predictor = NeuralTilt(GaussianBase([2], scale=0.5), hidden=8, layers=1)
    found = run(tmp_path, predictor, LinearReward([1.0, -2.0]), AdjointNorm(50), transition)
    assert found["relative"]["median"] == pytest.approx(found["relative"]["bound"], rel=1e-9)
    assert found["precision"] == 4.0 and found["ratio_max"] == pytest.approx(1, abs=1e-10)
    assert found["mean"] == pytest.approx(found["bound"], rel=1e-10)
    assert found["mean"][-1] == pytest.approx(2 * math.sqrt(5), rel=1e-10)


def test_prompts_are_looked_at_and_no_bound_is_claimed_for_other_steps(tmp_path: Path) -> None:
    look = AdjointNorm(12, precision=1.0, micro_batch=5)
    task = AdjointMatchingTask(PromptedNet(RectifiedFlow()), SumReward(), checkpoint=False, allow_non_memoryless=True)
    sampler = TrajectorySampler(steps=4, samples_per_condition=2, seed=3, transition=DDIM(0.5), guidance_scale=2.0)
    fit(task, sampler, [["one", "seven"]], callbacks=[look], default_root_dir=tmp_path)
    found = json.loads((tmp_path / "adjoint_norm.json").read_text())
    assert found["n"] == 12 and "bound" not in found


def test_jacobian_norms_and_refusals() -> None:
    A = torch.randn(3, 3, dtype=torch.float64)
    norms = jacobian_norms(lambda x: torch.sin(x @ A.T), torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(norms, torch.linalg.svdvals(A)[0].expand(4))
    with pytest.raises(ValueError, match="log-concave"):
        AdjointNorm(precision=0.0)
    with pytest.raises(ValueError, match="log-concave"):
        adjoint_bound(RectifiedFlow(), torch.ones(2), -1.0)

"""Path weights: their treatments against loops, prompt by prompt, and that weighted samples are those of the tilt."""

import math

import pytest
import torch
from end_points import one_fit, quadratic
from torch import Tensor
from toys import PromptedNet, SumReward

from lightning_tilt.losses.path_weights import good_weights
from lightning_tilt.models import GaussianBase, GaussianMixture, NeuralTilt
from lightning_tilt.process import Driftless, RectifiedFlow
from lightning_tilt.tasks import ConditionalScoreMatchingTask, NovelScoreMatchingTask
from lightning_tilt.transition import DDIM, Brownian, ExactGaussian, Transition

LOG_W = torch.tensor([0.3, -1.2, 4.0, 0.1, -math.inf, 2.5], dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.0, 800.0, -800.0])
def test_treatments_equal_naive_loops(shift: float) -> None:
    """Sample 4 is left out; a shift of log w by a constant (log Z) changes nothing, however large."""
    good = [0, 1, 2, 3, 5]
    w = {i: math.exp(float(LOG_W[i])) for i in good}
    mean = sum(w.values()) / 5
    for kind, clip in (("self_normalised", math.inf), ("clipped", 1.5), ("truncated", math.sqrt(5))):
        cut = {i: min(v / mean, clip) for i, v in w.items()}
        again = sum(cut.values()) / 5
        found = good_weights(LOG_W + shift, kind, 1.5)  # type: ignore[arg-type]
        expected = [cut[i] / again if i in cut else 0.0 for i in range(6)]
        assert found.tolist() == pytest.approx(expected, rel=1e-10)
        assert float(found.sum()) == pytest.approx(5)
    assert good_weights(LOG_W, "none", 1.5).tolist() == [1, 1, 1, 1, 0, 1]
    nobody = torch.full((3,), -math.inf, dtype=torch.float64)
    assert good_weights(nobody, "self_normalised", 1.5).tolist() == [0, 0, 0]


def test_prompts_have_equal_mass_and_a_density_has_one_z() -> None:
    torch.manual_seed(3)
    net = PromptedNet(RectifiedFlow())
    net.network[2].weight.data += 0.5
    _, record = one_fit(
        ConditionalScoreMatchingTask, net, SumReward(), [["one", "three"]], sampler={"samples_per_condition": 3}
    )
    path = record.trajectories[0]
    for group in (path.index == 0, path.index == 1):
        w = path.log_w[group].exp()
        torch.testing.assert_close(path.importance[group], 3 * w / w.sum(), rtol=1e-10, atol=0)
    assert path.importance.std() > 0.01
    tilt = NeuralTilt(GaussianBase([2]), hidden=8, layers=1)
    torch.nn.init.normal_(tilt.last.weight)
    _, record = one_fit(ConditionalScoreMatchingTask, tilt, quadratic(), [torch.zeros(6)])
    path = record.trajectories[0]
    torch.testing.assert_close(path.importance, 6 * path.log_w.softmax(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("base", "transition"),
    [
        (GaussianBase([2], 1.2, 0.3), ExactGaussian(1 / 1.2**2)),
        (GaussianBase([2], process=Driftless(0.2, 1.5)), Brownian()),
    ],
    ids=["flow", "driftless"],
)
def test_weighted_samples_of_a_wrong_model_are_those_of_the_tilt(base: GaussianBase, transition: Transition) -> None:
    """Four exact steps of a model moved at random: E[w X_1]/E[w] and E[w X_1^2]/E[w] within 4 s.e. of the tilt's."""
    tilt = NeuralTilt(base, hidden=8, layers=1)
    with torch.no_grad():
        tilt.last.bias.copy_(torch.tensor([-0.1, 0.3]))
        tilt.last.weight.normal_(0, 0.1)
    _, record = one_fit(
        NovelScoreMatchingTask, tilt, quadratic(), [torch.zeros(20_000)], path_weights="self_normalised",
        sampler={"transition": transition},
    )  # fmt: skip
    path = record.trajectories[0]
    law = GaussianMixture(
        torch.ones(1).double(), torch.full((1, 2), base.mean).double(), base.scale**2 * torch.eye(2)[None].double()
    )
    exact = law.tilt(quadratic(), 1.0)[0]
    for f, truth in ((path.end, exact.mean), (path.end**2, exact.covariance.diagonal() + exact.mean**2)):
        weighted, plain = path.importance[:, None] * f, f.mean(0)
        se = (path.importance[:, None] * (f - truth)).std(0) / len(f) ** 0.5
        assert ((weighted.mean(0) - truth).abs() < 4 * se).all()
        assert ((plain - truth).abs() > 4 * se).any()


def test_what_is_refused() -> None:
    net, reward = PromptedNet(RectifiedFlow()), SumReward()
    ode = {"transition": DDIM(ddim_eta=0.0), "base_last_step": False}
    for sampler in (ode, {"base_last_step": False}, {"steps": 1}):
        with pytest.raises(ValueError, match="base_last_step"):
            one_fit(ConditionalScoreMatchingTask, net, reward, [["one"]], sampler=sampler)
    one_fit(NovelScoreMatchingTask, net, reward, [["one"]], sampler=ode)
    with pytest.raises(ValueError, match="path_weights is one of"):
        NovelScoreMatchingTask(predictor=net, reward=reward, path_weights="clip")
    with pytest.raises(ValueError, match="weight_clip is in units"):
        NovelScoreMatchingTask(predictor=net, reward=reward, weight_clip=0.5)


def test_clipping_changes_the_gradient_and_nothing_else() -> None:
    """Of the same rollout and the same noisings; samples without weights have the plain gradient."""

    def gradient(**kwargs: object) -> Tensor:
        torch.manual_seed(3)
        net = PromptedNet(RectifiedFlow())
        net.network[2].weight.data += 0.5
        sampler = {"samples_per_condition": 6}
        _, record = one_fit(NovelScoreMatchingTask, net, SumReward(), [["one"]], sampler=sampler, lam=3.0, **kwargs)
        return torch.cat([g.flatten() for g in record.gradients[0].values()])

    plain, full, cut = gradient(), gradient(path_weights="self_normalised"), gradient(path_weights="clipped")
    small = gradient(path_weights="clipped", weight_clip=1.0 + 1e-9)
    torch.testing.assert_close(full, cut, rtol=1e-10, atol=1e-12)  # no weight reaches 10 of 6 samples
    assert (small - full).norm() > 0.01 * full.norm() and (small - plain).norm() > 0.01 * full.norm()

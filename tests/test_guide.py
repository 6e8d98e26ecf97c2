"""The guide of a small network: where the reward's gradient moves a prediction to, how far, and what it costs."""

import math
from typing import Any

import pytest
import torch
from toys import fit

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.models import (
    EquivariantTilt,
    GaussianBase,
    GaussianMixturePredictor,
    LatticeTilt,
    NeuralTilt,
    the_mixture,
)
from lightning_tilt.models.guide import Guide
from lightning_tilt.process import Driftless, RectifiedFlow
from lightning_tilt.rewards import CLIPScore, QuadraticReward
from lightning_tilt.rewards.energies import DoubleWell4, Funnel, LennardJones13, Phi4
from lightning_tilt.tasks import AdjointSamplingTask
from lightning_tilt.transition import DDIM, Brownian

DRIFTLESS = Driftless(0.1, 2.0)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def opened(guide: Guide) -> None:
    """A gate that is 1 at all times."""
    torch.nn.init.zeros_(guide.last.weight)
    torch.nn.init.ones_(guide.last.bias)


def test_the_move_is_the_softened_gradient() -> None:
    guide = Guide(QuadraticReward([[2.0, 0.0], [0.0, 1.0]], [0.0, 0.0]), reach=3.0).double()
    opened(guide)
    x = torch.tensor([[0.01, -0.02], [30.0, 40.0]], dtype=torch.float64)
    t, variance = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.25], dtype=torch.float64)
    short, long = guide(x, t, variance, same).detach()
    for move, (a, b) in zip((short, long), x.tolist(), strict=True):
        v = (-0.25 * 2 * a, -0.25 * b)
        length = math.hypot(*v)
        expected = [c / math.sqrt(1 + length**2 / (9 * 0.25)) for c in v]
        torch.testing.assert_close(move, torch.tensor(expected, dtype=torch.float64))
    assert float(long.norm()) == pytest.approx(3 * 0.5, rel=0.01), "three standard deviations of what is open"


def test_next_to_the_data_it_is_the_tilt_itself() -> None:
    """x1_hat* - x1_hat = V E*[grad r | X_t] -> V grad r(x1_hat), for a Gaussian in closed form."""
    a, c = 0.8, 1.0
    base = GaussianBase([1])
    tilt = NeuralTilt(base, hidden=4, layers=1, guide=QuadraticReward([[a]], [c])).double()
    assert tilt.guide is not None
    opened(tilt.guide)
    x, t = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([0.98], dtype=torch.float64)
    nobody = Condition({}, None, 1)
    v, mean = 1 / (1 + a), a * c / (1 + a)  # the tilt of N(0, 1)
    alpha, beta = 0.98, 0.02
    exact = mean + alpha * v / (alpha**2 * v + beta**2) * (x - alpha * mean)
    still = base.predict(x, t, nobody)
    assert float(((tilt.predict(x, t, nobody) - still) / (exact - still)).detach()) == pytest.approx(1.0, abs=0.01)


def test_it_begins_at_its_base_and_learns() -> None:
    tilt = NeuralTilt(GaussianBase([10]), hidden=8, layers=1, guide=Funnel())
    nobody, x, t = tilt.encode(None, 3), torch.randn(3, 10), torch.tensor([0.1, 0.5, 0.9])
    with tilt.base() as base:
        assert torch.equal(tilt.predict(x, t, nobody), base.predict(x, t, nobody))
    tilt.predict(x, t, nobody).square().sum().backward()
    assert tilt.guide is not None and tilt.guide.last.bias.grad is not None
    assert float(tilt.guide.last.bias.grad.abs()) > 0
    assert set(tilt.state_dict()) == set(tilt.trained_parameters()), "the reward is not saved"


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_particles_stay_equivariant_and_finite(start: float) -> None:
    base = GaussianBase([13, 3], mean_free=True, process=DRIFTLESS)
    tilt = EquivariantTilt(base, hidden=8, layers=2, guide=LennardJones13()).double()
    assert tilt.guide is not None
    opened(tilt.guide)
    nobody, t = tilt.encode(None, 2), torch.tensor([0.0, 0.6])
    x = tilt.project(start * torch.randn(2, 13, 3, dtype=torch.float64))
    q, order = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0], torch.randperm(13)
    once = tilt.predict(x, t, nobody)
    torch.testing.assert_close(tilt.predict((x @ q.mT)[:, order], t, nobody), (once @ q.mT)[:, order])
    assert bool(once.isfinite().all())
    torch.testing.assert_close(once.mean(1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-10, rtol=0)


def test_gradients_of_a_path_go_through_it() -> None:
    tilt = NeuralTilt(GaussianBase([1]), hidden=4, layers=1, guide=QuadraticReward([[3.0]], [1.0])).double()
    assert tilt.guide is not None
    opened(tilt.guide)
    x, t = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True), torch.tensor([0.4])
    nobody = tilt.encode(None, 1)
    (slope,) = torch.autograd.grad(tilt.predict(x, t, nobody).sum(), x)
    h = 1e-5
    with torch.no_grad():
        difference = (tilt.predict(x + h, t, nobody) - tilt.predict(x - h, t, nobody)) / (2 * h)
    assert float(slope) == pytest.approx(float(difference), rel=1e-6)
    with torch.inference_mode():
        assert tilt.predict(x.detach(), t, nobody).isfinite().all()


def test_its_energy_evaluations_are_counted() -> None:
    chain = Chain(DRIFTLESS, Brownian(), DRIFTLESS.grid(5))
    base = GaussianBase([4, 2], mean_free=True, process=DRIFTLESS)
    for guide, cost in ((None, 0), (DoubleWell4(), 5 * 7)):
        tilt = EquivariantTilt(base, hidden=8, layers=1, guide=guide)
        chain.evaluations.reward = 0
        with torch.no_grad():
            chain.rollout(tilt, Condition({}, None, 7), tilt.project(torch.randn(6, 7, 4, 2)))
        assert chain.evaluations.reward == cost


def test_a_task_trains_with_it() -> None:
    """Of a narrow Gaussian density a few updates get nearer to the standard deviation of .3 with a guide."""

    class Narrow(Funnel):
        state_shape = (2,)

        def energy(self, x: torch.Tensor) -> torch.Tensor:
            return ((x - 1) ** 2).sum(1) / (2 * 0.3**2)

    def std(guide: Narrow | None) -> float:
        torch.manual_seed(0)
        net = NeuralTilt(GaussianBase([2]), hidden=16, layers=1, guide=guide)
        task = AdjointSamplingTask(net, Narrow(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), lam=1.0)
        sampler = TrajectorySampler(steps=24, samples_per_condition=1, seed=0, transition=DDIM())
        fit(task, sampler, [torch.zeros(256)] * 60)
        return float(sampler.rollout(task, torch.zeros(2000), stream="report", number=0).end.std())

    alone, guided = std(None), std(Narrow())
    assert abs(guided - 0.3) < 0.7 * abs(alone - 0.3), (alone, guided)


@pytest.mark.parametrize(("kind", "shape", "alone"), [(LatticeTilt, (4, 4), True), (NeuralTilt, (4,), False)])
def test_what_is_one_vector(kind: Any, shape: tuple[int, ...], alone: bool) -> None:
    """A huge gradient at one site leaves its neighbours as they are; in a plain sample it takes part in one length."""

    class Steep(Phi4):
        def energy(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).square().sum(1) + 1e4 * x.flatten(1)[:, 0]

    base = GaussianBase(shape)
    tilt = kind(base, hidden=4, layers=1, guide=Steep())
    opened(tilt.guide)
    x, t, nobody = torch.ones(1, *shape), torch.tensor([0.5]), tilt.encode(None, 1)
    move = (tilt.predict(x, t, nobody) - base.predict(x, t, nobody)).flatten().detach()
    assert float(move[0].abs()) == pytest.approx(3 * 0.5**0.5, rel=0.01), "V = 1/2, a reach of three"
    assert (float(move[1].abs()) > 0.1) == alone


def test_latents_are_decoded_and_autocast_is_left() -> None:
    seen: list[torch.Tensor] = []

    class Watching(QuadraticReward):
        def score(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
            seen.append(images)
            assert not torch.is_autocast_enabled("cpu")
            return super().score(images, prompts)

    class Doubled(GaussianBase):
        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    tilt = NeuralTilt(Doubled([1]), hidden=4, layers=1, guide=Watching([[1.0]], [0.0]))
    x, t, nobody = torch.ones(1, 1), torch.tensor([0.5]), tilt.encode(None, 1)
    with torch.autocast("cpu", torch.bfloat16):
        tilt.predict(x, t, nobody)
    with tilt.base() as base:
        torch.testing.assert_close(seen[0], 2 * base.predict(x, t, nobody))
    assert seen[0].dtype == torch.float32


def test_a_tilt_of_a_guided_tilt_counts_both() -> None:
    inner = NeuralTilt(GaussianMixturePredictor.of(the_mixture()[0]), guide=QuadraticReward([[1.0]], [0.0]))
    outer = NeuralTilt(inner, guide=QuadraticReward([[1.0]], [0.0]))
    assert (inner.reward_cost, outer.reward_cost) == (1, 2)


def test_what_cannot_guide_is_refused() -> None:
    class Steps(QuadraticReward):
        is_differentiable = False

    with pytest.raises(TypeError, match="Steps has no gradient"):
        NeuralTilt(GaussianBase([1]), guide=Steps([[1.0]], [0.0]))
    with pytest.raises(TypeError, match="CLIPScore reads prompts"):
        Guide(CLIPScore())
    with pytest.raises(ValueError, match="guide_reach is a number of standard deviations"):
        NeuralTilt(GaussianBase([10]), guide=Funnel(), guide_reach=0.0)
    with pytest.raises(TypeError, match="tilts a base of known density"):
        NeuralTilt(NeuralTilt(GaussianBase([10], process=RectifiedFlow())), guide=Funnel())

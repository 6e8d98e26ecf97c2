"""The path of marginals, its networks and its chain, against closed forms of one Gaussian."""

import math
from typing import Any

import pytest
import torch
from gaussian_transport import AffineTransport, GaussianTransport, QuadraticAndLinear, slope
from toys import gaussian

from lightning_tilt.identities import log_partition, value_and_divergence
from lightning_tilt.interfaces import Condition
from lightning_tilt.losses.continuity import residual
from lightning_tilt.models import NeuralTilt, NeuralTransport, PotentialTransport, the_mixture
from lightning_tilt.models.closed_form import GaussianMixturePredictor
from lightning_tilt.process import Cosine, Prediction, Process, RectifiedFlow, VariancePreserving
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transport import SCHEDULES, BoundedNoise, MarginalPath, TransportChain, crooks

PROCESSES = [RectifiedFlow(), Cosine()]


def nobody(n: int) -> Condition:
    return Condition({}, None, n)


def paths(problem: GaussianTransport, predictor: Any, chain: TransportChain, n: int, seed: int = 0) -> Trajectory:
    noise = torch.randn(chain.steps + 1, n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        states, z = chain.rollout(predictor, nobody(n), noise)
    reward, whole = QuadraticAndLinear(problem).score(states[-1], None), torch.ones(n)
    return Trajectory(chain.t, states, z, nobody(n), torch.arange(n), torch.arange(n), reward, 1.0, 0, whole)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_residual_vanishes_for_the_closed_form_transport(process: Process) -> None:
    problem = GaussianTransport(process, end=0.9)
    chain, predictor = problem.chain(10), AffineTransport(problem)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).repeat(3)[:, None]
    t = torch.tensor([0.05, 0.5, 0.85], dtype=torch.float64).repeat_interleave(7)
    f = chain.fields(predictor, x, t, nobody(21), rate=True)
    w, div_w = value_and_divergence(chain.transport(predictor, t, nobody(21)), x)
    assert float(residual(f, w, div_w, slope(problem.free_energy, t)).abs().max()) < 1e-10
    assert float(residual(f, 1.1 * w, 1.1 * div_w, slope(problem.free_energy, t)).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["state", "x1_hat"])
@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda tau: torch.sin(math.pi / 2 * tau)])
def test_value_gradient_and_rate_are_those_of_the_formula(kind: Any, schedule: Any) -> None:
    mixture, reward = the_mixture()
    process = RectifiedFlow()
    path = MarginalPath(lambda x, c: reward.score(x, None), 1.7, kind, schedule, 0.1, 0.95)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 2, generator=g, dtype=torch.float64)
    t = torch.tensor([0.2, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)

    def naive(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tau = (t - 0.1) / 0.85
        c = {"linear": tau, "quadratic": tau * tau, "smooth": 3 * tau**2 - 2 * tau**3}
        asked = x if kind == "state" else mixture.prediction(process, x, t).x1_hat
        return 1.7 * (torch.sin(math.pi / 2 * tau) if callable(schedule) else c[schedule]) * reward.score(asked, None)

    def predict(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Prediction:
        return mixture.prediction(process, x, t)

    with torch.no_grad():
        look = path.look(x, t, nobody(5), predict, rate=True)
    torch.testing.assert_close(look.value, naive(x, t))
    e = 1e-6
    torch.testing.assert_close(look.rate, (naive(x, t + e) - naive(x, t - e)) / (2 * e), rtol=1e-6, atol=1e-7)
    for i in (0, 1):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = e
        difference = (naive(x + step, t) - naive(x - step, t)) / (2 * e)
        torch.testing.assert_close(look.gradient[:, i], difference, rtol=1e-6, atol=1e-7)
    with torch.inference_mode():
        torch.testing.assert_close(path.look(x.clone(), t.clone(), nobody(5), predict).gradient, look.gradient)
    twice = path.look(x.requires_grad_(), t, nobody(5), predict, create_graph=True)
    assert torch.autograd.grad(twice.gradient.square().sum(), x)[0].abs().max() > 0


def test_wrong_paths_are_refused() -> None:
    for wrong, name in (({"kind": "states"}, "kind"), ({"schedule": "cubic"}, "schedule")):
        with pytest.raises(ValueError, match=name):
            MarginalPath(lambda x, c: x[:, 0], 1.0, **wrong)
    with pytest.raises(ValueError, match=r"from c\(0\) = 0 to c\(1\) = 1, and this one from 0 to 2"):
        MarginalPath(lambda x, c: x[:, 0], 1.0, schedule=lambda tau: 2 * tau)
    with pytest.raises(ValueError, match="sigma must be positive"):
        BoundedNoise(0.0)


@pytest.mark.parametrize("process", [*PROCESSES, VariancePreserving.from_betas(zero_terminal_snr=True)], ids=repr)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_networks_are_a_velocity_on_top_of_the_base(process: Process, scale: float) -> None:
    base = GaussianMixturePredictor.of(the_mixture()[0], process)
    torch.manual_seed(2)
    for kind in (NeuralTransport, PotentialTransport):
        net = kind(base, hidden=16, layers=2, input_scale=scale).double()
        t = process.grid(10)[[0, 3, 9]]
        x = torch.randn(3, 2, dtype=torch.float64)
        assert float(net.w(x, t, nobody(3)).detach().abs().max()) == 0
        torch.nn.init.normal_(net.last.weight, std=0.3)
        velocities = [
            process.velocity(process.interpret(p.predict(x, t, nobody(3)), "sample", x, t), t) for p in (net, base)
        ]
        torch.testing.assert_close(velocities[0] - velocities[1], net.w(x, t, nobody(3)))
        assert float(net.w(x, t, nobody(3)).detach().norm(dim=1).min()) > 1e-2
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net.potential(x, t).sum(), x)
    torch.testing.assert_close(net.w(x, t, nobody(3)), gradient)
    with torch.inference_mode():
        torch.testing.assert_close(net.w(x.detach().clone(), t.clone(), nobody(3)), gradient)
    assert float(net.potential(torch.zeros(3, 2), t).detach().abs().max()) == 0


def test_transport_of_any_predictor_is_the_difference_of_velocities() -> None:
    problem = GaussianTransport(RectifiedFlow())
    torch.manual_seed(3)
    net = NeuralTilt(gaussian(problem.mu, problem.v, problem.process), hidden=8, layers=1).double()
    torch.nn.init.normal_(net.last.weight, std=0.3)
    chain, x, t = problem.chain(10), torch.randn(4, 1).double(), torch.full((4,), 0.3, dtype=torch.float64)
    w, div_w = value_and_divergence(chain.transport(net, t, nobody(4)), x)
    torch.testing.assert_close(w, (1 - t)[:, None] * net.f(x, t).detach())  # beta^2 f of x1_hat, as a velocity
    f = chain.fields(net, x, t, nobody(4))
    torch.testing.assert_close(chain.transport(net, t, nobody(4), v=f.v)(x).detach(), w)
    assert float(div_w.abs().max()) > 0


def test_noising_process_gives_back_the_control_weight() -> None:
    """Where w = sigma^2/2 grad r, B = B0, and Crooks is section 3's weight of the same kernels, path by path."""
    problem = GaussianTransport(RectifiedFlow())
    chain = problem.chain(12)

    class Guidance(AffineTransport):
        def w(self, x: Any, t: Any, condition: Any) -> Any:
            return t[:, None] / chain.path.end / 2 * (-problem.q * (x - problem.c) + problem.l)

    predictor = Guidance(problem)
    path = paths(problem, predictor, chain, 50)
    base = predictor._base[0]
    control = path.reward - chain.log_ratio(path, chain.mean(base, nobody(50)))
    torch.testing.assert_close(chain.log_weights(predictor, path, 1.0), control, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("process", "weights"),
    [(RectifiedFlow(), "crooks"), (Cosine(), "crooks"), (RectifiedFlow(), "jarzynski")],
    ids=["flow-crooks", "cosine-crooks", "flow-jarzynski"],
)
def test_weights_of_any_transport_are_right_up_to_the_step(process: Process, weights: Any) -> None:
    """Untrained and wrong transports: the error of log Z shrinks with K, 4 s.e. allowed beside 1.5/K."""
    for exact, more in ((0.0, (0.0, 0.0)), (0.7, (0.2, -0.3))):
        for steps in (20, 60):
            end = float(process.grid(steps)[-2])
            problem = GaussianTransport(process, end=end)
            chain, predictor = problem.chain(steps, weights=weights), AffineTransport(problem, exact, more)
            path = paths(problem, predictor, chain, 2000)
            log_z = log_partition(chain.log_weights(predictor, path, 1.0))
            true = problem.end_log_z(torch.tensor(end, dtype=torch.float64))
            assert abs(log_z.mean - float(true)) < 1.5 / steps + 4 * log_z.se < 0.2, (exact, steps)
    assert torch.allclose(true, problem.free_energy(torch.ones_like(true)), atol=0.02)


def test_exact_transport_leaves_little_to_the_weights() -> None:
    spread = []
    for steps in (20, 40):
        problem = GaussianTransport(RectifiedFlow(), end=1 - 1 / steps)
        chain, predictor = problem.chain(steps, weights="jarzynski"), AffineTransport(problem)
        spread.append(float(chain.log_weights(predictor, paths(problem, predictor, chain, 400), 1.0).std()))
    assert spread[1] < 0.6 * spread[0] < 0.06


def test_an_older_models_paths_keep_their_weights() -> None:
    """Crooks reads w off the noise: another model than the one that drew the paths changes the last state's B alone."""
    problem = GaussianTransport(RectifiedFlow(), end=0.95)
    chain, older = problem.chain(20), AffineTransport(problem, 0.5)
    path = paths(problem, older, chain, 30)
    looks = [list(crooks(chain, p, path)) for p in (older, AffineTransport(problem, -2.0))]
    for (_, a), (_, b) in zip(looks[0][:-1], looks[1][:-1], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(looks[0][-1][1], looks[1][-1][1])
    cut = chain.log_weights(older, path, 1.0, micro_batch=7)
    torch.testing.assert_close(cut, chain.log_weights(older, path, 1.0))


def test_base_is_the_plain_chain_and_the_last_step_its_own() -> None:
    problem = GaussianTransport(RectifiedFlow(), end=0.9)
    chain, predictor = problem.chain(10), AffineTransport(problem)
    assert chain.noisy_steps == list(range(9)) and not chain.transition.memoryless
    noise = torch.randn(11, 6, 1, dtype=torch.float64)
    states, _ = chain.rollout(predictor, nobody(6), noise, base=True)
    t, x = torch.tensor(0.5).double(), states[5]
    (a, b), (m, S) = problem.moving(problem.base, t), problem.base(t)
    expected = x + 0.1 * (a * x + b - (x - m) / S / 2) + 0.1**0.5 * noise[6]
    torch.testing.assert_close(states[6], expected)
    tuned, _ = chain.rollout(predictor, nobody(6), noise)
    k = torch.tensor(0.9).double()
    for path in (states, tuned):
        gain = k * problem.v / problem.base(k)[1]
        torch.testing.assert_close(path[-1], problem.mu + gain * (path[-2] - k * problem.mu))

"""A Gaussian base: its law, its exact chain at any K, and log Z without a bias of discretisation."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toys import SumReward, one_update

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.identities import Estimate, log_partition
from lightning_tilt.interfaces import KnownLaw, Predictor
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt, the_mixture
from lightning_tilt.process import Cosine, Driftless, Process, RectifiedFlow, VariancePreserving
from lightning_tilt.rewards.quadratic import QuadraticReward
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import DDIM, Brownian, ExactGaussian, Transition

PURE = {
    "flow": RectifiedFlow(),
    "sd3": RectifiedFlow(shift=3.0),
    "cosine": Cosine(),
    "wide cosine": Cosine(noise_scale=2.0),
    "zero-snr": VariancePreserving.from_betas(zero_terminal_snr=True),
}
pure = pytest.mark.parametrize("process", PURE.values(), ids=PURE.keys())
DRIFTLESS = Driftless(0.2, 1.5)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def end_law(base: GaussianBase, transition: Transition, steps: int) -> tuple[float, float]:
    """Mean and variance of the end of the one-dimensional chain, by recursion."""
    chain = Chain(base.process, transition, base.process.grid(steps))
    mean, var = 0.0, float(base.process.initial(torch.ones(())))
    for k in range(steps):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        law = chain.kernel(base, chain.output(base, x, k, Condition({}, None, 2)), x, k)
        slope = float(law.mean[1] - law.mean[0])
        mean, var = slope * mean + float(law.mean[0]), slope**2 * var + float(law.std[0]) ** 2
    return mean, var


@pure
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (0.7, 0.4), (-3.0, 5.0)])
def test_the_exact_chain_ends_in_the_base(process: Process, steps: int, mean: float, scale: float) -> None:
    base = GaussianBase([1], scale, mean, process=process)
    found = end_law(base, ExactGaussian(base.precision), steps)
    assert found == pytest.approx((mean, scale**2), rel=1e-9)
    assert end_law(base, DDIM(), steps)[1] < 0.999 * scale**2  # what the exact step mends


def test_the_standard_base_of_a_variance_preserving_process_needs_no_pure_noise() -> None:
    base = GaussianBase([1], process=VariancePreserving.from_betas())
    for steps in (1, 5, 100):
        assert end_law(base, ExactGaussian(), steps) == pytest.approx((0, 1), rel=1e-9)


@pure
def test_exact_steps_are_noisy_to_the_end(process: Process) -> None:
    chain = Chain(process, ExactGaussian(4.0), process.grid(6))
    assert ExactGaussian().memoryless and chain.stds.isfinite().all()
    assert chain.noisy_steps == list(range(6))
    t = process.grid(6)[5]
    torch.testing.assert_close(chain.stds[5], process.posterior_variance(t, 4.0).sqrt())


@pure
def test_prediction_is_the_posterior_mean(process: Process) -> None:
    base = GaussianBase([3], scale=0.6, mean=-1.2, process=process)
    twin = GaussianMixturePredictor([1.0], [[-1.2] * 3], [(0.36 * torch.eye(3)).tolist()], process)
    t, x = process.grid(8)[:8], 2 * randn(8, 3)
    nobody = base.encode(None, 8)
    torch.testing.assert_close(base.predict(x, t, nobody), twin.predict(x, t, nobody))
    posterior = twin.mixture.x1_posterior(process, x, t)
    variance = posterior.covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, process.posterior_variance(t, base.precision)[:, None].expand(-1, 3))
    assert base.predict(x.bfloat16(), t, nobody).dtype == torch.bfloat16
    assert list(base.parameters()) == [] and base.state_dict() == {}
    with base.base() as view:
        assert view is base


def test_driftless_base_is_brownian_motion() -> None:
    base = GaussianBase([2], process=DRIFTLESS)
    t, x = DRIFTLESS.grid(4)[:4], randn(4, 2)
    torch.testing.assert_close(base.predict(x, t, base.encode(None, 4)), x)
    assert base.precision == pytest.approx(1 / DRIFTLESS.end_variance)
    GaussianBase([2], scale=math.sqrt(DRIFTLESS.end_variance), process=DRIFTLESS)
    for wrong in ({"scale": 1.0}, {"mean": 0.1}):
        with pytest.raises(ValueError, match="leave scale and mean out, or choose sigma_max"):
            GaussianBase([2], process=DRIFTLESS, **wrong)


def test_density_is_that_of_a_gaussian() -> None:
    base, x = GaussianBase([2, 3], scale=1.7, mean=0.4), randn(5, 2, 3).requires_grad_()
    naive = torch.distributions.Normal(torch.tensor(0.4).double(), torch.tensor(1.7).double()).log_prob(x).sum((1, 2))
    torch.testing.assert_close(base.log_prob(x), naive)
    (score,) = torch.autograd.grad(base.log_prob(x).sum(), x)
    torch.testing.assert_close(score, -(x - 0.4) / 1.7**2)
    assert base.log_prob(x.bfloat16()).dtype == torch.float32


def test_particles_live_without_their_mean() -> None:
    base = GaussianBase([4, 2], scale=1.3, mean_free=True)
    x = base.project(randn(3, 6, 4, 2))
    torch.testing.assert_close(x.mean(-2), torch.zeros(3, 6, 2, dtype=torch.float64))
    torch.testing.assert_close(base.project(x), x)
    # In an orthonormal basis of the subspace (3 x 2 numbers) the law is a plain Gaussian.
    basis = torch.linalg.svd(torch.eye(4).double() - 0.25)[0][:, :3]
    inner = torch.einsum("ni,bnd->bid", basis, x[0])
    naive = torch.distributions.Normal(torch.zeros(()).double(), 1.3).log_prob(inner).sum((1, 2))
    torch.testing.assert_close(base.log_prob(x[0]), naive)
    torch.testing.assert_close(base.log_prob(x[0] + 5), naive)  # wherever the particles are
    predicted = base.predict(x[0], torch.full((6,), 0.3), base.encode(None, 6))
    torch.testing.assert_close(predicted.mean(-2), torch.zeros(6, 2, dtype=torch.float64))


def test_impossible_bases_are_refused() -> None:
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: GaussianBase([2], scale=0.0), "scale must be positive"),
        (lambda: GaussianBase([]), "shape is that of one state"),
        (lambda: GaussianBase([4], mean_free=True), "at least two particles"),
        (lambda: GaussianBase([1, 3], mean_free=True), "at least two particles"),
        (lambda: GaussianBase([4, 2], mean=1.0, mean_free=True), "around mean 0"),
        (lambda: GaussianBase([2], scale=3.0, process=VariancePreserving.from_betas()), "starts at pure noise"),
        (lambda: ExactGaussian(0.0), "precision must be positive"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_mixture_is_a_known_law(dtype: torch.dtype) -> None:
    mixture, _ = the_mixture()
    predictor, x = GaussianMixturePredictor.of(mixture), torch.randn(4, 2).to(dtype).requires_grad_()
    assert isinstance(predictor, KnownLaw) and isinstance(GaussianBase([2]), KnownLaw)
    log_p = predictor.log_prob(x)
    assert log_p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(log_p.double(), mixture.log_prob(x.double()), rtol=1e-5, atol=1e-5)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(score.double(), mixture.score(x.double()), rtol=2e-2, atol=1e-4)


def log_z(base: Predictor, transition: Transition, steps: int, tuned: Predictor, reward: QuadraticReward) -> Estimate:
    """From the weighted paths of `tuned`."""
    n, process = 30_000, base.process
    nobody, chain = Condition({}, None, n), Chain(process, transition, process.grid(steps))
    noise = torch.randn(steps + 1, n, 2, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    with torch.no_grad():
        states, z = chain.rollout(tuned, nobody, noise)
        path = Trajectory(
            t=chain.t, states=states, noise=z, condition=nobody, index=torch.arange(n), sample=torch.arange(n),
            reward=reward.score(states[-1], None), lam=1.0, rollout=0, weight=torch.ones(n),
        )  # fmt: skip
        return log_partition(path.reward - chain.log_ratio(path, chain.mean(base, nobody)))


@pytest.mark.parametrize(
    ("base", "transition"),
    [
        (GaussianBase([2], 1.5, 0.3), ExactGaussian(1 / 1.5**2)),
        (GaussianBase([2], 0.8, process=Cosine()), ExactGaussian(1 / 0.8**2)),
        (GaussianBase([2], process=DRIFTLESS), Brownian()),
    ],
    ids=["flow", "cosine", "driftless"],
)
def test_log_z_has_no_bias_of_discretisation(base: GaussianBase, transition: Transition) -> None:
    """Five steps, the paths of a model that is only roughly tilted: E[w] = Z within 3 s.e. of the analytic one."""
    reward = QuadraticReward([[0.6, 0.2], [0.2, 0.5]], [-0.5, 1.0])
    law = GaussianMixturePredictor([1.0], [[base.mean] * 2], [(base.scale**2 * torch.eye(2)).tolist()])
    exact = float(law.mixture.tilt(reward, 1.0)[1])
    tuned = NeuralTilt(base, hidden=8, layers=1)
    with torch.no_grad():
        tuned.last.bias.copy_(torch.tensor([-0.1, 0.3]))
        tuned.last.weight.normal_(0, 0.1)
    found = log_z(base, transition, 5, tuned, reward)
    assert abs(found.mean - exact) < 3 * found.se and found.se < 0.01


def test_the_ancestral_step_has_one() -> None:
    base, reward = GaussianBase([2], 1.5, 0.3), QuadraticReward([[0.6, 0.2], [0.2, 0.5]], [-0.5, 1.0])
    law = GaussianMixturePredictor([1.0], [[0.3] * 2], [(2.25 * torch.eye(2)).tolist()])
    found = log_z(base, DDIM(), 5, base, reward)
    assert found.mean - float(law.mixture.tilt(reward, 1.0)[1]) > 10 * found.se


@pytest.mark.parametrize("base", [GaussianBase([2], 40.0), GaussianBase([2], process=DRIFTLESS)])
def test_a_tilt_of_it_moves_by_the_posterior_variance(base: GaussianBase) -> None:
    """A change of units changes nothing, and at t = 0 a tilt still has something to say."""
    tilt = NeuralTilt(base, hidden=8, layers=1, input_scale=5.0)
    torch.nn.init.normal_(tilt.last.weight)
    t, x = torch.linspace(0, 0.9, 6, dtype=torch.float64), 5 * randn(6, 2)
    moved = tilt.predict(x, t, tilt.encode(None, 6)) - base.predict(x, t, base.encode(None, 6))
    variance = base.process.posterior_variance(t, base.precision)[:, None]
    torch.testing.assert_close(moved, variance / 5 * tilt.f(x / 5, t).double(), rtol=1e-5, atol=1e-6)
    assert moved[0].abs().min() > 0
    with pytest.raises(ValueError, match="input_scale must be positive"):
        NeuralTilt(base, input_scale=0.0)


@pytest.mark.parametrize(
    ("process", "transition"), [(RectifiedFlow(), ExactGaussian()), (DRIFTLESS, Brownian())], ids=["flow", "driftless"]
)
def test_particles_are_rolled_out_and_tuned_without_their_mean(process: Process, transition: Transition) -> None:
    """Through the sampler and Adjoint Matching, by a network that knows nothing of particles."""
    tilt = NeuralTilt(GaussianBase([3, 2], mean_free=True, process=process), hidden=8, layers=1)
    torch.nn.init.normal_(tilt.last.weight)
    _, path, gradients = one_update(tilt, SumReward(), torch.zeros(50), 4, sampler={"transition": transition})
    for part in (path.states, path.noise):
        torch.testing.assert_close(part.mean(-2), torch.zeros(len(part), 50, 2).to(part), atol=1e-6, rtol=0)
    assert path.states[-1].std() > 0.3
    assert path.supervised.tolist() == [0, 1, 2, 3] and path.log_w.isfinite().all()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())

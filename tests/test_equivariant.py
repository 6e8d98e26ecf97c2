"""The equivariant network: rotations, reflections, permutations pass through it; pushes are bounded and mean-free."""

import pytest
import torch
from torch import Tensor

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.models import EquivariantTilt, GaussianBase, GaussianMixturePredictor
from lightning_tilt.process import Cosine, Driftless, RectifiedFlow
from lightning_tilt.transition import Brownian

SHAPES = pytest.mark.parametrize("shape", [(4, 2), (13, 3), (2, 1)])
DRIFTLESS = Driftless(0.1, 2.0)


def network(shape: tuple[int, int], **kwargs: object) -> EquivariantTilt:
    """With a last layer that is not 0."""
    tilt = EquivariantTilt(GaussianBase(shape, mean_free=True), hidden=16, layers=3, **kwargs)  # type: ignore[arg-type]
    torch.nn.init.normal_(tilt.last.weight)
    return tilt


def rotation(d: int, reflected: bool) -> Tensor:
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    wanted = -1.0 if reflected else 1.0
    return q * torch.where(torch.arange(d) == 0, wanted * torch.linalg.det(q).sign(), 1.0)


@SHAPES
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("reflected", [False, True])
def test_equivariance(shape: tuple[int, int], dtype: torch.dtype, atol: float, reflected: bool) -> None:
    tilt = network(shape).to(dtype)
    n, d = shape
    x, t = torch.randn(6, n, d, dtype=dtype), torch.rand(6, dtype=torch.float64)
    x = tilt.project(x)
    q, order = rotation(d, reflected).to(dtype), torch.randperm(n)
    assert float(torch.linalg.det(q)) == pytest.approx(-1.0 if reflected else 1.0, abs=1e-5)
    nobody = tilt.encode(None, 6)
    for function in (tilt.f, lambda x, t: tilt.predict(x, t, nobody)):
        once = function(x, t)
        torch.testing.assert_close(function((x @ q.mT)[:, order], t), (once @ q.mT)[:, order], atol=atol, rtol=0)
        torch.testing.assert_close(once.mean(1), torch.zeros(6, d, dtype=dtype), atol=atol, rtol=0)
    moved = tilt.f(x + torch.randn(6, 1, d, dtype=dtype), t)
    torch.testing.assert_close(moved, tilt.f(x, t), atol=atol, rtol=0)
    assert tilt.f(x, t).abs().mean() > 0.05


def test_it_depends_on_time_and_on_more_than_its_own_pair() -> None:
    tilt, x = network((4, 2)).double(), torch.randn(1, 4, 2, dtype=torch.float64)
    t = torch.full((1,), 0.5, dtype=torch.float64)
    assert (tilt.f(x, t) - tilt.f(x, t + 0.2)).abs().max() > 1e-3
    # Particle 3 changes what 1 does to 0: a mixed derivative that is 0 for every sum over pairs.
    hessian = torch.autograd.functional.hessian(lambda y: tilt.f(y[None], t)[0, 0, 0], x[0])
    assert hessian[1, :, 3, :].abs().max() > 1e-5


@pytest.mark.parametrize("process", [RectifiedFlow(), Cosine(), DRIFTLESS], ids=["flow", "cosine", "driftless"])
def test_it_begins_at_its_base(process: Driftless) -> None:
    base = GaussianBase([4, 2], mean_free=True, process=process)
    tilt = EquivariantTilt(base, hidden=8, layers=2)
    t, x = process.grid(5)[:5], base.project(torch.randn(5, 4, 2))
    nobody = tilt.encode(None, 5)
    assert torch.equal(tilt.predict(x, t, nobody), base.predict(x, t, nobody))
    torch.nn.init.normal_(tilt.last.weight)
    gap = tilt.predict(x, t, nobody) - base.predict(x, t, nobody)
    gain = process.posterior_variance(t, base.precision)[:, None, None]
    torch.testing.assert_close(gap, (gain * tilt.f(x, t)).float(), rtol=1e-4, atol=1e-5)
    gap.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tilt.parameters())
    assert "signed" not in tilt.state_dict() and set(tilt.state_dict()) == set(tilt.trained_parameters())
    with tilt.base() as view:
        assert view is base
    assert torch.equal(tilt.decode(x), x)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e4])
def test_pushes_are_bounded_and_gradients_finite(size: float) -> None:
    """Also where all particles coincide, as at the start of Driftless, and far out."""
    tilt = network((5, 3), bound=2.0)
    torch.nn.init.normal_(tilt.last.weight, std=100)
    x = (size * torch.randn(7, 5, 3)).requires_grad_()
    f = tilt.f(x, torch.rand(7))
    assert f.norm(dim=-1).max() <= 4 * 2.0 + 1e-4
    f.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tilt.parameters())


def test_units_of_length() -> None:
    tilt, scaled = network((4, 2)), network((4, 2), input_scale=3.0)
    scaled.load_state_dict(tilt.state_dict())
    x, t = tilt.project(torch.randn(3, 4, 2)), torch.full((3,), 0.5)
    base = tilt.encode(None, 3)
    with tilt.base() as b:
        still = b.predict(x, t, base)
    gain = tilt.process.posterior_variance(t, 1.0)[:, None, None]
    torch.testing.assert_close(scaled.predict(x, t, base) - still, gain / 3 * tilt.f(x / 3, t), rtol=1e-5, atol=1e-5)


def test_a_driftless_chain_of_particles_stays_without_mean() -> None:
    base = GaussianBase([4, 2], mean_free=True, process=DRIFTLESS)
    tilt = EquivariantTilt(base, hidden=8, layers=2).double()
    torch.nn.init.normal_(tilt.last.weight)
    chain = Chain(DRIFTLESS, Brownian(), DRIFTLESS.grid(6))
    with torch.no_grad():
        noise = tilt.project(torch.randn(7, 20, 4, 2, dtype=torch.float64))
        states, _ = chain.rollout(tilt, Condition({}, None, 20), noise)
    assert torch.equal(states[0], torch.zeros(20, 4, 2, dtype=torch.float64))
    torch.testing.assert_close(states.mean(-2), torch.zeros(7, 20, 2, dtype=torch.float64))
    assert states[-1].std() > 0.5


def test_states_that_are_no_particles_are_refused() -> None:
    flat = GaussianMixturePredictor([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    with pytest.raises(ValueError, match=r"states of shape \(n, d\), n >= 2, not \(2,\)"):
        EquivariantTilt(flat)
    for wrong in ({"layers": 0}, {"bound": 0.0}):
        with pytest.raises(ValueError, match="layers must be at least 1 and bound positive"):
            EquivariantTilt(GaussianBase([4, 2]), **wrong)  # type: ignore[arg-type]

"""The convolutional network on a lattice: shifts pass through it, sites are their own, and it starts at its base."""

import pytest
import torch
from torch import Tensor

from lightning_tilt.models import GaussianBase, LatticeTilt
from lightning_tilt.rewards.energies import ManyWell32, Phi4

SHAPES = pytest.mark.parametrize("shape", [(7,), (4, 6)])


def network(shape: tuple[int, ...], **settings: object) -> LatticeTilt:
    """With a last layer that is not 0."""
    torch.manual_seed(0)
    tilt = LatticeTilt(GaussianBase(shape), hidden=8, **settings).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(tilt.last.weight)
    return tilt


def shifted(x: Tensor) -> Tensor:
    return x.roll(tuple(range(1, x.ndim)), tuple(range(1, x.ndim)))


@SHAPES
def test_shifts_pass_through_unless_sites_have_features(shape: tuple[int, ...]) -> None:
    x, t = torch.randn(3, *shape, dtype=torch.float64), torch.rand(3)
    free, told = network(shape), network(shape, site_features=2)
    torch.testing.assert_close(free.f(shifted(x), t), shifted(free.f(x, t)))
    assert (told.f(shifted(x), t) - shifted(told.f(x, t))).abs().max() > 1e-3
    assert (free.f(x, t) - free.f(x, t + 0.2)).abs().max() > 1e-3


@SHAPES
@pytest.mark.parametrize(("kernel", "layers", "reach"), [(1, 3, 0), (3, 0, 1), (3, 1, 2)])
def test_how_far_a_site_sees(shape: tuple[int, ...], kernel: int, layers: int, reach: int) -> None:
    tilt, t = network(shape, kernel=kernel, layers=layers, site_features=1), torch.rand(1)
    x = torch.randn(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda y: tilt.f(y, t)[0][(0,) * len(shape)], x)[0]
    for site in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist():
        apart = max(min(s, n - s) for s, n in zip(site, shape, strict=True))
        assert (jacobian[tuple(site)].abs() > 1e-12) == (apart <= reach), site


@pytest.mark.parametrize(("shape", "density"), [((32,), ManyWell32), ((8, 8), Phi4)])
def test_it_begins_at_its_base_and_all_of_it_learns(shape: tuple[int, ...], density: type) -> None:
    base = GaussianBase(shape)
    tilt = LatticeTilt(base, hidden=8, layers=2, site_features=2, guide=density())
    x, t, nobody = torch.randn(2, *shape), torch.rand(2), tilt.encode(None, 2)
    assert torch.equal(tilt.predict(x, t, nobody), base.predict(x, t, nobody))
    torch.nn.init.normal_(tilt.last.weight)
    assert tilt.guide is not None
    torch.nn.init.normal_(tilt.guide.last.weight)
    tilt.predict(x, t, nobody).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tilt.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"states \(L,\) or \(L, M\), not \(2, 2, 2\)"):
        LatticeTilt(GaussianBase([2, 2, 2]))
    for kernel in (0, 2, 5):
        with pytest.raises(ValueError, match="kernel is odd and at most the lattice's 4 sites wide"):
            LatticeTilt(GaussianBase([4, 6]), kernel=kernel)

"""Every benchmark density has the numbers that its papers say, and every gradient, symmetry and normaliser holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from reward_tester import CHECKS, RewardCase
from scipy.integrate import quad
from torch import Tensor

from lightning_tilt.interfaces import KnownLaw
from lightning_tilt.models.gaussian_base import GaussianBase
from lightning_tilt.rewards import energies
from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.energies import (
    GMM40,
    DoubleWell4,
    FunctionDensity,
    Funnel,
    LennardJones13,
    LennardJones55,
    ManyWell32,
    Phi4,
)
from lightning_tilt.rewards.energies.many_well import double_well
from lightning_tilt.rewards.energies.phi4 import phi4_action


def half_square(x: Tensor) -> Tensor:
    """A Gaussian as a function of a user's."""
    return x.flatten(1).square().sum(1) / 2


class Law(KnownLaw):
    """A law that is not normalised; a density does not care."""

    def log_prob(self, x: Tensor) -> Tensor:
        return -x.flatten(1).square().sum(1) / 18


@dataclass(frozen=True)
class Case(RewardCase):
    """A density bound to a base, and states that are about as far apart as its own."""

    spread: float = 2.0

    def images(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return (self.spread * (super().images() - 0.5)).to(dtype)


MAKERS: dict[str, tuple[Callable[[], Density], tuple[int, ...], float]] = {
    "GMM40": (GMM40, (2,), 20.0),
    "ManyWell32": (ManyWell32, (32,), 3.0),
    "Funnel": (Funnel, (10,), 3.0),
    "DoubleWell4": (DoubleWell4, (4, 2), 8.0),
    "LennardJones13": (LennardJones13, (13, 3), 6.0),
    "LennardJones55": (LennardJones55, (55, 3), 12.0),
    "Phi4": (Phi4, (8, 8), 2.0),
    "FunctionDensity": (lambda: FunctionDensity(half_square), (3,), 2.0),
}
PARTICLES = ["DoubleWell4", "LennardJones13", "LennardJones55"]


def bound(make: Callable[[], Density]) -> Density:
    density = make()
    density._base = [Law()]
    return density


def test_every_density_is_a_case() -> None:
    assert set(MAKERS) == set(energies.__all__)


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_traits(name: str, check: Callable[[RewardCase], None]) -> None:
    make, shape, spread = MAKERS[name]
    check(Case(lambda: bound(make), shape, ["a"] * 5, spread))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_what_a_density_says_of_itself(name: str) -> None:
    make, shape, _ = MAKERS[name]
    density = make()
    if name != "FunctionDensity":
        assert density.state_shape == shape
    assert density.particles == (shape if name in PARTICLES else None)
    assert density.energy(torch.zeros(0, *shape)).shape == (0,)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_second_derivatives_are_those_of_the_gradient(name: str) -> None:
    make, shape, spread = MAKERS[name]
    x = Case(make, shape, ["a"] * 2, spread).images().requires_grad_()
    v = torch.randn(x.shape, dtype=torch.float64)

    def gradient(y: Tensor) -> Tensor:
        return torch.autograd.grad(make().double().energy(y).sum(), y, create_graph=True)[0]

    (ours,) = torch.autograd.grad((gradient(x) * v).sum(), x)
    h = 1e-5
    ahead, behind = (gradient((x + s * h * v).detach().requires_grad_()) for s in (1, -1))
    torch.testing.assert_close(
        ours, (ahead - behind).detach() / (2 * h), rtol=1e-5, atol=1e-5 * float(ours.abs().max())
    )


def test_gmm40_is_the_mixture_that_the_global_generator_gives() -> None:
    torch.manual_seed(0)
    means = ((torch.rand((40, 2)) - 0.5) * 80).double()
    state = torch.get_rng_state()
    density = GMM40()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(density.means, means)
    assert density.std == pytest.approx(1.3132617, abs=5e-8)
    x = torch.tensor([[3.0, -7.0], [0.0, 0.0], means[5].tolist()], dtype=torch.float64)
    for row, energy in zip(x.tolist(), density.energy(x), strict=True):
        p = 0.0
        for m in means.tolist():
            square = (row[0] - m[0]) ** 2 + (row[1] - m[1]) ** 2
            p += math.exp(-square / (2 * 1.3132616875**2)) / (2 * math.pi * 1.3132616875**2) / 40
        assert float(energy) == pytest.approx(-math.log(p), rel=1e-8)


def test_gmm40_has_integral_one_on_a_grid() -> None:
    axis = torch.arange(-50, 50, 0.25, dtype=torch.float64)  # the trapezoidal rule is exact to rounding here
    z = sum(torch.exp(-GMM40().energy(torch.cartesian_prod(axis[i : i + 1], axis))).sum() for i in range(len(axis)))
    assert math.log(float(z) * 0.25**2) == pytest.approx(0.0, abs=1e-9)
    assert GMM40.log_z == 0.0


def test_gmm40_counts_modes() -> None:
    density = GMM40()
    assert density.modes_found(density.means) == 40
    assert density.modes_found(density.means[:7].repeat(3, 1)) == 7
    assert density.figures(density.means[:7]) == {"modes_found": 7}
    assert density.modes_found(density.means[:7] + torch.tensor([0.0, 3.01 * density.std])) < 7
    assert density.modes_found(torch.full((5, 2), 100.0)) == 0


def test_many_well_constants() -> None:
    def f(y: float) -> float:
        return math.exp(-(y**4) + 6 * y**2 + 0.5 * y)

    def integral(g: Callable[[float], float], a: float = -5, b: float = 5) -> float:
        return sum(float(quad(g, *ends, epsrel=1e-12, epsabs=1e-8)[0]) for ends in ((a, (a + b) / 2), ((a + b) / 2, b)))

    z = integral(f)
    assert z == pytest.approx(11784.50927, abs=1e-5)
    assert integral(f, 0, 5) / z == pytest.approx(0.844307, abs=1e-6)
    assert integral(lambda y: y * f(y)) / z == pytest.approx(1.187961, abs=1e-6)
    assert integral(lambda y: y * y * f(y)) / z == pytest.approx(2.959806, abs=1e-6)
    assert ManyWell32.log_z == pytest.approx(16 * math.log(z * math.sqrt(2 * math.pi)), abs=1e-9)
    assert ManyWell32.log_z == pytest.approx(164.695675, abs=1e-6)
    assert math.exp(-double_well(torch.tensor(1.3, dtype=torch.float64))) == pytest.approx(f(1.3))


def test_many_well_is_the_sum_of_its_wells() -> None:
    x = torch.randn(2, 32, dtype=torch.float64)
    naive = [sum(a**4 - 6 * a**2 - a / 2 + b**2 / 2 for a, b in zip(r[::2], r[1::2], strict=True)) for r in x.tolist()]
    torch.testing.assert_close(ManyWell32().energy(x), torch.tensor(naive, dtype=torch.float64))


def test_funnel_is_its_two_gaussians() -> None:
    x = torch.randn(4, 10, dtype=torch.float64) * 2
    normal = torch.distributions.Normal
    log_p = normal(0.0, 3.0).log_prob(x[:, 0])
    log_p = log_p + normal(0.0, (x[:, :1] / 2).exp()).log_prob(x[:, 1:]).sum(1)  # the variance is exp(x_0)
    torch.testing.assert_close(Funnel().energy(x), -log_p)
    assert Funnel.log_z == 0.0
    deep = torch.zeros(1, 10)
    deep[0, 0] = -100.0
    assert Funnel().energy(deep).isfinite().all()


def test_phi4_is_the_action_of_its_paper() -> None:
    """`phi_s (4 phi_s - neighbours) + m^2 phi_s^2 + g phi_s^4`, by loops over the sites."""
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    naive = []
    for phi in x.tolist():
        s = 0.0
        for i, j in product(range(5), repeat=2):
            around = phi[(i + 1) % 5][j] + phi[i - 1][j] + phi[i][(j + 1) % 5] + phi[i][j - 1]
            s += phi[i][j] * (4 * phi[i][j] - around) - 1.5 * phi[i][j] ** 2 + 0.7 * phi[i][j] ** 4
        naive.append(s)
    torch.testing.assert_close(phi4_action(x, -1.5, 0.7), torch.tensor(naive, dtype=torch.float64))


def test_phi4_without_coupling_is_a_gaussian_of_known_normaliser() -> None:
    density = Phi4(side=3, mass_squared=0.5, coupling=0.0)
    kernel = torch.autograd.functional.hessian(
        lambda v: density.energy(v.view(1, 3, 3)).sum(), torch.zeros(9, dtype=torch.float64)
    )
    exact = 9 / 2 * math.log(2 * math.pi) - float(torch.logdet(kernel)) / 2
    assert density.log_z == pytest.approx(exact, rel=1e-10)
    assert Phi4().log_z is None
    for wrong in ({"coupling": -1.0}, {"coupling": 0.0, "mass_squared": -1.0}, {"side": 0}):
        with pytest.raises(ValueError, match=r"no finite integral|side must be positive"):
            Phi4(**wrong)


@pytest.mark.parametrize(
    ("density", "scale"), [(GMM40(), 30.0), (Phi4(side=2, mass_squared=0.5, coupling=0.0), 1.0)], ids=["GMM40", "Phi4"]
)
def test_the_mean_of_exp_r_under_the_base_is_z(density: Density, scale: float) -> None:
    base = GaussianBase(density.state_shape, scale=scale)
    density.bind(base)
    x = scale * torch.randn(100_000, *density.state_shape, dtype=torch.float64)
    w = torch.exp(density.score(x, None) - density.log_z)
    assert float(w.mean()) == pytest.approx(1.0, abs=4 * float(w.std()) / len(w) ** 0.5)
    assert float(w.std()) / len(w) ** 0.5 < 0.02


def test_score_is_minus_energy_minus_the_log_density_of_the_base() -> None:
    x = torch.randn(3, 10, dtype=torch.float64)
    density = bound(Funnel)
    torch.testing.assert_close(density.score(x, None), -density.energy(x) + (x**2).sum(1) / 18)
    with pytest.raises(RuntimeError, match="Funnel does not know its base yet"):
        Funnel().score(x, None)

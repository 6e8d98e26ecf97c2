"""Reference samples have the moments of their density, chains leave a density invariant, diagnostics see stuck ones."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.energies import (
    GMM40,
    DoubleWell4,
    Funnel,
    LennardJones13,
    LennardJones55,
    ManyWell32,
    Phi4,
)
from lightning_tilt.rewards.energies.gmm40 import mode_counts
from lightning_tilt.rewards.energies.make_references import RECIPES, main, make
from lightning_tilt.rewards.energies.mala import (
    integrated_autocorrelation,
    mala,
    relaxed,
    split_r_hat,
    tuned_step_size,
)
from lightning_tilt.rewards.energies.particles import ParticleDensity, remove_mean

PARTICLES = [DoubleWell4, LennardJones13, LennardJones55]


def close(values: Tensor, exact: Tensor | float, se: float = 4.0) -> None:
    """The mean over the first axis is `exact` within `se` standard errors, component by component."""
    values = values.double()
    error = (values.mean(0) - exact).abs() / (values.std(0) / len(values) ** 0.5)
    assert float(error.max()) < se, error


def virial(density: Density, x: Tensor) -> Tensor:
    """`x . grad E(x)`, whose mean under exp(-E) is the dimension, by partial integration."""
    x = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(density.energy(x).sum(), x)
    return (x * gradient).detach().flatten(1).sum(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_square(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1) / 2


@pytest.mark.parametrize("kind", [GMM40, ManyWell32, Funnel, *PARTICLES])
def test_a_seed_is_a_sample(kind: type[Density]) -> None:
    density = kind()
    state = torch.get_rng_state()
    x = density.reference(7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert x is not None
    assert x.shape == (7, *density.state_shape)
    assert x.dtype == torch.float32
    assert torch.equal(x, density.reference(7, seed=3))
    assert not torch.equal(x, density.reference(7, seed=4))


def test_gmm40_reference() -> None:
    density = GMM40()
    x = density.reference(20_000)
    close(x, density.means.mean(0))
    close(x.square(), density.means.square().mean(0) + 1.3132617**2)
    counts = mode_counts(x, density.means, density.std)
    held = 1 - math.exp(-4.5)  # of a Gaussian, by its disc of radius 3; neighbours share a few samples
    assert float(counts.sum()) / len(x) == pytest.approx(held, abs=0.01)
    close(torch.repeat_interleave(torch.arange(40), counts)[:, None] == torch.arange(40), counts / counts.sum())
    assert (counts - 500).abs().max() < 4.5 * 500**0.5


def test_many_well_reference() -> None:
    x = ManyWell32().reference(5000).double()
    wells, rest = x[:, 0::2], x[:, 1::2]
    close((wells > 0).flatten(), 0.844307)
    close(wells.flatten(), 1.187961)
    close(wells.flatten().square(), 2.959806)
    close(rest.flatten().square(), 1.0)
    close(virial(ManyWell32(), x), 32.0)
    correlation = torch.corrcoef(x.T) - torch.eye(32)
    assert correlation.abs().max() < 5 / 5000**0.5


def test_funnel_reference() -> None:
    x = Funnel().reference(5000).double()
    z = x[:, 1:] * torch.exp(-x[:, :1] / 2)
    close(x[:, 0], 0.0)
    close(x[:, 0].square(), 9.0)
    close(z, 0.0)
    close(z.square(), 1.0)
    close(virial(Funnel(), x), 10.0)
    wide = x[:, 0] > 3
    assert x[wide, 1:].std() > 10 * x[x[:, 0] < -3, 1:].std()  # the mouth is at x_0 > 0


@pytest.mark.parametrize("kind", PARTICLES)
def test_particle_references(kind: type[ParticleDensity]) -> None:
    density = kind()
    n, d = density.particles
    kept = len(load_file(Path(density_folder()) / kind.reference_file)["x"])
    x = density.reference(kept)
    close(virial(density, x), (n - 1.0) * d)
    assert x.mean(1).abs().max() < 1e-5
    close(x.flatten(1), 0.0, 5.0)  # turned at random
    energy = density.energy(x).sort().values
    assert len(energy.unique()) > 0.95 * kept
    torch.testing.assert_close(energy, density.energy(density.reference(kept, seed=1)).sort().values, rtol=0, atol=0.05)
    more = density.reference(kept + 3)
    assert len(more) == kept + 3
    assert density.reference(0).shape == (0, n, d)


def density_folder() -> Path:
    from lightning_tilt.rewards.energies import particles

    return Path(particles.__file__).parent


def test_double_well_energies_are_the_known_ones() -> None:
    """Mean -22.51 and standard deviation 1.92, by another's 4,000 chains."""
    energy = DoubleWell4().energy(DoubleWell4().reference(4000)).double()
    assert float(energy.mean()) == pytest.approx(-22.51, abs=4 * 1.92 * (2 / 4000) ** 0.5)
    assert float(energy.std()) == pytest.approx(1.92, abs=4 * 1.92 / 4000**0.5)


def test_files_are_small() -> None:
    assert all((density_folder() / kind.reference_file).stat().st_size < 200_000 for kind in PARTICLES)


def test_phi4_reference_by_quadrature() -> None:
    """On two by two sites every neighbour is met twice: four integrals on a grid."""
    axis = torch.linspace(-2, 2, 27, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis, axis).view(-1, 2, 2)
    density = Phi4(side=2, mass_squared=-1.0, coupling=1.0)
    w = torch.softmax(-density.energy(grid), 0)
    square, across = (float(w @ f) for f in (grid.square().mean((1, 2)), grid[:, 0, 0] * grid[:, 0, 1]))
    x = density.reference(1000)
    assert x is not None
    close(x.square().mean((1, 2)), square)
    close(x[:, 0, 0] * x[:, 0, 1], across)
    close(x.mean((1, 2)), 0.0)
    close(virial(density, x), 4.0)


def test_phi4_reference_is_none_where_chains_do_not_mix() -> None:
    assert Phi4(side=4, mass_squared=-4.0, coupling=0.2).reference(10) is None


@pytest.mark.parametrize("step_size", [0.1, 0.6])
def test_a_gaussian_is_invariant(step_size: float) -> None:
    """Long steps, of which many are rejected; the chains start from the Gaussian and must stay."""
    x0 = torch.randn(4000, 5, generator=generator(1), dtype=torch.float64) * torch.tensor([0.6, 0.8, 1.0, 1.0, 1.5])
    precision = torch.tensor([0.6, 0.8, 1.0, 1.0, 1.5], dtype=torch.float64) ** -2
    run = mala(lambda x: (precision * x.square()).sum(1) / 2, x0, 40, step_size, generator(2))
    assert (run.acceptance > 0.85) == (step_size < 0.5)
    assert run.energies.shape == (40, 4000)
    torch.testing.assert_close(run.energies[-1], (precision * run.x.square()).sum(1) / 2)
    close(run.x, 0.0)
    close(run.x.square(), 1 / precision)
    close(run.x.square().square(), 3 / precision**2)
    assert torch.corrcoef(torch.cat([x0, run.x], 1).T)[:5, 5:].abs().max() < (0.5 if step_size < 0.5 else 0.1)


def test_a_gaussian_on_the_mean_free_subspace() -> None:
    x0 = torch.zeros(4000, 4, 2, dtype=torch.float64)
    run = mala(half_square, x0, 60, 0.3, generator(), remove_mean)
    assert run.x.mean(1).abs().max() < 1e-12
    close(half_square(run.x), 3.0)  # half of the dimension (4 - 1) 2
    close(run.x[:, 0, 0].square(), 0.75)


def test_a_wall_is_never_crossed() -> None:
    """A Gaussian's half, whose energy is infinite elsewhere."""

    def energy(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, half_square(x), math.inf)

    run = mala(energy, torch.ones(4000, 1, dtype=torch.float64), 60, 0.3, generator())
    assert (run.x > 0).all()
    close(run.x, (2 / math.pi) ** 0.5)
    with pytest.raises(ValueError, match="1 of 2 chains start where the energy is not finite"):
        mala(energy, torch.tensor([[1.0], [-1.0]]), 1, 0.3, generator())


def test_r_hat_and_autocorrelation_of_known_series() -> None:
    """`s_k = rho s_{k-1} + noise` has tau = (1 + rho)/(1 - rho)."""
    noise = torch.randn(2000, 50, generator=generator(), dtype=torch.float64)
    series = [noise[0]]
    for row in noise[1:]:
        series.append(0.8 * series[-1] + 0.6 * row)
    s = torch.stack(series)
    assert integrated_autocorrelation(s) == pytest.approx(9.0, rel=0.1)
    assert integrated_autocorrelation(noise) == pytest.approx(1.0, rel=0.05)
    assert split_r_hat(noise) == pytest.approx(1.0, abs=0.002)
    assert split_r_hat(s) == pytest.approx((1 + 2 * 9 / 2000) ** 0.5, abs=0.003)
    assert split_r_hat(noise + 0.01 * torch.arange(2000)[:, None]) > 1.5  # a drift that all chains share
    with pytest.raises(ValueError, match="at least 4 steps"):
        split_r_hat(noise[:3])


def test_diagnostics_see_chains_that_stay_in_their_wells() -> None:
    def energy(x: Tensor) -> Tensor:
        return 4 * (x[:, 0].square() - 4).square() + 3 * x[:, 0]

    x0 = torch.tensor([-2.0, 2.0], dtype=torch.float64).repeat(50)[:, None]
    run = mala(energy, x0, 400, 0.005, generator())
    assert split_r_hat(run.energies[200:]) > 2
    assert integrated_autocorrelation(run.energies[200:]) > 100
    one = mala(energy, x0[:1].expand(100, 1), 400, 0.005, generator())
    assert split_r_hat(one.energies[200:]) < 1.1
    assert integrated_autocorrelation(one.energies[200:]) < 20


def test_relaxed_and_tuned() -> None:
    x0 = 20 * torch.randn(200, 5, generator=generator())
    x = relaxed(half_square, x0, 5, 0.5, 1.0)
    assert ((x - x0).norm(dim=1) <= 5.001).all()
    assert relaxed(half_square, x0, 200, 0.5, 1.0).abs().max() < 1e-3
    x, h = tuned_step_size(half_square, x / 10, 1e-3, generator())
    assert mala(half_square, x, 100, h, generator()).acceptance == pytest.approx(0.6, abs=0.05)


def test_the_files_can_be_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(RECIPES["dw4"], chains=20, steps=40)
    folders = [tmp_path / "one", tmp_path / "two"]
    made = []
    for folder in folders:
        folder.mkdir()
        line = make(recipe, folder)
        made.append(load_file(folder / DoubleWell4.reference_file)["x"])
        assert line.startswith("DoubleWell4: 20 chains of 40 steps, h ")
    assert made[0].shape == (20, 4, 2)
    assert torch.equal(*made)
    with pytest.raises(SystemExit):
        main(["dw5"])
    assert "there is no density 'dw5'; there are dw4, lj13, lj55" in capsys.readouterr().err

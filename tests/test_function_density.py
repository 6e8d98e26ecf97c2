"""An energy of the user's own: by name, by hand, and what happens to names that mean nothing."""

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.energies import FunctionDensity

MODULE = """
import torch


def ring(x):
    return 10 * (x.norm(dim=1) - 3) ** 2


def elementwise(x):
    return x**2


radius = 3.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in a folder on the path, as the working directory is for the command line."""
    name = f"own_energies_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_name_in_a_yaml_becomes_the_function(module: str, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Density, "reward")
    config = tmp_path / "config.yaml"
    config.write_text(f"class_path: FunctionDensity\ninit_args:\n  function: {module}.ring\n  log_z: 2.3576\n")
    density = parser.instantiate(parser.parse_args([f"--reward={config}"])).reward
    assert isinstance(density, FunctionDensity)
    assert density.log_z == 2.3576
    assert density.particles is None
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(density.energy(x), torch.tensor([0.0, 10.0]))


def test_the_log_z_of_the_example_is_right() -> None:
    """`2 pi int r exp(-10 (r - 3)^2) dr`."""
    r = torch.linspace(0, 10, 100_001, dtype=torch.float64)
    z = 2 * torch.pi * torch.trapezoid(r * torch.exp(-10 * (r - 3) ** 2), r)
    assert f"log_z: {z.log():.4f}" in (FunctionDensity.__doc__ or "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ring", "'ring' is no dotted name: give module.function"),
        ("{}.", "'{}.' is no dotted name"),
        ("{}/ring", "'{}/ring' is no dotted name"),
        ("nowhere_at_all.ring", "there is no module 'nowhere_at_all'; it is looked for in the working directory"),
        ("{}.inner.ring", "there is no module '{}.inner'"),
        ("{}.rings", "the module {} has no 'rings'; did you mean ring?"),
    ],
)
def test_a_bad_name_is_one_line(name: str, message: str, module: str) -> None:
    with pytest.raises(ValueError) as caught:
        FunctionDensity(name.format(module))
    assert str(caught.value).startswith("FunctionDensity: ")
    assert message.format(module) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_inside_the_module_is_not_hidden(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        FunctionDensity(f"{module}_broken.ring")


def test_what_cannot_be_called_and_what_returns_no_number_a_state(module: str) -> None:
    with pytest.raises(TypeError, match=f"'{module}.radius' is a float, which cannot be called"):
        FunctionDensity(f"{module}.radius")
    with pytest.raises(ValueError, match=r"must have the shape \(4,\), one number a state, not \(4, 2\)"):
        FunctionDensity(f"{module}.elementwise").energy(torch.ones(4, 2))


def test_a_network_is_frozen() -> None:
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    density = FunctionDensity(network)
    assert list(density.parameters()) == []
    assert not density.state_dict()
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.autograd.grad(density.energy(x).sum(), x)[0].abs().sum() > 0

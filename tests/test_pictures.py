"""Pictures of a run: what they show is what was drawn, and it can be read without colour."""

import math

import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lightning_tilt.callbacks.pictures import reward_histograms


def test_reward_histograms_show_the_densities_and_are_told_apart_in_grey() -> None:
    """Two bins, half the base in each, and lam = log 3: the exact tilt has a quarter and three quarters."""
    axis = Figure().subplots()
    base, tuned = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    reward_histograms(axis, [base, base], [tuned], math.log(3), torch.tensor([-0.5, 0.5, 1.5]))
    handles, labels = axis.get_legend_handles_labels()
    assert labels == ["base", "tuned", "exact tilt (base, reweighted)"]
    for shape, (low, high) in zip(axis.patches, ((0.5, 0.5), (0.2, 0.8), (0.25, 0.75)), strict=True):
        assert torch.allclose(
            torch.tensor(shape.get_path().vertices[1:5, 1]).float(), torch.tensor([low, low, high, high])
        )
    filled, hatched, outlined = handles
    assert filled.get_fill() and to_rgba(filled.get_facecolor())[3] > 0 and not filled.get_hatch()
    assert hatched.get_hatch() and to_rgba(hatched.get_facecolor())[3] == 0
    assert not outlined.get_fill() and not outlined.get_hatch()

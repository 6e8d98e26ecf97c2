"""How large an ESS can be while every step keeps the base's std: what README and theory/paths.md say of it.

Chain X_{k+1} = m_k(X_k) + std_k (u_k + z_k), last step by the base.  The second moment of the weights that are still to
come, and its least value over all controls, obey, with z ~ N(0, I) and M_{K-1}(x) = exp(2 lam r(m_{K-1}(x))),

    M_k(x) = E[ exp(-u.z + |u|^2/2) M_{k+1}(m_k(x) + std_k z) ],          u = u_k(x), or where this is least
    ESS    = Z^2 / E[M_0(X_0)],       Z = E[M_0(X_0)] of the same recursion with u = 0 and M_{K-1} = exp(lam r)

In log M the right side is convex in u, so Newton's steps find the least.  On a grid: log M by cubic splines, the
expectation by Gauss and Hermite's points around the control of the tilted law.
"""

import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from repository import ROOT
from scipy.ndimage import map_coordinates, spline_filter

from lightning_tilt.models import GaussianMixture, the_mixture
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.transition import DDIM, Gaussian

Array = NDArray[np.float64]
PROCESS = RectifiedFlow()
MIXTURE, REWARD = the_mixture()
TILTED, _ = MIXTURE.tilt(REWARD, 1.0)
EDGE, POINTS, NODES = 5.5, 57, 6
AXIS = np.linspace(-EDGE, EDGE, POINTS)
GRID = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1).reshape(-1, 2)
_NODE, _WEIGHT = np.polynomial.hermite_e.hermegauss(NODES)
Z = np.stack(np.meshgrid(_NODE, _NODE, indexing="ij"), -1).reshape(-1, 2)
LOG_WEIGHT = np.log(np.outer(_WEIGHT, _WEIGHT) / _WEIGHT.sum() ** 2).ravel()


def kernel(mixture: GaussianMixture, t: float, s: float) -> Gaussian:
    """The step from t to s with the prediction of `mixture`, at the points of the grid."""
    x, time = torch.from_numpy(GRID), torch.full((len(GRID),), t, dtype=torch.float64)
    output = mixture.x1_posterior(PROCESS, x, time).mean
    return DDIM()(PROCESS, x, PROCESS.interpret(output, "sample", x, time), time, torch.full_like(time, s))


def log_mean(terms: Array) -> Array:
    """log of the mean of exp, over the points of the quadrature."""
    top = terms.max(1, keepdims=True)
    return np.asarray(np.log(np.exp(terms - top).sum(1)) + top[:, 0])


def least(terms: Array, z: Array, u: Array) -> Array:
    """The u where log E[exp(terms - u.z)] + |u|^2/2 is least."""
    for _ in range(8):
        tilted = terms - (u[:, None] * z).sum(-1)
        p = np.exp(tilted - log_mean(tilted)[:, None])
        mean = (p[..., None] * z).sum(1)
        d = z - mean[:, None]
        hessian = np.einsum("gq,gqi,gqj->gij", p, d, d) + np.eye(2)
        u = u - np.linalg.solve(hessian, (u - mean)[..., None])[..., 0]
    return u


def ess(steps: int) -> tuple[float, float]:
    """ESS with the tilted law's own predictions, and the largest of all controls."""
    t = np.linspace(0, 1, steps + 1)
    reward = REWARD.score(kernel(MIXTURE, t[-2], t[-1]).mean, None).numpy()
    log_z, own, best = reward, 2 * reward, 2 * reward
    for k in range(steps - 2, -1, -1):
        base = kernel(MIXTURE, t[k], t[k + 1])
        mean, std = base.mean.numpy(), float(base.std.flatten()[0])
        u = (kernel(TILTED, t[k], t[k + 1]).mean.numpy() - mean) / std
        z = u[:, None] + Z
        measure = LOG_WEIGHT - (u[:, None] * Z).sum(-1) - 0.5 * (u**2).sum(-1)[:, None]  # N(z; 0) over N(z; u)
        at = ((mean[:, None] + std * z + EDGE) / (AXIS[1] - AXIS[0])).transpose(2, 0, 1)

        def still(log_m: Array, at: Array = at, measure: Array = measure) -> Array:
            spline = spline_filter(log_m.reshape(POINTS, POINTS), order=3)
            return np.asarray(map_coordinates(spline, at, order=3, mode="nearest", prefilter=False)) + measure

        log_z = log_mean(still(log_z))
        own = log_mean(still(own) - (u[:, None] * z).sum(-1)) + 0.5 * (u**2).sum(-1)
        terms = still(best)
        v = least(terms, z, u)
        best = log_mean(terms - (v[:, None] * z).sum(-1)) + 0.5 * (v**2).sum(-1)
    start = np.exp(-0.5 * (GRID**2).sum(1))
    start /= start.sum()
    square = (start @ np.exp(log_z)) ** 2
    return float(square / (start @ np.exp(own))), float(square / (start @ np.exp(best)))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("steps", [20, 40, pytest.param(60, marks=SLOW), pytest.param(100, marks=SLOW)])
def test_the_largest_ess_with_the_stds_of_the_base(steps: int) -> None:
    """The page's figures; 200,000 paths with the tilted law's predictions gave .8840, .9569, .9882 at 20, 40, 100."""
    table = (ROOT / "docs/theory/paths.md").read_text().split("| steps |")[1].split("\n\n")[0]
    head, _, *rows = (re.findall(r"[\d.]+(?= \|)", line) for line in table.splitlines())
    own, best = (dict(zip(map(int, head), map(float, row), strict=True)) for row in rows)
    assert ess(steps) == pytest.approx((own[steps], best[steps]), abs=1e-3)

"""Log-variance and trajectory balance against naive loops, a Gaussian oracle, and quadrature off policy."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from path_losses import (
    Jagged,
    at_control,
    gradient_with_error,
    naive_path,
    net,
    net_update,
    problem,
    relative_entropy_gradient,
    same_gradient,
    same_whatever_the_micro_batches,
    update,
)  # fmt: skip
from toys import SumReward

from lightning_tilt.identities import log_partition
from lightning_tilt.tasks import LogVarianceTask, TrajectoryBalanceTask

TASKS = [LogVarianceTask, TrajectoryBalanceTask]


def test_log_variance_gradient_equals_a_naive_loop() -> None:
    """The variance within each prompt's three paths, of W summed step by step."""
    task, path, gradient = net_update(LogVarianceTask, unconditional_gradient=True)
    W = [naive_path(task.predictor, path, n).W - 2.0 * path.states[-1, n].sin().sum() for n in range(9)]
    total = sum(3 * torch.stack(W[3 * c : 3 * c + 3]).var(correction=1) for c in range(3)) / 9
    same_gradient(gradient, total, task.predictor)
    assert float(task.trainer.callback_metrics["train/loss"]) == pytest.approx(float(total.detach()), rel=1e-9)


def test_trajectory_balance_gradient_equals_a_naive_loop() -> None:
    """One condition without a prompt; the learned log Z has its own gradient."""
    predictor = net()
    encode = predictor.encode
    predictor.encode = lambda prompts, size: replace(encode([""] * size, size), prompts=None)
    task, path, gradient = update(TrajectoryBalanceTask, predictor, SumReward(), torch.zeros(6), 5, lam=2.0)
    assert path.prompts is None and task.loss_parameters() == [task.scaled_log_z]
    W = [naive_path(predictor, path, n, scale=1.0).W - 2.0 * path.states[-1, n].sin().sum() for n in range(6)]
    total = (torch.stack(W) ** 2).mean()
    same_gradient(gradient, total, predictor)
    assert float(gradient["scaled_log_z"]) == pytest.approx(2 * 10 * float(torch.stack(W).mean().detach()), rel=1e-9)


@pytest.mark.parametrize("kind", TASKS)
def test_expected_gradient_on_policy_is_twice_the_relative_entropys(kind: type) -> None:
    """Zero at the Riccati control, within 4 standard errors, and 2 grad KL(P_theta | P*) elsewhere."""
    chain, tilt = problem()
    best = oracles.best_control(chain, tilt)
    for control, optimal in ((best, True), ([(0.5 * g, h + 0.1) for g, h in best], False)):
        task, path, _ = at_control(kind, control)
        got, se = gradient_with_error(task, path)
        expected = 2 * relative_entropy_gradient(chain, control, tilt)
        assert ((got - expected).abs() <= 4 * se).all()
        assert (expected.abs().max() < 1e-6) == optimal
        if not optimal:
            assert ((got / se).abs() > 6).any()


@pytest.mark.parametrize("kind", TASKS)
def test_paths_are_weighed_for_free(kind: type) -> None:
    chain, tilt = problem()
    _, path, _ = at_control(kind, [(0.0, 0.1)] * 8)
    estimate = log_partition(path.log_w)
    assert abs(estimate.mean - oracles.log_z(chain, tilt)) < 3 * estimate.se


def test_off_policy_minimiser_depends_on_the_law_of_the_paths() -> None:
    """One step with noise from a fixed state, all by Gauss-Hermite quadrature, exact for polynomials.

    Under paths of the constant control c the minimiser of Var[W] is u = lam s E_c[r'], which is the Riccati control
    for c = u alone.
    """
    s, m, lam = 0.7, 0.2, 2.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = weights / weights.sum()

    def variance(u: float, c: float) -> float:
        xi = nodes + c
        W = u * xi - u * u / 2 + lam * (m + s * xi - 1) ** 2 / 2
        return float(weights @ W**2 - (weights @ W) ** 2)

    def minimiser(c: float) -> float:
        low, middle, high = (variance(u, c) for u in (-1.0, 0.0, 1.0))  # a parabola in u
        return 0.5 * (low - high) / (low - 2 * middle + high)

    best = lam * s * (1 - m) / (1 + lam * s * s)
    for c in (-1.0, 0.0, best, 1.0):
        assert minimiser(c) == pytest.approx(lam * s * (1 - m - s * c), rel=1e-9)
    assert minimiser(best) == pytest.approx(best, rel=1e-9)
    assert abs(minimiser(0.0) - best) > 0.5


def test_off_policy_gradient_recomputes_the_innovations_from_the_path() -> None:
    """On paths of another control the Riccati control is not stationary, and the gradient the oracle's within 4 s.e.

    The oracle: for one noisy step, 2 Cov_v(W, (xi - u) (x_0, 1)) is polynomial in (x_0, xi), exact by quadrature.
    """
    chain, tilt = problem(2)
    best = oracles.best_control(chain, tilt)
    task, path, _ = at_control(LogVarianceTask, [(0.0, -0.5), (0.0, 0.0)])
    with torch.no_grad():
        task.predictor.control.copy_(torch.tensor(best))
    got, se = gradient_with_error(task, path)
    nodes, weights = np.polynomial.hermite_e.hermegauss(16)
    x0, z = np.meshgrid(nodes, nodes, indexing="ij")
    p = np.outer(weights, weights) / weights.sum() ** 2
    xi, (g, h) = z - 0.5, best[0]
    u = g * x0 + h
    x1 = chain.A[0] * x0 + chain.b[0] + chain.s[0] * xi
    end = chain.A[1] * x1 + chain.b[1]
    W = u * xi - u**2 / 2 + tilt.lam * (end - tilt.c) ** 2 / 2
    W = W - (p * W).sum()
    expected = torch.tensor([[(2 * p * W * (xi - u) * x0).sum(), (2 * p * W * (xi - u)).sum()]])
    assert ((got - expected).abs() <= 4 * se).all()
    assert ((expected / se).abs() > 10).any()


def test_micro_batches_change_nothing() -> None:
    same_whatever_the_micro_batches(LogVarianceTask)


def test_evaluations_are_counted() -> None:
    """Guidance by 2 asks both branches: rollout, base, loss, and once more where it is checkpointed."""
    for checkpoint in (False, True):
        task, path, _ = net_update(LogVarianceTask, checkpoint=checkpoint)
        e, n, steps = task.sampler.evaluations, len(path), path.steps
        assert e.pairs == n * (steps - 1)
        assert e.forward == 2 * n * (steps + (steps - 1) * (3 if checkpoint else 2))
        assert (e.backward, e.vjp) == (2 * n * (steps - 1), 0)


def test_rewards_without_gradient_and_with_holes() -> None:
    """No gradient is asked for; a sample of weight 0 is as if it had not been drawn."""
    task, path, _ = net_update(LogVarianceTask, Jagged([1]), sampler={"on_bad_reward": "skip"})
    assert path.reward_gradient is None and path.weight.tolist() == [1, 0, 1, 1, 1, 1, 1, 1, 1]
    W = [(naive_path(task.predictor, path, n).W - 2.0 * path.reward[n]).detach() for n in (0, 2, 3, 4, 5, 6, 7, 8)]
    groups = [torch.stack(part) for part in (W[:2], W[2:5], W[5:])]
    expected = sum(len(g) * g.var(correction=1) for g in groups) / 8
    assert float(task.loss(path)[0].detach()) == pytest.approx(float(expected), rel=1e-9)


def test_what_cannot_work_is_refused_with_the_mend() -> None:
    with pytest.raises(ValueError, match="samples_per_condition of at least 2"):
        net_update(LogVarianceTask, sampler={"samples_per_condition": 1})
    with pytest.raises(ValueError, match="use LogVariance"):
        net_update(TrajectoryBalanceTask)
    with pytest.raises(ValueError, match="base_last_step: true"):
        net_update(LogVarianceTask, sampler={"base_last_step": False})
    with pytest.raises(ValueError, match="log_z_scale"):
        net_update(TrajectoryBalanceTask, log_z_scale=0.0)

"""Weighted cross-entropy against naive loops and a Gaussian oracle, on and off policy."""

import oracles
import pytest
import torch
from path_losses import (
    Jagged,
    at_control,
    gradient_with_error,
    naive_path,
    net_update,
    problem,
    same_gradient,
    same_whatever_the_micro_batches,
)  # fmt: skip

from lightning_tilt.tasks import CrossEntropyTask


def test_gradient_equals_a_naive_loop() -> None:
    """-1/N sum_n w_n sum_k log N(X_{k+1}; m_k, std_k^2), the weights normalised prompt by prompt."""
    task, path, gradient = net_update(CrossEntropyTask, unconditional_gradient=True)
    naive = [naive_path(task.predictor, path, n) for n in range(9)]
    log_w = torch.stack([2.0 * path.states[-1, n].sin().sum() - naive[n].W.detach() for n in range(9)])
    w = torch.cat([3 * log_w[3 * c : 3 * c + 3].softmax(0) for c in range(3)])
    total = torch.zeros((), dtype=torch.float64)
    for n in range(9):
        for u, xi in zip(naive[n].u, naive[n].xi, strict=True):
            total = total + w[n] * ((xi - u) ** 2).sum() / 2 / 9
    same_gradient(gradient, total, task.predictor)
    assert float(task.trainer.callback_metrics["train/weight_max"]) == pytest.approx(float(w.max()), rel=1e-9)


def _expected(control: list[tuple[float, float]]) -> torch.Tensor:
    """E*[(u_k(x) - u*_k(x)) (x, 1)] under the exactly tilted chain, u* the best control: no weights, no samples."""
    chain, tilt = problem()
    best, path = oracles.best_control(chain, tilt), oracles.laws(oracles.tilted_kernels(chain, tilt))
    out = []
    for (g, h), (gb, hb), (m, v) in zip(control[:-1], best[:-1], path, strict=False):
        out.append(((g - gb) * (v + m * m) + (h - hb) * m, (g - gb) * m + h - hb))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("drawn", ["best", "wrong"])
@pytest.mark.parametrize("asked", ["best", "wrong"])
def test_expected_gradient_vanishes_at_the_best_control_whoever_drew_the_paths(drawn: str, asked: str) -> None:
    """Within 4 standard errors, and is what the oracle says at a wrong control."""
    chain, tilt = problem()
    best = oracles.best_control(chain, tilt)
    controls = {"best": best, "wrong": [(0.7 * g, h + 0.05) for g, h in best]}
    task, path, _ = at_control(CrossEntropyTask, controls[drawn])
    with torch.no_grad():
        task.predictor.control.copy_(torch.tensor(controls[asked]))
    got, se = gradient_with_error(task, path)
    expected = _expected(controls[asked])
    assert ((got - expected).abs() <= 4 * se).all()
    assert ((got / se).abs() > 6).any() == (asked == "wrong")


def test_micro_batches_change_nothing() -> None:
    same_whatever_the_micro_batches(CrossEntropyTask)


def test_rewards_without_gradient_and_with_holes() -> None:
    _, path, gradient = net_update(CrossEntropyTask, Jagged([1]), sampler={"on_bad_reward": "skip"})
    assert path.reward_gradient is None and path.importance[1] == 0
    assert [float(path.importance[i].sum()) for i in (slice(0, 3), slice(3, 6), slice(6, 9))] == pytest.approx(
        [2, 3, 3]
    )
    assert all(torch.isfinite(g).all() for g in gradient.values())


def test_clipped_weights_are_less_and_none_is_refused() -> None:
    _, plain, _ = net_update(CrossEntropyTask, lam=20.0)
    _, clipped, _ = net_update(CrossEntropyTask, lam=20.0, path_weights="clipped", weight_clip=1.5)
    assert clipped.importance.max() < plain.importance.max()
    with pytest.raises(ValueError, match="self_normalised, not none"):
        net_update(CrossEntropyTask, path_weights="none")
    assert CrossEntropyTask.on_policy is False


def test_evaluations_are_counted() -> None:
    """As for all losses on paths: rollout, base and loss; the weights cost nothing more."""
    task, path, _ = net_update(CrossEntropyTask, checkpoint=False)
    e, n, steps = task.sampler.evaluations, len(path), path.steps
    assert (e.pairs, e.forward) == (n * (steps - 1), 2 * n * (steps + 2 * (steps - 1)))

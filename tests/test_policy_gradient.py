"""REINFORCE and GRPO against naive loops and a Gaussian oracle: which penalty reaches the tilt, and which does not."""

from typing import Any

import oracles
import pytest
import torch
from path_losses import (
    PROMPTS,
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
)  # fmt: skip
from torch import Tensor
from toys import SumReward, fit

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.losses.grpo import clipped_terms
from lightning_tilt.tasks import GRPOTask, ReinforceTask

Affine = list[tuple[float, float]]


def _naive(task: Any, path: Any, published: bool, divide: bool, clip: float | None) -> Tensor:
    """-min(rho A, clip(rho) A) + |u|^2/2, sample by sample and step by step; baselines from the other two samples."""
    paths = [naive_path(task.predictor, path, n) for n in range(9)]
    r = [float(path.states[-1, n].sin().sum()) for n in range(9)]
    total = torch.zeros((), dtype=torch.float64)
    for n in range(9):
        group = [3 * (n // 3) + i for i in range(3)]
        rewards = torch.tensor([r[i] for i in group], dtype=torch.float64)
        scale = 2.0 / (float(rewards.std()) + 1e-6) if divide else 2.0
        for k in range(4):

            def gain(i: int, k: int = k, scale: float = scale) -> float:
                later = [(xi - z) for xi, z in zip(paths[i].xi[k + 1 :], paths[i].z[k + 1 :], strict=True)]
                return scale * r[i] - (0.0 if published else sum(float((u**2).sum()) / 2 for u in later))

            others = [gain(i) for i in group if i != n]
            A = gain(n) - sum(others) / 2
            u, xi, z = paths[n].u[k], paths[n].xi[k], paths[n].z[k]
            rho = torch.exp(((z**2).sum() - ((xi - u) ** 2).sum()) / 2)
            surrogate = rho * A if clip is None else torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A)
            total = total + ((u**2).sum() / 2 - surrogate) / 9
    return total


def test_reinforce_gradient_equals_a_naive_loop() -> None:
    """On policy, the gradient of unclipped ratios is that of the log density."""
    task, path, gradient = net_update(ReinforceTask, unconditional_gradient=True)
    same_gradient(gradient, _naive(task, path, published=False, divide=False, clip=None), task.predictor)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_grpo_gradient_equals_a_naive_loop_after_the_model_has_moved(
    published: bool, divide: bool, clip: float | None
) -> None:
    task, path, gradient = net_update(
        GRPOTask, unconditional_gradient=True, divide_by_std=divide, clip=clip,
        penalty="published" if published else "exact",
    )  # fmt: skip
    same_gradient(gradient, _naive(task, path, published, divide, clip), task.predictor)
    torch.manual_seed(5)
    for p in task.predictor.network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    loss, logged = task.loss(path)
    moved = torch.autograd.grad(loss, list(task.predictor.network.parameters()))
    names = [name for name in gradient if name.startswith("predictor.")]
    same_gradient(dict(zip(names, moved, strict=True)), _naive(task, path, published, divide, clip), task.predictor)
    if clip is not None:
        assert 0.1 < float(logged["clipped_fraction"]) < 0.9


def test_exact_unclipped_grpo_is_reinforce_on_policy() -> None:
    _, _, one = net_update(ReinforceTask)
    _, _, other = net_update(GRPOTask, clip=None)
    _, _, published = net_update(GRPOTask, clip=None, penalty="published")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-11)
    assert any(not torch.allclose(published[name], one[name], rtol=1e-3) for name in one)


def test_clipping_is_the_published_one() -> None:
    """A ratio beyond the interval has no gradient where going further would pay, and keeps it where it would not."""
    log_rho = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    terms = clipped_terms(A, log_rho, 0.2)
    rho = log_rho.detach().exp()
    torch.testing.assert_close(terms.detach(), torch.stack([torch.tensor(-1.2), rho[1], -rho[2], torch.tensor(0.8)]))
    (slope,) = torch.autograd.grad(terms.sum(), log_rho)
    torch.testing.assert_close(slope, torch.stack([0 * rho[0], rho[1], -rho[2], 0 * rho[3]]))


def test_expected_reinforce_gradient_is_the_relative_entropys() -> None:
    """Zero at the Riccati control, within 4 standard errors, and grad KL(P_theta | P*) elsewhere."""
    chain, tilt = problem()
    best = oracles.best_control(chain, tilt)
    for control, optimal in ((best, True), ([(0.5 * g, h + 0.1) for g, h in best], False)):
        task, path, _ = at_control(ReinforceTask, control)
        got, se = gradient_with_error(task, path)
        assert ((got - relative_entropy_gradient(chain, control, tilt)).abs() <= 4 * se).all()
        assert ((got / se).abs() > 6).any() != optimal


def published_fixed_point(chain: oracles.Chain, tilt: oracles.Tilt) -> Affine:
    """Where E[z_k lam r(X_K) | X_k] = u_k(X_k).

    By Stein's lemma u_k = lam s_k F E[r'(X_K) | X_k], F the slope of X_K in X_{k+1} under the control itself; with
    E[X_K | X_{k+1} = y] = F y + f that is one linear equation for u_k, backwards in k.
    """
    P, Q, _ = tilt.end()
    F, f, out = 1.0, 0.0, []
    for A, b, s in zip(reversed(chain.A), reversed(chain.b), reversed(chain.s), strict=True):
        grow = 1 + s * s * F * F * P
        g, h = -s * F * P * F * A / grow, s * F * (Q - P * (F * b + f)) / grow
        out.insert(0, (g, h))
        F, f = F * (A + s * g), F * (b + s * h) + f
    return out


@pytest.mark.parametrize(("lam", "biased", "true"), [(0.5, 0.285, 0.322), (2.0, 0.545, 0.656), (8.0, 0.753, 0.884)])
def test_the_published_penalty_does_not_reach_the_tilt(lam: float, biased: float, true: float) -> None:
    """Base N(0, 1), r = -(x - 1)^2/2, K = 100: the fixed point's mean, without Monte Carlo."""
    chain, tilt = oracles.ddim_chain(oracles.flow_schedule(100), 0.0, 1.0), oracles.Tilt(lam=lam, q=1.0, c=1.0)
    mean = oracles.laws(oracles.controlled(chain, published_fixed_point(chain, tilt)))[-1][0]
    best = oracles.laws(oracles.controlled(chain, oracles.best_control(chain, tilt)))[-1][0]
    assert mean == pytest.approx(biased, abs=6e-4)
    assert best == pytest.approx(oracles.tilted_end_law(chain, tilt)[0]) == pytest.approx(true, abs=6e-4)


def test_the_published_gradient_vanishes_at_the_biased_control_and_not_at_the_best() -> None:
    """4 standard errors; with the exact penalty it is the other way round."""
    chain, tilt = problem()
    best, biased = oracles.best_control(chain, tilt), published_fixed_point(chain, tilt)
    for penalty, control, zero in (
        ("published", biased, True), ("published", best, False), ("exact", best, True), ("exact", biased, False),
    ):  # fmt: skip
        task, path, _ = at_control(GRPOTask, control, penalty=penalty)
        got, se = gradient_with_error(task, path)
        assert (got.abs() <= 4 * se).all() == zero, (penalty, zero)
        assert ((got / se).abs() > 6).any() != zero


def test_dividing_by_the_std_turns_lam_into_lam_over_std() -> None:
    """A reward ten times as large changes nothing; without the division, it is lam ten times as large."""

    class Tenfold(SumReward):
        def score(self, images: Tensor, prompts: Any) -> Tensor:
            return 10 * super().score(images, prompts)

    for divide, lam in ((True, 2.0), (False, 0.2)):
        _, _, plain = net_update(GRPOTask, lam=2.0, divide_by_std=divide)
        _, _, large = net_update(GRPOTask, Tenfold(), lam=lam, divide_by_std=divide)
        for name in plain:
            torch.testing.assert_close(large[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [ReinforceTask, GRPOTask])
def test_micro_batches_change_nothing_and_evaluations_are_counted(kind: type) -> None:
    same_whatever_the_micro_batches(kind)
    task, path, _ = net_update(kind, checkpoint=False)
    e, n, steps = task.sampler.evaluations, len(path), path.steps
    assert (e.pairs, e.forward, e.vjp) == (n * (steps - 1), 2 * n * (steps + 2 * (steps - 1)), 0)


@pytest.mark.parametrize(("kind", "kwargs"), [(ReinforceTask, {}), (GRPOTask, {"divide_by_std": True})])
def test_rewards_without_gradient_and_with_holes(kind: type, kwargs: dict[str, Any]) -> None:
    """A sample that is left out moves nothing: neither by itself nor through its group's mean and std."""
    task, path, gradient = net_update(kind, Jagged([1]), sampler={"on_bad_reward": "skip"}, **kwargs)
    assert path.reward_gradient is None
    rest = path[torch.tensor([0, 2, 3, 4, 5, 6, 7, 8])]
    expected = torch.autograd.grad(task.loss(rest)[0], list(task.predictor.network.parameters()))
    for name, value in zip([n for n in gradient if n.startswith("predictor.")], expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-11)


def test_several_updates_on_one_rollout_move_the_ratio() -> None:
    task = GRPOTask(predictor=net(), reward=SumReward(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05)).double()
    sampler = TrajectorySampler(steps=5, samples_per_condition=3, rollout_every=3)
    recorder = fit(task, sampler, [PROMPTS] * 3)
    first, *others = recorder.trajectories
    assert all(torch.equal(other.states, first.states) for other in others)
    assert float(task.trainer.callback_metrics["train/clipped_fraction"]) > 0


def test_bad_arguments_are_refused() -> None:
    for kwargs, message in (({"penalty": "none"}, "penalty is one of"), ({"clip": 0.0}, "clip lies between")):
        with pytest.raises(ValueError, match=message):
            net_update(GRPOTask, **kwargs)
    for kind in (ReinforceTask, GRPOTask):
        with pytest.raises(ValueError, match="samples_per_condition of at least 2"):
            net_update(kind, sampler={"samples_per_condition": 1})

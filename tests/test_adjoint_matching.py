"""Adjoint Matching against autograd, a Gaussian oracle, and itself under every micro-batching."""

import dataclasses
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from toys import AffineControl, PromptedNet, SumReward, gaussian, one_update

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.identities import log_partition
from lightning_tilt.identities.lean_adjoint import lean_adjoint
from lightning_tilt.models import the_mixture
from lightning_tilt.models.closed_form import GaussianMixturePredictor
from lightning_tilt.process import Cosine, Process, RectifiedFlow, VariancePreserving
from lightning_tilt.rewards.quadratic import QuadraticReward

MU, V, LAM, C = 0.3, 0.2, 2.0, 1.0
PROCESSES = {"vp": VariancePreserving.from_betas(), "flow": RectifiedFlow(), "flow_shift_3": RectifiedFlow(shift=3.0)}


def _oracle(name: str, steps: int) -> tuple[oracles.Chain, oracles.Tilt]:
    schedule = {
        "vp": lambda: oracles.sd15_schedule(steps),
        "flow": lambda: oracles.flow_schedule(steps),
        "flow_shift_3": lambda: oracles.flow_schedule(steps, 3.0),
    }[name]()
    return oracles.ddim_chain(schedule, MU, V), oracles.Tilt(lam=LAM, q=1.0, c=C)


def _reward() -> QuadraticReward:
    return QuadraticReward([[1.0]], [C])


def test_lean_adjoint_is_the_gradient_through_the_chain_with_its_innovations_held() -> None:
    """Autograd of -lam r through x_{k+1} = m_base(x_k) + stop_gradient(X_{k+1} - m_base(X_k)), every step."""
    mixture, reward = the_mixture()
    task, path, _ = one_update(GaussianMixturePredictorWithNet(mixture), reward, torch.zeros(16), 10, lam=1.7)
    chain = task.sampler.chain(task)
    with task.predictor.base() as base:
        mean = chain.mean(base, path.condition[path.index])
        for k in range(10):
            x = state = path.states[k].clone().requires_grad_()
            for j in range(k, 10):
                m = mean(x, j)
                x = m + (path.states[j + 1] - mean(path.states[j], j)).detach()
            (expected,) = torch.autograd.grad(-1.7 * reward.score(x, None).sum(), state)
            if k > 0:
                torch.testing.assert_close(path.adjoint[k - 1], expected, rtol=1e-10, atol=1e-10)
    # The last step has std = 0: its mean is supervised nowhere, and the adjoint passed through it.
    assert path.supervised.tolist() == list(range(9))


def GaussianMixturePredictorWithNet(mixture: object) -> object:
    from lightning_tilt.models import NeuralTilt

    torch.manual_seed(1)
    net = NeuralTilt(GaussianMixturePredictor.of(mixture), hidden=16, layers=1)
    torch.nn.init.normal_(net.last.weight, std=0.3)
    return net


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [10, 28])
def test_expected_gradient_is_the_oracles_and_vanishes_at_the_best_control(name: str, steps: int) -> None:
    """At the Riccati control the gradient is zero within 4 standard errors, and what the oracle says elsewhere."""
    chain, tilt = _oracle(name, steps)
    n = 20_000
    for control, shift in [
        (oracles.best_control(chain, tilt), "zero"),
        (oracles.adjoint_matching_fixed_point(chain, tilt, shift=1), "wrong index"),
        ([(0.0, 0.0)] * steps, "base"),
    ]:
        predictor = AffineControl(gaussian(MU, V, PROCESSES[name]), steps, control)
        _, path, gradient = one_update(predictor, _reward(), torch.zeros(n), steps, lam=LAM)
        noisy = path.supervised.tolist()
        assert noisy == list(range(steps - 1))
        got = gradient["predictor.control"][noisy] * len(noisy)
        u = predictor.control[noisy, :1, None] * path.states[noisy] + predictor.control[noisy, 1:, None]
        std = task_std(chain, noisy)
        residual = (u + std * path.adjoint).detach().squeeze(-1)
        parts = torch.stack([residual * path.states[noisy].squeeze(-1), residual], 1)
        se = parts.std(-1) / n**0.5
        expected = torch.tensor(oracles.adjoint_matching_gradient(chain, control, tilt), dtype=torch.float64)[noisy]
        assert ((got - expected).abs() <= 4.5 * se + 1e-12).all(), shift
        if shift == "zero":
            assert expected.abs().max() < 1e-10
        if shift == "wrong index":
            assert (got.abs() > 5 * se).any()


def task_std(chain: oracles.Chain, steps: list[int]) -> Tensor:
    return torch.tensor([chain.s[k] for k in steps], dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("name", PROCESSES)
def test_expected_weight_is_the_chains_own_partition_function(name: str) -> None:
    """E[w] = Z of the discrete chain within 3 standard errors, for the base, the best and a wrong control."""
    steps = 10
    chain, tilt = _oracle(name, steps)
    best = oracles.best_control(chain, tilt)
    for control in ([(0.0, 0.0)] * steps, best, [(0.5 * g, h + 0.1) for g, h in best]):
        predictor = AffineControl(gaussian(MU, V, PROCESSES[name]), steps, control)
        _, path, _ = one_update(predictor, _reward(), torch.zeros(20_000), steps, lam=LAM)
        estimate = log_partition(path.log_w)
        assert abs(estimate.mean - oracles.log_z(chain, tilt)) < 3 * estimate.se


def _net_update(**kwargs: object) -> tuple[dict[str, Tensor], object]:
    torch.manual_seed(3)
    net = PromptedNet(RectifiedFlow())
    net.network[2].weight.data += 0.3
    sampler = {"samples_per_condition": 3, "guidance_scale": kwargs.pop("guidance", 1.0)}
    sampler |= kwargs.pop("sampler", {})  # type: ignore[arg-type]
    _, path, gradient = one_update(net, SumReward(), ["one", "three", "seven"], 6, sampler=sampler, lam=2.0, **kwargs)
    return gradient, path


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("supervised", ["all", 3])
def test_gradient_does_not_depend_on_any_micro_batch(guidance: float, supervised: object) -> None:
    whole, path = _net_update(guidance=guidance, supervised_steps=supervised)
    cut, other = _net_update(
        guidance=guidance, supervised_steps=supervised, adjoint_micro_batch=2, loss_micro_batch=5, checkpoint=True,
        sampler={"rollout_micro_batch": 4, "reward_micro_batch": 1},
    )  # fmt: skip
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-10, atol=1e-10)
        assert whole[name].abs().max() > 0
    torch.testing.assert_close(other.states, path.states, rtol=1e-12, atol=1e-12)


def test_gradient_equals_a_naive_loop() -> None:
    """One sample and one step at a time, adjoints by explicit Jacobians."""
    torch.manual_seed(3)
    net = PromptedNet(RectifiedFlow())
    net.network[2].weight.data += 0.3
    _task, path, gradient = one_update(
        net, SumReward(), ["one", "seven"], 5, lam=2.0, sampler={"guidance_scale": 2.0}, unconditional_gradient=True
    )
    steps, t, total = 5, path.t, torch.zeros((), dtype=torch.float64)

    def mean(network: torch.nn.Module, x: Tensor, k: int, prompt: str) -> Tensor:
        def ask(p: str) -> Tensor:
            return network(torch.cat([x, torch.stack([t[k], torch.tensor(len(p) / 10).double()])]))

        v = ask("") + 2.0 * (ask(prompt) - ask(""))
        x1, eps = x + (1 - t[k]) * v, x - t[k] * v
        s, a = t[k + 1], t[k] / t[k + 1]
        b2 = (1 - t[k]) ** 2 - a**2 * (1 - s) ** 2
        std = (b2**0.5) * (1 - s) / (1 - t[k])
        return s * x1 + ((1 - s) ** 2 - std**2).clamp(min=0) ** 0.5 * eps

    for n, prompt in enumerate(["one", "seven"]):
        a = -2.0 * path.states[-1, n].cos()
        for k in reversed(range(steps)):
            s, ratio = t[k + 1], t[k] / t[k + 1]
            std = ((1 - t[k]) ** 2 - ratio**2 * (1 - s) ** 2) ** 0.5 * (1 - s) / (1 - t[k])
            x = path.states[k, n]
            if std > 0:
                u = (mean(net.network, x, k, prompt) - mean(net._twin[0], x, k, prompt)) / std
                total = total + 0.5 * ((u + std * a) ** 2).sum() / (2 * 4)
            jacobian = torch.func.jacrev(lambda y, k=k, p=prompt: mean(net._twin[0], y, k, p))(x)
            a = jacobian.T @ a
    for name, expected in zip(gradient, torch.autograd.grad(total, list(net.network.parameters())), strict=True):
        torch.testing.assert_close(gradient[name], expected, rtol=1e-9, atol=1e-11)


def test_sweep_stops_at_the_smallest_step_and_evaluations_are_counted() -> None:
    calls: list[int] = []
    states = torch.randn(9, 2, 1, dtype=torch.float64)

    def mean(x: Tensor, k: int) -> Tensor:
        calls.append(k)
        return 0.5 * x

    adjoint, means = lean_adjoint(mean, states, torch.ones(2, 1, dtype=torch.float64), [3, 6])
    assert calls == [7, 6, 5, 4, 3]
    torch.testing.assert_close(adjoint[:, 0, 0], torch.tensor([0.5**4, 0.5], dtype=torch.float64))
    torch.testing.assert_close(means, 0.5 * states[[3, 6]])

    for guidance, per_call in ((1.0, 1), (3.0, 2)):
        _, path = _net_update(guidance=guidance, supervised_steps=2)
        task, path, _ = one_update(
            PromptedNet(RectifiedFlow()),
            SumReward(),
            ["a", "b"],
            6,
            sampler={"guidance_scale": guidance},
            supervised_steps=2,
        )
        first, n, e = int(path.supervised[0]), len(path), task.sampler.evaluations
        assert e.pairs == 2 * n
        assert e.vjp == n * (5 - first) * per_call
        assert e.forward == n * per_call * (6 + (6 - first) + 2)
        assert e.backward == 2 * n * 2


def test_guided_control_trains_the_conditional_branch_alone_unless_asked() -> None:
    alone, _ = _net_update(guidance=3.0)
    both, _ = _net_update(guidance=3.0, unconditional_gradient=True)
    assert any(not torch.allclose(alone[n], both[n]) for n in alone)
    # With the base where it is, the empty prompt's branch is the only one left at scale 0.
    none, _ = _net_update(guidance=0.0)
    assert all(float(g.abs().max()) == 0 for g in none.values())


def test_guidance_of_rollout_adjoint_and_control_are_three_things() -> None:
    _, consistent = _net_update(guidance=3.0)
    rollout_only, path = _net_update(guidance=3.0, adjoint_guidance=1.0, control_guidance=1.0)
    assert torch.equal(path.states, consistent.states)
    assert not torch.allclose(path.adjoint, consistent.adjoint)
    assert path.log_w is None
    mixed, other = _net_update(guidance=3.0, adjoint_guidance=1.0, control_guidance=3.0)
    assert torch.equal(other.adjoint, path.adjoint)
    assert any(not torch.allclose(mixed[n], rollout_only[n]) for n in mixed)


@pytest.mark.parametrize("weight", ["epsilon", "uniform"])
def test_step_weights_leave_the_fixed_point_where_it_is(weight: str) -> None:
    steps = 10
    chain, tilt = _oracle("vp", steps)
    predictor = AffineControl(gaussian(MU, V, PROCESSES["vp"]), steps, oracles.best_control(chain, tilt))
    _, _path, gradient = one_update(predictor, _reward(), torch.zeros(20_000), steps, lam=LAM, step_weight=weight)
    _, _, plain = one_update(predictor, _reward(), torch.zeros(20_000), steps, lam=LAM)
    ratio = gradient["predictor.control"][:-1] / plain["predictor.control"][:-1]
    # A positive factor a step, the same for both parameters of the step, and not the same for all steps.
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])
    assert (ratio > 0).all()
    assert ratio[:, 0].max() / ratio[:, 0].min() > 2
    if weight == "uniform":
        torch.testing.assert_close(ratio[:, 0], 1 / task_std(chain, list(range(steps - 1))).flatten() ** 2)


def test_epsilon_weight_is_the_error_in_eps_hat() -> None:
    """1/2 |u|^2 weighted = 1/2 |eps_hat - eps_hat_base|^2 where the adjoint is 0."""
    net = PromptedNet(Cosine())
    net.network[2].bias.data += 0.2
    task, path, _ = one_update(net, SumReward(), ["a", "bb"], 6, lam=0.0, step_weight="epsilon", sampler={"steps": 6})
    chain, condition = task.sampler.chain(task), path.condition[path.index]
    total = 0.0
    for k in range(1, 5):  # epsilon says nothing at alpha = 0
        with torch.no_grad():
            x, t = path.states[k], path.t[k].expand(2)
            tuned = chain.process.interpret(chain.output(net, x, k, condition), "velocity", x, t).eps_hat
            with net.base() as base:
                plain = chain.process.interpret(chain.output(base, x, k, condition), "velocity", x, t).eps_hat
        total += 0.5 * float(((tuned - plain) ** 2).sum()) / 2 / 5
    assert float(task.loss(path)[0].detach()) == pytest.approx(total, rel=1e-9)


def test_loss_cap_drops_the_largest_terms_and_says_how_many() -> None:
    def update(**kwargs: object) -> tuple[Any, Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        return one_update(PromptedNet(RectifiedFlow()), SumReward(), ["a", "b"], 6, lam=2.0, **kwargs)

    task, path, _ = update()
    h, std = (path.t[1:] - path.t[:-1])[:5, None], task.sampler.chain(task).stds[:5, None]
    published = std**2 * (path.adjoint**2).sum(-1) / h  # |u/sqrt(h) + sigma a|^2, and u = 0 at the start
    middle = float(published.flatten().sort().values[4]) + 1e-9
    capped, _, _ = update(loss_cap=middle / 2.0**2)
    logged = capped.trainer.callback_metrics
    assert float(logged["train/capped_fraction"]) == pytest.approx(0.5)
    kept = published <= middle
    assert float(logged["train/loss"]) == pytest.approx(float((h / 2 * published)[kept].sum()) / 10)


def test_drawn_steps_are_fresh_each_rollout_and_include_the_last_ones() -> None:
    seen = set()
    for seed in range(6):
        _, path, _ = one_update(
            PromptedNet(RectifiedFlow()),
            SumReward(),
            ["a"],
            12,
            supervised_steps=2,
            last_steps=3,
            sampler={"seed": seed},
        )
        steps = path.supervised.tolist()
        assert steps[-3:] == [8, 9, 10] and len(steps) == 5 and steps == sorted(set(steps))
        seen.add(tuple(steps))
    assert len(seen) > 3


def test_mean_over_drawn_steps_is_unbiased_for_the_mean_over_all() -> None:
    """The average over every pair of the 5 noisy steps, on the same states."""
    torch.manual_seed(3)
    net = PromptedNet(RectifiedFlow())
    net.network[2].weight.data += 0.3
    task, path, _ = one_update(
        net, SumReward(), ["one", "three", "seven"], 6, lam=2.0, sampler={"samples_per_condition": 3}
    )
    losses = []
    for i in range(5):
        for j in range(i + 1, 5):
            some = dataclasses.replace(
                path, supervised=path.supervised[[i, j]], adjoint=path.adjoint[[i, j]], base_mean=path.base_mean[[i, j]]
            )
            losses.append(task.loss(some)[0])
    torch.testing.assert_close(torch.stack(losses).mean(), task.loss(path)[0], rtol=1e-12, atol=0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="supervised_steps"):
        one_update(PromptedNet(RectifiedFlow()), SumReward(), ["a"], 4, supervised_steps=0)
    with pytest.raises(ValueError, match=r"sampler\.steps"):
        TrajectorySampler(steps=0)


def test_process_type_is_any_interpolant() -> None:
    process: Process = Cosine()
    _, path, gradient = one_update(PromptedNet(process), SumReward(), ["a", "b"], 8, lam=1.0)
    assert torch.isfinite(path.log_w).all() and all(torch.isfinite(g).all() for g in gradient.values())

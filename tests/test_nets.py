"""NETS against autograd written out, against closed forms, and through every way of cutting it up."""

from typing import Any

import pytest
import torch
from gaussian_transport import AffineTransport, GaussianTransport, QuadraticAndLinear
from test_cmcd import same
from toys import PromptedNet, SumReward, fit

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.losses.continuity import FreeEnergy, action_terms
from lightning_tilt.models import NeuralTransport, PotentialTransport, the_mixture
from lightning_tilt.models.closed_form import GaussianMixturePredictor
from lightning_tilt.process import RectifiedFlow, VariancePreserving
from lightning_tilt.tasks import NETSTask
from lightning_tilt.transport import TransportChain, crooks

LAM, STEPS = 1.3, 5
DENSITY = [torch.zeros(6)]


def model(kind: Any = NeuralTransport) -> Any:
    torch.manual_seed(1)
    net = kind(GaussianMixturePredictor.of(the_mixture()[0]), hidden=8, layers=2)
    torch.nn.init.normal_(net.last.weight, std=0.3)
    return net


def update(predictor: Any, batches: Any = DENSITY, sampler: Any = None, **loss: Any) -> tuple[NETSTask, Any, Any]:
    settings: dict[str, Any] = {"reward": SumReward(), "lam": LAM, "sigma": 0.8} | loss
    torch.manual_seed(2)
    task = NETSTask(predictor=predictor, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **settings).double()
    if task.free_energy is not None:
        torch.nn.init.normal_(task.free_energy.last.weight)
    callback = TrajectorySampler(**({"steps": STEPS, "samples_per_condition": 1} | (sampler or {})))
    recorder = fit(task, callback, batches)
    return task, recorder.trajectories[0], recorder.gradients[0]


def base_fields(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity and score of the mixture under the flow."""
    mixture, process = the_mixture()[0], RectifiedFlow()
    time = torch.tensor(t, dtype=torch.float64)
    return mixture.velocity(process, x, time), mixture.marginal(process, time).score(x)


@pytest.mark.parametrize("supervised", ["all", 2])
def test_pinn_gradient_is_the_naive_one(supervised: Any) -> None:
    task, path, gradient = update(model(), supervised_steps=supervised)
    net, total, states = task.predictor, torch.zeros((), dtype=torch.float64), range(STEPS)
    if supervised == 2:
        states = task._draw_states(task.transport_chain(LAM)).tolist()
        assert len(states) == 2
    end = (STEPS - 1) / STEPS
    for k in states:
        t = torch.tensor([k / STEPS], dtype=torch.float64)
        for x in path.states[k]:
            (v,), (s,) = base_fields(x[None], k / STEPS)
            w = net.w(x[None], t, None)[0]
            J = torch.autograd.functional.jacobian(lambda y, t=t: net.w(y[None], t, None)[0], x, create_graph=True)
            grad_r, rate = LAM * t / end * x.cos(), LAM / end * x.sin().sum()
            R = rate + (v + w) @ grad_r + J.trace() + w @ s - task.free_energy(t)[0]
            total = total + R**2 / (len(path) * len(states))
    names = dict(task.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(total, list(names.values())), strict=True))
    assert any(name.startswith("free_energy") for name in expected)
    same(gradient, expected, 1e-8)


@pytest.mark.parametrize("objective", ["pinn", "action_matching"])
def test_micro_batches_and_checkpoints_change_nothing(objective: Any) -> None:
    settings: dict[str, Any] = {"objective": objective}
    if objective == "pinn":
        settings |= {"divergence": "hutchinson", "probes": 2}
    _, _, whole = update(model(PotentialTransport), **settings, checkpoint=False)
    for change in ({}, {"loss_micro_batch": 4}, {"loss_micro_batch": 7, "checkpoint": False}):
        same(update(model(PotentialTransport), **settings, **change)[2], whole, 1e-10)


def test_hutchinson_is_exact_in_one_dimension_and_unbiased_in_two() -> None:
    problem = GaussianTransport(RectifiedFlow())
    one: dict[str, Any] = {"reward": QuadraticAndLinear(problem), "lam": 1.0}
    exact = update(AffineTransport(problem, 0.5, (0.1, 0.2)), **one)[2]
    same(update(AffineTransport(problem, 0.5, (0.1, 0.2)), **one, divergence="hutchinson")[2], exact, 1e-10)
    task, path, _ = update(model(), divergence="hutchinson", probes=36)
    chain = task.transport_chain(LAM)
    (pairs,) = task.pairs(path, torch.arange(STEPS))
    probes = task._probes(pairs, path)
    assert probes.shape == (36, 6 * STEPS, 2) and set(probes.unique().tolist()) == {-1.0, 1.0}
    assert float(probes.mean().abs()) < 4 / probes.numel() ** 0.5
    noisy = task._residuals(chain, path, pairs).detach()
    task.divergence = "exact"
    exact = task._residuals(chain, path, pairs).detach()
    single = torch.stack([_residual(task, chain, path, pairs, e) for e in probes[:12]])
    assert bool(((noisy - exact).abs() < 4.5 * single.std(0) / 6 + 1e-9).all())
    assert float(single.std(0).max()) > 1e-2


def _residual(task: NETSTask, chain: Any, path: Any, pairs: Any, probe: torch.Tensor) -> torch.Tensor:
    task.divergence, given = "hutchinson", task._probes
    task._probes = lambda pairs, path: probe[None]  # type: ignore[method-assign]
    found = task._residuals(chain, path, pairs).detach()
    task._probes, task.divergence = given, "exact"  # type: ignore[method-assign]
    return found


def test_pinn_stays_where_the_transport_is_exact() -> None:
    """Exact w, F_t learned alone: the residual's gradient to w is the error of d_t F, and F ends at log Z."""
    problem = GaussianTransport(RectifiedFlow(), end=0.9)
    task = NETSTask(
        predictor=AffineTransport(problem), reward=QuadraticAndLinear(problem), lam=1.0,
        optimizer=lambda p: torch.optim.Adam(p[2:] if len(p) > 2 else p, lr=0.02),
    ).double()  # fmt: skip
    task.predictor.more.requires_grad_(False)
    fit(task, TrajectorySampler(steps=10, samples_per_condition=1, rollout_every=150), [torch.zeros(16)] * 150)
    assert float(task.trainer.callback_metrics["train/loss"]) < 1e-3
    learned = float(task.trainer.callback_metrics["train/log_z_learned"])
    assert learned == pytest.approx(float(problem.free_energy(torch.tensor(0.9).double())), abs=0.02)
    assert task.free_energy is not None and float(FreeEnergy()(torch.rand(3)).detach().abs().max()) == 0


class GaussianPotential(PotentialTransport):
    """phi = exact (a x^2/2 + b x) + theta_0 x + theta_1 x^2/2, whose gradient is `AffineTransport`'s w."""

    def __init__(self, problem: GaussianTransport, exact: float = 1.0) -> None:
        affine = AffineTransport(problem, exact)
        super().__init__(affine._base[0], hidden=1, layers=1)
        self.requires_grad_(False)
        self._affine, self.theta = [affine], torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def w(self, x: Any, t: Any, condition: Any) -> Any:
        return self._affine[0].w(x, t, condition) + self.theta[0] + self.theta[1] * x

    def potential(self, x: Any, t: Any) -> Any:
        time = t if t.requires_grad else t.detach()
        a, b = Smooth.apply(time, self._affine[0].problem)
        exact = self._affine[0].exact
        y = x[:, 0]
        return exact * (a * y**2 / 2 + b * y) + self.theta[0] * y + self.theta[1] * y**2 / 2


class Smooth(torch.autograd.Function):
    """The coefficients of w with their derivatives in t by central differences: w itself is a derivative already."""

    @staticmethod
    def forward(ctx: Any, t: Any, problem: Any) -> Any:
        ctx.problem = problem
        ctx.save_for_backward(t)
        return problem.w(t)

    @staticmethod
    def backward(ctx: Any, grad_a: Any, grad_b: Any) -> Any:
        (t,) = ctx.saved_tensors
        e = 1e-5
        up, down = ctx.problem.w(t + e), ctx.problem.w(t - e)
        d = [(u - v) / (2 * e) for u, v in zip(up, down, strict=True)]
        return grad_a * d[0] + grad_b * d[1], None


def test_action_matching_rests_at_the_exact_potential_alone() -> None:
    """Expected gradient: 0 at the exact transport, up to the grid and 4 s.e.; far from it without any transport."""
    found = {}
    for exact in (1.0, 0.0):
        problem = GaussianTransport(RectifiedFlow(), end=1 - 1 / 40)
        settings: dict[str, Any] = {"reward": QuadraticAndLinear(problem), "lam": 1.0, "objective": "action_matching"}
        batch = [torch.zeros(500)]
        found[exact] = update(GaussianPotential(problem, exact), batch, {"steps": 40}, sigma=1.0, **settings)[2]
    assert float(found[1.0]["predictor.theta"].abs().max()) < 0.08
    assert float(found[0.0]["predictor.theta"].abs().max()) > 0.15


def test_action_is_the_naive_weighted_sum() -> None:
    task, path, gradient = update(model(PotentialTransport), objective="action_matching")
    net, chain = task.predictor, task.transport_chain(LAM)
    with torch.no_grad():
        log_w = torch.stack([f.r + ratio for f, ratio in crooks(chain, net, path)])
    w, n = log_w.softmax(1), len(path)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(STEPS):
        h = (1 if 0 < k < STEPS - 1 else 0.5) / STEPS
        t = torch.tensor([k / STEPS], dtype=torch.float64).requires_grad_()
        rho = []
        for i in range(n):
            x = path.states[k, [i]].clone().requires_grad_()
            r = chain.r(net, t, path.condition[path.index[[i]]], 1.0)(x).sum()
            gx, gt = torch.autograd.grad(r, (x, t))
            rho.append(gt.sum() + (base_fields(x, k / STEPS)[0].detach() * gx).sum())
        mean = sum(w[k, i] * rho[i] for i in range(n))
        for i in range(n):
            x = path.states[k, [i]].clone().requires_grad_()
            phi = net.potential(x, t.detach()).sum()
            (gx,) = torch.autograd.grad(phi, x, create_graph=True)
            total = total + h * w[k, i] * ((gx**2).sum() / 2 - (rho[i] - mean) * phi)
    names = {name: p for name, p in task.named_parameters() if name in gradient}
    expected = dict(zip(names, torch.autograd.grad(total, list(names.values()), allow_unused=True), strict=True))
    same(gradient, {n: torch.zeros_like(p) if (g := expected[n]) is None else g for n, p in names.items()}, 1e-8)
    assert action_terms(torch.ones(2, 3), torch.ones(2), torch.tensor([0.0, 1.0])).tolist() == [1.5, 0.5]


def test_times_that_are_drawn_are_unbiased() -> None:
    """The mean over the draws of J = 2 of 5 times is the action of all of them."""
    task, path, _ = update(model(PotentialTransport), objective="action_matching")
    chain = task.transport_chain(LAM)
    every = float(task._action(chain, path, torch.arange(STEPS))[0].detach())
    drawn = [float(task._action(chain, path, torch.tensor([i, j]))[0].detach()) for i in range(STEPS) for j in range(i)]
    assert sum(drawn) / len(drawn) == pytest.approx(every, rel=1e-9) and max(drawn) > min(drawn) + 1e-6


@pytest.mark.parametrize("objective", ["pinn", "action_matching"])
def test_bad_samples_are_left_out(objective: Any) -> None:
    class Half(SumReward):
        def score(self, images: Any, prompts: Any) -> Any:
            r = super().score(images, prompts)
            return torch.where(torch.arange(len(r)) < 3, r, torch.nan) if len(r) == 6 else r

    skip = {"on_bad_reward": "skip"}
    skipped = update(model(PotentialTransport), [torch.zeros(6)], skip, objective=objective, reward=Half())
    alone = update(model(PotentialTransport), [torch.zeros(3)], objective=objective)
    assert skipped[1].weight.tolist() == [1, 1, 1, 0, 0, 0]
    same(skipped[2], alone[2], 1e-8)


def test_weights_are_jarzynskis_where_they_can_be() -> None:
    def kind(**loss: Any) -> str:
        task = update(model(), **loss)[0]
        made = task.sampler.chain(task)
        assert isinstance(made, TransportChain)
        return made.weights

    assert kind() == "jarzynski" and kind(divergence="hutchinson") == "crooks"


def test_what_does_not_fit_is_refused() -> None:
    vp = PromptedNet(VariancePreserving.from_betas(zero_terminal_snr=True))
    for wrong in ({"objective": "ritz"}, {"divergence": "trace"}, {"probes": 0}, {"supervised_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            update(model(), **wrong)
    with pytest.raises(TypeError, match="NeuralTransport has none"):
        update(model(), objective="action_matching")
    with pytest.raises(ValueError, match="discrete timesteps"):
        update(vp, [["one"]], path="x1_hat")
    with pytest.raises(ValueError, match="every prompt has its own"):
        update(PromptedNet(RectifiedFlow()), [["one", "three"]])
    _, path, gradient = update(vp, [["one"]], {"samples_per_condition": 3})
    assert len(path) == 3 and gradient


def test_the_base_is_asked_once_a_rollout_for_what_action_matching_averages() -> None:
    """A rollout asks base and model K - 1 times and the base once, the average the base K times and the model once."""

    def forwards(updates: int) -> int:
        sampler = TrajectorySampler(steps=STEPS, samples_per_condition=1, rollout_every=updates)
        task = NETSTask(
            predictor=model(PotentialTransport), reward=SumReward(), lam=LAM, objective="action_matching",
            optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        ).double()  # fmt: skip
        fit(task, sampler, DENSITY * updates)
        return sampler.evaluations.forward

    one, two, three = forwards(1), forwards(2), forwards(3)
    assert one == 6 * (2 * (STEPS - 1) + 1 + STEPS + 1 + STEPS)
    assert two - one == three - two == 6 * STEPS, "a further update of a rollout asks the potential alone"

"""CMCD against plain loops, and through every way of cutting it up."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import PromptedNet, Recorder, SumReward, fit, trainer

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.interfaces import Prompts
from lightning_tilt.models import NeuralTransport, the_mixture
from lightning_tilt.models.closed_form import GaussianMixturePredictor
from lightning_tilt.process import Driftless, RectifiedFlow, VariancePreserving
from lightning_tilt.tasks import CMCDTask
from lightning_tilt.transition import DDIM
from lightning_tilt.transport import TransportChain

LAM, STEPS = 1.3, 5
PROMPTS = [["one", "three"]]
DENSITY = [torch.zeros(8)]


def prompted() -> PromptedNet:
    torch.manual_seed(0)
    net = PromptedNet(RectifiedFlow())
    for p in net.network.parameters():  # another model than its base
        p.data += 0.3 * torch.randn(p.shape)
    return net


def mixed() -> NeuralTransport:
    torch.manual_seed(1)
    net = NeuralTransport(GaussianMixturePredictor.of(the_mixture()[0]), hidden=8, layers=1)
    nn.init.normal_(net.last.weight, std=0.3)
    return net


def update(
    predictor: Any, batches: Any, sampler: dict[str, Any] | None = None, **loss: Any
) -> tuple[CMCDTask, Any, dict[str, Tensor]]:
    settings: dict[str, Any] = {"reward": SumReward(), "lam": LAM, "sigma": 0.8} | loss
    task = CMCDTask(predictor=predictor, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **settings).double()
    callback = TrajectorySampler(**({"steps": STEPS, "samples_per_condition": 4} | (sampler or {})))
    recorder = fit(task, callback, batches)
    return task, recorder.trajectories[0], recorder.gradients[0]


class Naive:
    """One path of the flow on a uniform grid, step by step; nothing shared but the networks."""

    def __init__(self, task: CMCDTask, path: Any, sample: int, kind: str = "state") -> None:
        self.predictor, self.kind = task.predictor, kind
        self.condition = path.condition[path.index[[sample]]]

    def velocity(self, model: Any, x: Tensor, t: float) -> Tensor:
        output = model.predict(x, torch.full((1,), t, dtype=torch.float64), self.condition)
        return output if model.prediction_type == "velocity" else (output - x) / (1 - t)

    def fields(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = k / STEPS
        with self.predictor.base() as base:
            v = self.velocity(base, x, t)
        w = self.velocity(self.predictor, x, t) - v
        s = -(x - t * v) / (1 - t)
        level = LAM * t / ((STEPS - 1) / STEPS)
        if self.kind == "state":
            return v, w, s, level * x.cos()
        y = x if x.requires_grad else x.detach().requires_grad_()
        with self.predictor.base() as base:
            x1 = y + (1 - t) * self.velocity(base, y, t)
        return v, w, s, torch.autograd.grad(level * x1.sin().sum(), y, create_graph=x.requires_grad)[0]

    def forward(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        v, w, s, g = self.fields(x, k)
        return x + (v + w + 0.32 * (s + g)) / STEPS, x + (v + 0.32 * s) / STEPS

    def backward(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        v, w, s, g = self.fields(x, k)
        return x - (v + w - 0.32 * (s + g)) / STEPS, x - (v - 0.32 * s) / STEPS

    def step(self, x: Tensor, y: Tensor, k: int) -> Tensor:
        """Log F/F0 - log B/B0 between X_k and X_{k+1}."""

        def log(at: Tensor, mean: Tensor) -> Tensor:
            return torch.distributions.Normal(mean, 0.8 / STEPS**0.5).log_prob(at).sum()

        (F, F0), (B, B0) = self.forward(x, k), self.backward(y, k + 1)
        return log(y, F) - log(y, F0) - log(x, B) + log(x, B0)

    def last(self, x: Tensor) -> Tensor:
        with self.predictor.base() as base:
            return x + self.velocity(base, x, (STEPS - 1) / STEPS) / STEPS


def groups(path: Any) -> list[list[int]]:
    n = len(path)
    if path.prompts is None:
        return [list(range(n))]
    return [[i for i in range(n) if path.prompts[i] == p] for p in dict.fromkeys(path.prompts)]


def naive_log_variance(task: CMCDTask, path: Any, kind: str) -> tuple[float, dict[str, Tensor]]:
    """Two passes: W without gradient, then 2/(n - 1) sum (W_i - mean) grad W_{k,i}, a step at a time."""
    x, parameters = path.states, dict(task.named_parameters())
    total, gradient = 0.0, {n: torch.zeros_like(p) for n, p in parameters.items()}
    for members in groups(path):
        naive = {i: Naive(task, path, i, kind) for i in members}
        with torch.no_grad() if kind == "state" else torch.enable_grad():
            W = torch.stack([
                sum(naive[i].step(x[k, [i]], x[k + 1, [i]], k) for k in range(STEPS - 1)).detach()  # type: ignore[union-attr]
                - LAM * x[-1, i].sin().sum()
                for i in members
            ])  # fmt: skip
        total += float(W.var()) / len(groups(path))
        for i, off in zip(members, W - W.mean(), strict=True):
            for k in range(STEPS - 1):
                term = 2 / (len(members) - 1) * off * naive[i].step(x[k, [i]], x[k + 1, [i]], k)
                for name, g in zip(parameters, torch.autograd.grad(term, list(parameters.values())), strict=True):
                    gradient[name] += g / len(groups(path))
    return total, gradient


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert set(ours) == set(theirs)
    assert max(float(g.abs().max()) for g in theirs.values()) > 1e-2
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", ["state", "x1_hat"])
@pytest.mark.parametrize(("model", "batches"), [(prompted, PROMPTS), (mixed, DENSITY)], ids=["prompts", "density"])
def test_log_variance_is_the_naive_two_pass_gradient(model: Any, batches: Any, path: Any) -> None:
    per = {} if batches is PROMPTS else {"samples_per_condition": 1}
    task, trajectory, gradient = update(model(), batches, per, path=path)
    loss, expected = naive_log_variance(task, trajectory, path)
    same(gradient, expected, 1e-8)
    assert float(task.trainer.callback_metrics["train/loss"]) == pytest.approx(loss, rel=1e-6)
    # Every step with noise was the naive one's too.
    for k in range(STEPS - 1):
        made = Naive(task, trajectory, 3, path).forward(trajectory.states[k, [3]], k)[0]
        expected_state = made + 0.8 / STEPS**0.5 * trajectory.noise[k, [3]]
        torch.testing.assert_close(trajectory.states[k + 1, [3]], expected_state.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["state", "x1_hat"])
def test_kl_is_the_gradient_through_the_whole_path(path: Any) -> None:
    task, trajectory, gradient = update(prompted(), PROMPTS, objective="kl", path=path)
    parameters = dict(task.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(trajectory)):
        naive, x = Naive(task, trajectory, i, path), trajectory.states[0, [i]].clone().requires_grad_()
        for k in range(STEPS - 1):
            y = naive.forward(x, k)[0] + 0.8 / STEPS**0.5 * trajectory.noise[k, [i]]
            total, x = total + naive.step(x, y, k), y
        total = total - LAM * naive.last(x).sin().sum()
    total = total / len(trajectory)
    expected = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    same(gradient, expected, 1e-8)
    assert float(task.trainer.callback_metrics["train/loss"]) == pytest.approx(float(total.detach()), rel=1e-6)


@pytest.mark.parametrize("objective", ["log_variance", "kl"])
def test_micro_batches_and_checkpoints_change_nothing(objective: Any) -> None:
    _, _, whole = update(prompted(), PROMPTS, objective=objective, checkpoint=False)
    for change in ({}, {"loss_micro_batch": 7}, {"loss_micro_batch": 3, "checkpoint": False}):
        same(update(prompted(), PROMPTS, objective=objective, **change)[2], whole, 1e-10)


def test_evaluations_are_one_look_a_state() -> None:
    task, path, _ = update(prompted(), PROMPTS, checkpoint=False)
    counts, pairs = task.sampler.evaluations, len(path) * STEPS
    # Rollout: model and base at all states but the last, the base alone there; loss: model and base at every state.
    assert (counts.pairs, counts.forward) == (pairs, 2 * pairs - len(path) + 2 * pairs)
    assert counts.backward == 2 * pairs and counts.vjp == 0
    known = update(mixed(), DENSITY, {"samples_per_condition": 1}, checkpoint=False)[0].sampler.evaluations
    assert known.forward == counts.forward  # w itself is asked, not a model that asks its base again


def test_graph_holds_numbers_alone_whatever_the_steps() -> None:
    """Kept for the backward pass, with checkpoints: a few numbers a sample and step, no activations."""

    def kept(steps: int, **change: Any) -> int:
        sizes: list[int] = []

        class Count(CMCDTask):
            def loss(self, trajectory: Any) -> Any:
                def pack(v: Tensor) -> Tensor:
                    sizes.append(v.numel())
                    return v

                with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
                    return super().loss(trajectory)

        net = NeuralTransport(GaussianMixturePredictor.of(the_mixture()[0]), hidden=64, layers=2)
        task = Count(predictor=net, reward=SumReward(), loss_micro_batch=16, **change)
        fit(task, TrajectorySampler(steps=steps, samples_per_condition=1), [torch.zeros(16)])
        return sum(sizes)

    few, many = kept(4), kept(16)
    assert many < few + 12 * 16 * 8 and many < kept(4, checkpoint=False) / 10


class Broken(SumReward):
    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        assert prompts is not None
        return super().score(images, prompts) * torch.tensor([torch.nan if p == "three" else 1.0 for p in prompts])


@pytest.mark.parametrize("objective", ["log_variance", "kl"])
def test_bad_samples_are_left_out(objective: Any) -> None:
    skipped = update(prompted(), PROMPTS, {"on_bad_reward": "skip"}, objective=objective, reward=Broken())
    alone = update(prompted(), [["one"]], objective=objective)
    assert skipped[1].weight.tolist() == [1] * 4 + [0] * 4
    same(skipped[2], alone[2], 1e-8)
    with pytest.raises(FloatingPointError, match="'three'"):
        update(prompted(), PROMPTS, objective=objective, reward=Broken())


def test_what_does_not_fit_is_refused() -> None:
    class Blunt(SumReward):
        is_differentiable = False

    wrong: list[tuple[Any, type[Exception], str, dict[str, Any], dict[str, Any]]] = [
        (PROMPTS, TypeError, "needs the gradient of the reward", {}, {"reward": Blunt()}),
        (PROMPTS, ValueError, "objective is one of", {}, {"objective": "variance"}),
        (PROMPTS, ValueError, "base_last_step: true", {"base_last_step": False}, {}),
        (PROMPTS, ValueError, "needs a step with noise", {"transition": DDIM(0.0)}, {}),
        (PROMPTS, ValueError, "single sample: sampler.samples_per_condition", {"samples_per_condition": 1}, {}),
    ]
    for batches, error, text, sampler, loss in wrong:
        with pytest.raises(error, match=text):
            update(prompted(), batches, sampler, **loss)
    point = mixed()
    point.process = Driftless(0.1, 1.0)
    with pytest.raises(TypeError, match="starts in Gaussian noise"):
        update(point, DENSITY)


def test_sampler_validation_and_report_see_the_same_chain() -> None:
    torch.manual_seed(2)
    net = PromptedNet(VariancePreserving.from_betas(zero_terminal_snr=True))
    task = CMCDTask(predictor=net, reward=SumReward(), lam=2.0, path="x1_hat", sigma=lambda t: 1 - t / 2)
    sampler, recorder = TrajectorySampler(steps=4), Recorder()
    run = trainer([sampler, recorder], max_steps=1, val_check_interval=1)
    run.fit(
        task,
        torch.utils.data.DataLoader(PROMPTS, batch_size=None),
        torch.utils.data.DataLoader(PROMPTS, batch_size=None),
    )
    assert {"val/reward", "train/ess", "train/log_z"} <= set(run.callback_metrics)
    chain = sampler.chain(task)
    assert isinstance(chain, TransportChain) and chain.path.lam == 2.0 and task.variant == "log_variance"
    torch.testing.assert_close(chain.stds[:-1], (1 - chain.t[:-2] / 2) * chain.t.diff()[:-1].sqrt())
    ode = sampler.variant(transition=DDIM(0.0)).chain(task)
    assert not isinstance(ode, TransportChain) and not ode.noisy_steps

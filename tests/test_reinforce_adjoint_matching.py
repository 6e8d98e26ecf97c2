"""Reinforce Adjoint Matching's bias in figures, its sibling's absence of one, and both against plain loops."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from naive_ends import PROMPTS, gradients, naive_gradient, net, ode, others, same, task_of
from torch import Tensor
from toys import fit

from lightning_tilt.interfaces import Prompts, Reward
from lightning_tilt.losses.reinforce_adjoint_matching import exact_reinforce_factor, reinforce_target
from lightning_tilt.losses.reward_groups import group_means
from lightning_tilt.models import the_mixture
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.tasks import ExactReinforceAdjointMatchingTask, ReinforceAdjointMatchingTask

BOTH = [ReinforceAdjointMatchingTask, ExactReinforceAdjointMatchingTask]


class Steps(Reward):
    """Without a gradient."""

    is_differentiable = False

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return images.flatten(1).detach().round().sum(1)


def hermite(n: int = 24) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(Z), Z ~ N(0, 1), by the eigenvectors of the Jacobi matrix."""
    root = torch.arange(1, n).double().sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(root, 1) + torch.diag(root, -1))
    return nodes, vectors[0] ** 2


def regressed(reward: Callable[[Tensor], Tensor], lam: float, law: tuple[float, float], x: float, t: float) -> float:
    """E[y | X_t = x] of the loss's own target, for X_1 ~ N(m, v), base N(0, 1), rectified flow, by quadrature."""
    (m, v), beta = law, 1 - t
    var = t * t * v + beta**2
    mu, std = m + v * t / var * (x - t * m), math.sqrt(v * beta**2 / var)
    z, w = hermite()
    x1 = (mu + std * z)[:, None]
    base = torch.full_like(x1, t / (t * t + beta**2) * x)
    y = reinforce_target(base, lam * (reward(x1[:, 0]) - 0.3), x1, torch.full_like(x1, mu))
    return float((w * y[:, 0]).sum())


def fixed_point(reward: Callable[[Tensor], Tensor], lam: float, steps: int = 200) -> tuple[float, float]:
    """(mean, variance) of the law that the ODE of its own regression reproduces: fields affine in x, moments exact."""
    law = (0.0, 1.0)
    for _ in range(60):
        m, growth = 0.0, 1.0
        for k in range(steps):
            t = (k + 0.5) / steps
            h = regressed(reward, lam, law, 0.0, t)
            g = regressed(reward, lam, law, 1.0, t) - h
            slope, shift = (g - 1) / (1 - t), h / (1 - t)  # v = (x1_hat - x)/beta
            grow = math.exp(slope / steps)
            m, growth = m * grow + shift * (grow - 1) / slope, growth * grow
        new = (m, growth**2)
        if abs(new[0] - law[0]) + abs(new[1] - law[1]) < 1e-5:
            break
        law = (0.5 * (law[0] + new[0]), 0.5 * (law[1] + new[1]))
    return law


@pytest.mark.parametrize(("lam", "found", "true"), [(0.5, 0.284, 0.333), (2.0, 0.535, 0.667)])
def test_the_fixed_point_under_tilts_a_concave_reward(lam: float, found: float, true: float) -> None:
    """r = -(x - 1)^2/2 on N(0, 1): the mean in figures; lam = 8 gives .741 for .889."""
    mean, _ = fixed_point(lambda x: -((x - 1) ** 2) / 2, lam)
    assert mean == pytest.approx(found, abs=1e-3)
    assert true == pytest.approx(lam / (1 + lam), abs=1e-3)


def test_the_fixed_point_is_exact_for_a_linear_reward() -> None:
    """r = x on N(0, 1): N(lam, 1)."""
    assert fixed_point(lambda x: x, 1.5, steps=60) == pytest.approx((1.5, 1.0), abs=1e-4)


def test_the_tilt_leaves_a_residual_that_is_second_order_in_lam() -> None:
    """At the tilt N(lam, 1)/(1 + lam) the regression asks for something else, by O(lam^2)."""
    residuals = []
    for lam in (0.02, 0.04, 0.08):
        m, v = lam / (1 + lam), 1 / (1 + lam)
        t, x = 0.5, 0.7
        x1_hat = m + v * t / (t * t * v + (1 - t) ** 2) * (x - t * m)
        residuals.append(abs(regressed(lambda x: -((x - 1) ** 2) / 2, lam, (m, v), x, t) - x1_hat))
    orders = [math.log2(b / a) for a, b in pairwise(residuals)]
    assert all(1.8 < order < 2.1 for order in orders), orders


@pytest.mark.parametrize("t", [0.3, 0.8])
@pytest.mark.parametrize("c", [-2.0, 0.5])
def test_the_sibling_is_unbiased_at_the_tilt_and_its_clip_is_not(t: float, c: float) -> None:
    """X_1 | X_t drawn from the exact posterior of p*: the mean target is x1_hat*, for any c."""
    (mixture, reward), process, lam, n = the_mixture(), RectifiedFlow(), 1.0, 200_000
    tilted, _ = mixture.tilt(reward, lam)
    time, generator = torch.tensor(t).double(), torch.Generator().manual_seed(4)
    for point in ([0.3, 0.4], [-0.8, 0.1]):
        x = torch.tensor([point]).double()
        posterior = tilted.x1_posterior(process, x, time)
        one = type(posterior)._of(posterior.log_weights[0], posterior.means[0], posterior.variances, posterior.axes)
        x1 = one.sample(n, generator)
        base = mixture.prediction(process, x, time).x1_hat.expand_as(x1)
        truth = tilted.prediction(process, x, time).x1_hat[0]
        gain = lam * (reward.score(x1, None) - c)
        y = reinforce_target(base, exact_reinforce_factor(gain), x1, base)
        assert bool(((y.mean(0) - truth).abs() < 4 * y.std(0) / n**0.5).all())
        clip = float(torch.exp(-gain).quantile(0.5).clamp(min=1.001))
        y = reinforce_target(base, exact_reinforce_factor(gain, clip), x1, base)
        clipped = (torch.exp(-gain) > clip).double().mean()
        biased = bool(((y.mean(0) - truth).abs() > 6 * y.std(0) / n**0.5).any())
        assert biased == bool(clipped > 0.01)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("baseline", ["others", "none"])
def test_gradient_is_that_of_plain_loops(cls: type, baseline: str) -> None:
    recorder = fit(task_of(cls, lam=1.3, baseline=baseline), ode(), [PROMPTS])
    path, network = recorder.trajectories[0], net()
    base = network._twin[0].double()

    def target(n: int, x1: Tensor, x1_hat: Tensor, of: Callable[..., Tensor]) -> Tensor:
        gain = 1.3 * (float(path.reward[n]) - (others(path.reward, n) if baseline == "others" else 0.0))
        if cls is ReinforceAdjointMatchingTask:
            return of(base) + gain * (x1 - x1_hat)
        return of(base) + (1 - min(math.exp(-gain), 10.0)) * (x1 - of(base))

    same(recorder.gradients[0], naive_gradient(path, network.network, target, number=1))


@pytest.mark.parametrize("cls", BOTH)
def test_micro_batches_and_checkpointing_change_nothing_and_calls_are_counted(cls: type) -> None:
    whole = gradients(cls)
    same(gradients(cls, loss_micro_batch=5), whole, 1e-10)
    same(gradients(cls, checkpoint=True), whole, 1e-10)
    sampler = ode()
    gradients(cls, sampler)
    counted, points = sampler.evaluations, 8 * 3
    assert (counted.pairs, counted.vjp) == (points, 0)
    assert counted.forward == 8 * 4 + 2 * points  # the rollout; base and model at every point
    assert counted.backward == points * 2


@pytest.mark.parametrize("cls", BOTH)
def test_a_constant_reward_leaves_the_base_where_it_is(cls: type) -> None:
    class Constant(Steps):
        def score(self, images: Tensor, prompts: Prompts) -> Tensor:
            return images.new_full((len(images),), 7.0)

    from toys import PromptedNet

    predictor = PromptedNet(RectifiedFlow()).double()
    predictor._twin[0].double()
    found = fit(task_of(cls, predictor=predictor, reward=Constant()), ode(), [PROMPTS]).gradients[0]
    assert all(float(g.abs().max()) < 1e-12 for g in found.values())


@pytest.mark.parametrize("cls", BOTH)
def test_bad_rewards_are_left_out(cls: type) -> None:
    class SomeBad(Steps):
        def score(self, images: Tensor, prompts: Prompts) -> Tensor:
            r = images.flatten(1).sum(1).detach()
            r[1::4] = torch.nan
            return r

    recorder = fit(task_of(cls, reward=SomeBad(), factor_clip=None) if cls is BOTH[1] else
                   task_of(cls, reward=SomeBad()), ode(on_bad_reward="skip"), [PROMPTS])  # fmt: skip
    path = recorder.trajectories[0]
    assert path.weight.tolist() == [1, 0, 1, 1] * 2 and path.advantage[1] == 0
    kept = path.reward[[2, 3]].mean()
    expected = path.reward[0] - kept
    found = path.advantage[0] if cls is BOTH[0] else -torch.log(1 - path.advantage[0])
    torch.testing.assert_close(found, expected)


def test_a_sample_alone_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match="samples_per_condition of at least 2"):
        fit(task_of(ReinforceAdjointMatchingTask), ode(samples_per_condition=1), [PROMPTS])
    fit(task_of(ReinforceAdjointMatchingTask, reward=Steps()), ode(samples_per_condition=1), [["a", "a"]])


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="base_last_step: false"):
        fit(task_of(ReinforceAdjointMatchingTask), ode(base_last_step=True), [PROMPTS])
    from lightning_tilt.callbacks import TrajectorySampler

    noisy = TrajectorySampler(steps=4, samples_per_condition=4)
    with pytest.raises(ValueError, match="ExactReinforceAdjointMatching, which takes them"):
        fit(task_of(ReinforceAdjointMatchingTask, path_weights="self_normalised"), noisy, [PROMPTS])
    with pytest.raises(ValueError, match="above 1, not 1"):
        task_of(ExactReinforceAdjointMatchingTask, factor_clip=1.0)
    with pytest.raises(ValueError, match="baseline is one of"):
        task_of(ReinforceAdjointMatchingTask, baseline="median")


def test_the_mean_of_the_others_is_independent_of_the_sample_and_the_mean_is_not() -> None:
    """E[(r - c) r] over groups of four is Var r with the others, 3/4 of it with all."""
    r = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    good, group = torch.ones_like(r), torch.arange(10_000).repeat_interleave(4)
    for leave_out, expected in ((True, 1.0), (False, 0.75)):
        products = ((r - group_means(r, good, group, leave_out)) * r).reshape(-1, 4).mean(1)
        assert abs(float(products.mean()) - expected) < 4 * float(products.std()) / 100

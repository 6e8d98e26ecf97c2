"""Tilt Matching: orders in h, plain loops, levels, and going on from a checkpoint."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_ends import PROMPTS, Weights, naive_gradient, net, ode, others, same, task_of
from quiet import RESUMED
from test_reinforce_adjoint_matching import Steps, hermite
from torch import Tensor
from torch.utils.data import DataLoader
from toys import fit, trainer

from lightning_tilt.interfaces import LamSchedule, Prompts
from lightning_tilt.losses.reinforce_adjoint_matching import reinforce_target
from lightning_tilt.losses.reward_groups import RewardGroups
from lightning_tilt.losses.tilt_matching import holding, tilt_weights
from lightning_tilt.models import the_mixture
from lightning_tilt.models.gaussian_mixture import GaussianMixture
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.tasks import TiltMatchingTask

VARIANTS = ["explicit", "implicit", "weighted"]


def posterior_nodes(mixture: GaussianMixture, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """X_1 | X_t = x of a mixture in the plane as nodes (n, 2) and weights (n,), by quadrature a component."""
    one, (z, w) = mixture.x1_posterior(RectifiedFlow(), x, t), hermite(30)
    grid, mass = torch.cartesian_prod(z, z), torch.outer(w, w).flatten()
    nodes = [m + (grid * v.sqrt()) @ axes.mT for m, v, axes in zip(one.means[0], one.variances, one.axes, strict=True)]
    return torch.cat(nodes), torch.cat([rho * mass for rho in one.weights[0]])


def residuals(h: float) -> dict[str, float]:
    """How far each variant's expected residual is from zero at the model of b_h, on the mixture, from a = 0."""
    mixture, reward = the_mixture()
    x, t = torch.tensor([[0.3, 0.4]]).double(), torch.tensor(0.4).double()
    x1, p = posterior_nodes(mixture, x, t)
    r = reward.score(x1, None)
    start = mixture.prediction(RectifiedFlow(), x, t).x1_hat
    aim = mixture.tilt(reward, h)[0].prediction(RectifiedFlow(), x, t).x1_hat
    w = torch.exp(h * (r + 1.1))  # / mean exp(h r), which is a number like any other
    explicit = reinforce_target(start, h * (r + 1.1), x1, start) - aim
    implicit = reinforce_target(start, w - 1, x1, aim) - aim
    weighted = w[:, None] * (x1 - aim)
    each = {"explicit": explicit, "implicit": implicit, "weighted": weighted}
    return {name: float((p[:, None] * e).sum(0).norm()) for name, e in each.items()}


def test_explicit_is_first_order_in_h_and_the_others_are_exact() -> None:
    """Esscher's formula: the residual at b_h is O(h^2) a level, so O(h) after lam/h levels; or zero."""
    h = torch.tensor([0.01, 0.02, 0.04, 0.08]).double()
    errors = [residuals(float(i)) for i in h]
    log_error = torch.tensor([math.log(e["explicit"]) for e in errors]).double()
    slope = float(((h.log() - h.log().mean()) * log_error).sum() / ((h.log() - h.log().mean()) ** 2).sum())
    assert 1.85 < slope < 2.15, slope
    assert all(e[name] < 1e-9 for e in [*errors, residuals(1.0)] for name in ("implicit", "weighted"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_that_of_plain_loops(variant: str) -> None:
    """At the first update, and at the second, where model and copy differ."""
    weights = Weights()
    task = task_of(TiltMatchingTask, variant=variant, lam=0.8, level_ess=0.9, lr=0.3)
    recorder = fit(task, ode(rollout_every=2), [PROMPTS] * 2, callbacks=[weights])
    path = recorder.trajectories[0]
    h = task.tilt_goal
    assert 0 < h < 0.8 and recorder.trajectories[1].rollout == 0
    w = (h * path.reward).exp()
    copy = net().network

    def target(n: int, x1: Tensor, x1_hat: Tensor, of: Callable[..., Tensor]) -> Tensor:
        if variant == "explicit":
            return of(copy) + h * (float(path.reward[n]) - others(path.reward, n)) * (x1 - of(copy))
        return of(copy) + (float(w[n]) / others(w, n) - 1) * (x1 - x1_hat) if variant == "implicit" else x1

    factor = torch.tensor([float(w[n]) / others(w, n) for n in range(8)]).double() if variant == "weighted" else None
    for update in (0, 1):
        model = net().network
        model.load_state_dict(weights.seen[update])
        assert (update == 0) == all(
            torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True)
        )
        expected = naive_gradient(path, model, target, number=update + 1, factor=factor)
        same(recorder.gradients[update], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_and_checkpointing_change_nothing_and_calls_are_counted(variant: str) -> None:
    found = []
    for more in ({"checkpoint": True}, {"loss_micro_batch": 5}, {}):
        sampler = ode(rollout_every=2)
        task = task_of(TiltMatchingTask, variant=variant, lam=0.8, lr=0.3, **more)
        found.append(fit(task, sampler, [PROMPTS] * 2).gradients[1])
    same(found[1], found[0], 1e-10)
    same(found[2], found[0], 1e-10)
    points = 2 * 8 * 3
    assert sampler.evaluations.pairs == points
    assert sampler.evaluations.forward == 8 * 4 + points * (1 if variant == "weighted" else 2)


def test_levels_keep_their_ess_and_end_at_lam_without_an_update_there() -> None:
    levels: list[tuple[float, float]] = []

    class Watched(TiltMatchingTask):
        def loss(self, trajectory: Any) -> Any:
            levels.append((self.tilt_level, self.tilt_goal))
            h = self.tilt_goal - self.tilt_level
            fractions = []
            for i in (slice(0, 16), slice(16, 32)):
                w = torch.exp(h * trajectory.reward[i])
                fractions.append(float(w.sum() ** 2 / (16 * (w**2).sum())))
            if self.tilt_goal < 2.0:
                assert sum(fractions) / 2 == pytest.approx(0.8, abs=1e-6)
            else:
                assert sum(fractions) / 2 >= 0.8
            return super().loss(trajectory)

    run = task_of(Watched, lam=2.0, level_ess=0.8, lr=0.01)
    recorder = fit(run, ode(rollout_every=2, samples_per_condition=16), [PROMPTS] * 40)
    assert levels[0][0] == 0 and levels[-1][1] == 2.0 and run.tilt_level == 2.0
    assert all(a == b for a, b in zip(levels[::2], levels[1::2], strict=True))  # two updates a level
    assert all(a[1] == b[0] for a, b in zip(levels[::2], levels[2::2], strict=False))
    assert 4 < len(levels) < 40 and len(recorder.gradients) == len(levels)


def test_rollouts_of_a_model_that_did_not_move_are_of_one_level() -> None:
    """Two rollouts are accumulated into one update."""
    task = task_of(TiltMatchingTask, lam=2.0, level_ess=0.9, lr=0.01)
    recorder = fit(task, ode(), [PROMPTS] * 2, accumulate_grad_batches=2, max_steps=1)
    assert [t.rollout for t in recorder.trajectories] == [0, 1] and task.tilt_level == 0.0 < task.tilt_goal


@pytest.mark.parametrize("variant", ["explicit", "implicit"])
def test_a_constant_reward_changes_nothing(variant: str) -> None:
    class Constant(Steps):
        def score(self, images: Tensor, prompts: Prompts) -> Tensor:
            return images.new_full((len(images),), 800.0)

    task = task_of(TiltMatchingTask, variant=variant, reward=Constant())
    found = fit(task, ode(), [PROMPTS]).gradients[0]
    assert all(float(g.abs().max()) < 1e-12 for g in found.values()) and task.tilt_goal == 1.0


def test_weights_are_of_the_prompt_and_free_of_overflow() -> None:
    reward = torch.tensor([1000.0, 1001.0, -3.0, -4.0]).double()
    groups = RewardGroups(reward, torch.ones(4).double(), torch.tensor([0, 0, 1, 1]), slice(0, 4))
    e = math.exp(2.0)
    torch.testing.assert_close(tilt_weights(groups, 2.0), torch.tensor([1 / e, e, e, 1 / e]).double())
    total, n = groups.ess(2.0).tolist()
    assert n == 2 and total == pytest.approx(2 * (1 + e) ** 2 / (2 * (1 + e * e)))


def test_bad_rewards_are_left_out_of_levels_and_sums() -> None:
    class SomeBad(Steps):
        def score(self, images: Tensor, prompts: Prompts) -> Tensor:
            r = images.flatten(1).sum(1).detach() - 2000
            r[1::4] = torch.nan
            return r

    for variant in VARIANTS:
        task = task_of(TiltMatchingTask, variant=variant, reward=SomeBad(), lam=50.0)
        recorder = fit(task, ode(on_bad_reward="skip"), [PROMPTS])
        path = recorder.trajectories[0]
        assert path.advantage[1] == 0 and path.weight[1] == 0 and 0 < task.tilt_goal < 50.0
        assert all(bool(torch.isfinite(g).all()) for g in recorder.gradients[0].values())
        kept = path.reward[[2, 3]] - path.reward[0]
        if variant != "explicit":
            torch.testing.assert_close(1 + path.advantage[0], 1 / (task.tilt_goal * kept).exp().mean())


def test_the_copy_is_held_without_touching_graphs_or_gradients() -> None:
    predictor = net()
    other = {n: torch.zeros_like(p) for n, p in predictor.trained_parameters().items()}
    before = {n: p.detach().clone() for n, p in predictor.trained_parameters().items()}
    x = torch.randn(3, 4, dtype=torch.float64)
    output = predictor.network(x).square().sum()
    with pytest.raises(KeyError), torch.no_grad(), holding(predictor, other) as held:
        assert float(held.network(x).abs().max()) == 0
        raise KeyError
    output.backward()
    again = net()
    again.network(x).square().sum().backward()
    for (name, p), q in zip(predictor.trained_parameters().items(), again.network.parameters(), strict=True):
        assert torch.equal(p, before[name]) and torch.equal(p.grad, q.grad)


@RESUMED  # the loader starts anew; its batches are all the same
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_in_the_middle_of_a_level(variant: str, tmp_path: Path) -> None:
    """Five updates, levels of two: at once, and with a checkpoint after three of them."""

    def run(updates: int, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        task = task_of(TiltMatchingTask, variant=variant, lam=3.0, lr=0.05)
        runner = trainer([ode(rollout_every=2, exact_resume=False)], max_steps=updates)
        runner.fit(task, DataLoader([PROMPTS] * 8, batch_size=None), **kwargs)
        runner.save_checkpoint(tmp_path / "last.ckpt")
        return task

    whole, _ = run(5), run(3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["loss"]["tilt_matching"]
    assert saved["level"] > 0 and bool(saved["copy"]) == (variant != "weighted")
    resumed = run(5, ckpt_path=tmp_path / "last.ckpt")
    assert (resumed.tilt_level, resumed.tilt_goal) == (whole.tilt_level, whole.tilt_goal)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_levels_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="without a warm-up"):
        task_of(TiltMatchingTask, lam=LamSchedule(1.0, warmup=3))
    with pytest.raises(ValueError, match="must be positive"):
        task_of(TiltMatchingTask, lam=-1.0)
    with pytest.raises(ValueError, match="variant is one of"):
        task_of(TiltMatchingTask, variant="both")
    with pytest.raises(ValueError, match="fraction in"):
        task_of(TiltMatchingTask, level_ess=1.0)
    with pytest.raises(ValueError, match="buffer_size: 1"):
        fit(task_of(TiltMatchingTask), ode(buffer_size=2, rollout_every=2), [PROMPTS])
    with pytest.raises(ValueError, match=r"leave trainer\.min_steps out"):
        fit(task_of(TiltMatchingTask), ode(), [PROMPTS], min_steps=1)
    with pytest.raises(ValueError, match="path_weights: none"):
        from lightning_tilt.callbacks import TrajectorySampler

        noisy = TrajectorySampler(steps=4, samples_per_condition=4)
        fit(task_of(TiltMatchingTask, path_weights="clipped"), noisy, [PROMPTS])
    assert task_of(TiltMatchingTask, variant="weighted").variant == "weighted"


def test_reward_without_gradient_tilts_one_gaussian_exactly() -> None:
    """A whole run on N(0, I) and r = (1, -1).x, seen without gradient: the mean of the ODE's samples moves by lam."""
    from lightning_tilt.callbacks import TrajectorySampler
    from lightning_tilt.models import GaussianMixturePredictor, NeuralTilt
    from lightning_tilt.transition import DDIM

    class Line(Steps):
        def score(self, images: Tensor, prompts: Prompts) -> Tensor:
            return (images[:, 0] - images[:, 1]).detach()

    base = GaussianMixturePredictor([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    task = TiltMatchingTask(
        predictor=NeuralTilt(base, hidden=32, layers=1), reward=Line(), lam=0.7, variant="explicit", level_ess=0.8,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
    )  # fmt: skip
    sampler = TrajectorySampler(
        steps=40, samples_per_condition=1, rollout_every=50, transition=DDIM(ddim_eta=0.0), base_last_step=False, seed=0
    )
    fit(task, sampler, [torch.zeros(512)] * 250, gradient_clip_val=1.0)
    assert task.tilt_level == 0.7
    end = sampler.rollout(task, torch.zeros(4000), stream="report", number=0).end.mean(0)
    torch.testing.assert_close(end, torch.tensor([0.7, -0.7]), rtol=0, atol=0.1)


def test_one_update_of_lora_adapters_with_prompts() -> None:
    """The digits' model of SD 1.5's kind, with ink that is seen without its gradient."""
    from lightning_tilt.models import StableDiffusion
    from lightning_tilt.rewards import Ink

    class Seen(Ink):
        is_differentiable = False

        def score(self, images: Tensor, prompts: Prompts = None) -> Tensor:
            return super().score(images.detach(), prompts)

    for variant in VARIANTS:
        predictor = StableDiffusion("lightning_tilt/assets/digits-sd15", rank=2)
        task = TiltMatchingTask(
            predictor=predictor, reward=Seen(), lam=40.0, variant=variant, t_min=0.1,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )  # fmt: skip
        before = {n: p.detach().clone() for n, p in predictor.trained_parameters().items()}
        sampler = ode(steps=2, samples_per_condition=3)
        recorder = fit(task, sampler, [["one", "the digit 2"]])
        assert recorder.trajectories[0].prompts == ["one"] * 3 + ["the digit 2"] * 3
        assert 0 < task.tilt_goal <= 40.0
        moved = [n for n, p in predictor.trained_parameters().items() if not torch.equal(p, before[n])]
        assert moved and all("lora" in n for n in moved)

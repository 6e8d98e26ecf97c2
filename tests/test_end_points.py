"""Regressions at noised end points: times, weights of times, micro-batches, buffers, and Stable Diffusion's kind."""

from typing import Any

import pytest
import torch
from end_points import INTERPOLANTS, one_fit
from torch import Tensor
from toys import PromptedNet, SumReward

from lightning_tilt.assets import folder
from lightning_tilt.losses.end_points import regression_terms
from lightning_tilt.losses.times import Times, time_weight
from lightning_tilt.models import StableDiffusion
from lightning_tilt.noise import keyed_normal_rows
from lightning_tilt.process import RectifiedFlow, VariancePreserving
from lightning_tilt.rewards import Ink
from lightning_tilt.tasks import EfficientAdjointMatchingTask, MixedScoreMatchingTask, NovelScoreMatchingTask
from lightning_tilt.transition import DDIM

SAMPLINGS = ("uniform", "low_discrepancy", "importance")


def net(process: Any = None) -> PromptedNet:
    torch.manual_seed(3)
    predictor = PromptedNet(process or RectifiedFlow())
    predictor.network[2].weight.data += 0.3
    return predictor


@pytest.mark.parametrize("process", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_weights_of_times(process: Any) -> None:
    """Against their definitions by alpha, beta and eta."""
    t = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    alpha, beta, eta = process.alpha(t), process.beta(t), process.eta(t)
    expected = {"score": alpha**2 / beta**4, "control": 2 * eta * alpha**2 / beta**4, "uniform": (alpha / beta) ** 2}
    for kind, value in expected.items():
        torch.testing.assert_close(time_weight(process, t, kind), value, rtol=1e-9, atol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_times_keep_the_integral(sampling: Any) -> None:
    """mean(f/q) is the mean of f over [t_min, t_max] within 4 s.e., for any learnt density; all times are within."""
    times, u = Times(sampling, 0.1, 0.7), torch.rand(20_000, dtype=torch.float64)
    if sampling == "importance":
        centres = 0.1 + 0.6 * (torch.arange(32) + 0.5) / 32
        times.learn(times.update(centres.double(), centres.double() ** -2))
        assert float(times.density().sum()) == pytest.approx(1) and times.density()[0] > 5 * times.density()[-1]
    t, factor = times(u, 0.3)
    assert t.min() >= 0.1 and t.max() <= 0.7
    values = factor * t**-2
    exact = (1 / 0.1 - 1 / 0.7) / 0.6
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 20_000**0.5
    spread = float(values.std()) / exact
    assert spread < 0.2 if sampling == "importance" else spread > 0.5
    if sampling == "low_discrepancy":
        few = times(u[:64], 0.9)[0].sort().values.diff()
        assert few.max() < 3 * 0.6 / 64  # 64 independent ones leave gaps twice as wide


def test_the_importance_density_learns_root_mean_squares() -> None:
    times = Times("importance", 0.0, 0.5)
    times.learn(times.update(torch.tensor([0.0, 0.001, 0.499]), torch.tensor([3.0, 4.0, 2.0])))
    assert times.moments[0] == pytest.approx(12.5) and times.moments[31] == 4.0 and times.moments[1] == 0
    times.learn(times.update(torch.tensor([0.0]), torch.tensor([5.0])))
    assert times.moments[0] == pytest.approx(0.99 * 12.5 + 0.01 * 25)
    # Even until all bins have been seen.
    assert times(torch.tensor([0.25], dtype=torch.float64), 0.0)[0].tolist() == [0.125]
    with pytest.raises(ValueError, match="0 <= t_min < t_max < 1"):
        Times("uniform", 0.5, 0.5)
    with pytest.raises(ValueError, match="time_sampling is one of"):
        Times("sobol", 0.1, 0.9)  # type: ignore[arg-type]


def test_regression_terms() -> None:
    x, y, w = torch.randn(3, 2, 2), torch.randn(3, 2, 2), torch.rand(3)
    expected = [float(w[i]) / 2 * sum(float(d) ** 2 for d in (x - y)[i].flatten()) for i in range(3)]
    assert regression_terms(x, y, w).tolist() == pytest.approx(expected, rel=1e-5)


def gradients(kind: type = NovelScoreMatchingTask, batches: int = 1, **kwargs: Any) -> tuple[Tensor, Any, Any]:
    sampler = {"samples_per_condition": 3} | kwargs.pop("sampler", {})
    task, record = one_fit(kind, net(), SumReward(), [["one", "three"]] * batches, sampler=sampler, **kwargs)
    return torch.cat([g.flatten() for g in record.gradients[-1].values()]), task, record


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gradient_does_not_depend_on_micro_batches_or_checkpointing(sampling: str, guidance: float) -> None:
    """Two updates, so that what is learnt of the times in the first is part of the second."""
    common: dict[str, Any] = {
        "batches": 2, "noisings": 30, "time_sampling": sampling, "path_weights": "clipped", "lam": 2.0,
        "sampler": {"guidance_scale": guidance}, "kind": MixedScoreMatchingTask, "t_min": 0.1,
    }  # fmt: skip
    whole, one, _ = gradients(**common)
    cut, two, _ = gradients(**common, loss_micro_batch=7, checkpoint=True)
    assert whole.abs().max() > 0
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(two.least_variance.moments, one.least_variance.moments, rtol=1e-10, atol=1e-12)


def test_the_optimal_mix_and_the_importance_density_are_saved() -> None:
    _, task, _ = gradients(MixedScoreMatchingTask, noisings=50, time_sampling="importance", t_min=0.1)
    state = {k: v for k, v in task.state_dict().items() if not k.startswith("predictor")}
    assert sorted(state) == ["least_variance.moments", "times.moments"]
    assert all(v.abs().sum() > 0 for v in state.values())


def test_noisings_are_keyed_and_every_update_has_its_own() -> None:
    _, task, record = gradients(batches=2, noisings=2, sampler={"rollout_every": 2})
    (first, _), (second, _) = task.seen
    for number, points in ((1, first), (2, second)):
        eps = keyed_normal_rows(task.sampler.seed, "renoise", number, range(12), (2,)).double()
        alpha, beta = points.t[:, None], 1 - points.t[:, None]
        torch.testing.assert_close(points.x, alpha * record.trajectories[0].end.repeat(2, 1) + beta * eps)
    assert torch.equal(first.x1, second.x1) and not torch.equal(first.t, second.t)
    again = gradients(batches=2, noisings=2, sampler={"rollout_every": 2})[1].seen[1][0]
    assert torch.equal(again.x, second.x)


def test_samples_of_the_whole_buffer_keep_their_weights_and_scores() -> None:
    """Each drawn sample is one of the rollouts', with the weight and end score that it was given there."""
    _, task, record = gradients(
        batches=4, path_weights="self_normalised", sampler={"buffer_size": 2, "rollout_every": 2, "replay_samples": 8}
    )
    last = record.trajectories[-1]
    assert len(last) == 8 and len(last.sample) == 8
    fresh = task.sampler._buffer._rollouts
    everything = torch.cat([f.end for f in fresh])
    for i in range(8):
        (j,) = (everything == last.end[i]).all(1).nonzero().flatten().tolist()
        source, k = fresh[j // 6], j % 6
        assert last.importance[i] == source.importance[k] and torch.equal(last.end_score[i], source.end_score[k])
        assert last.prompts is not None and source.prompts is not None and last.prompts[i] == source.prompts[k]


def test_end_points_of_an_ode_are_the_models_own() -> None:
    ode = {"transition": DDIM(ddim_eta=0.0)}
    with pytest.raises(ValueError, match="the samples would be the base's"):
        gradients(sampler=ode)
    gradient, _, record = gradients(sampler=ode | {"base_last_step": False})
    assert gradient.abs().max() > 0 and record.trajectories[0].importance is None


@pytest.mark.parametrize(("name", "value"), [("noisings", 0), ("time_weight", "snr"), ("t_max", 1.0)])
def test_what_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        NovelScoreMatchingTask(predictor=net(), reward=SumReward(), **{name: value})


def test_efficient_adjoint_matching_is_novel_score_matching_with_many_noisings() -> None:
    mine, task, _ = gradients(EfficientAdjointMatchingTask)
    same, _, _ = gradients(noisings=8)
    assert task.noisings == 8 and torch.equal(mine, same)


def test_efficient_adjoint_matching_of_stable_diffusions_kind() -> None:
    """Two updates of the embedded digits by four steps of an ODE: times are nodes, all is counted, LoRA moves."""
    predictor = StableDiffusion(folder("digits-sd15"), rank=2)
    assert isinstance(predictor.process, VariancePreserving)
    before = {k: v.clone() for k, v in predictor.trained_parameters().items()}

    class Task(EfficientAdjointMatchingTask):
        def target(self, points: Any) -> Tensor:
            nodes = (1 - points.t) * 1000
            assert (nodes - nodes.round()).abs().max() < 1e-9 and nodes.min() >= 1 and nodes.max() <= 1000
            return super().target(points)

    from toys import fit

    from lightning_tilt.callbacks import TrajectorySampler

    task = Task(predictor=predictor, reward=Ink(), lam=40.0, noisings=3, loss_micro_batch=4)
    sampler = TrajectorySampler(
        steps=4, samples_per_condition=2, transition=DDIM(ddim_eta=0.0), base_last_step=False, rollout_every=2
    )
    record = fit(task, sampler, [["three"]] * 2)
    path = record.trajectories[0]
    assert path.end_score.shape == path.end.shape and path.end_score.isfinite().all()
    # Tweedie at the data: the base's score pulls on a sample about as hard as its own scale says.
    assert 0.1 < float(path.end_score.std()) < 100
    pairs = 2 * 2 * 3
    assert task.sampler.evaluations.forward == 2 * 4 + 2 + pairs and task.sampler.evaluations.pairs == pairs
    assert any(not torch.equal(before[k], v) for k, v in predictor.trained_parameters().items())
    assert all(bool(v.isfinite().all()) for v in predictor.trained_parameters().values())

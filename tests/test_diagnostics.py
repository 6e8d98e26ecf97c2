"""Diagnostics of a run: work from both sides, ESS, densities; that training does not notice; where pictures go."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from toys import PromptedNet, Recorder, SumReward, fit, trainer

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.callbacks.adjoint_norm import AdjointNorm
from lightning_tilt.callbacks.density_picture import DensityPicture, mass_levels
from lightning_tilt.callbacks.diagnostic import log_figure
from lightning_tilt.callbacks.ess_curves import EssCurves, partial_log_weights
from lightning_tilt.callbacks.target_variance import TargetVariance
from lightning_tilt.callbacks.work_histograms import WorkHistograms, noised_back, numbers_of
from lightning_tilt.identities import ess
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt, the_mixture
from lightning_tilt.process import Cosine, Driftless, RectifiedFlow
from lightning_tilt.rewards import LinearReward
from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.energies import DoubleWell4
from lightning_tilt.tasks import AdjointMatchingTask, CMCDTask, NovelScoreMatchingTask, TiltMatchingTask
from lightning_tilt.transition import Brownian, ExactGaussian

FLOW = RectifiedFlow()
LAM, B = 1.3, [0.5, -1.0]


class Shifted(Density):
    """exp(-|x - 1|^2/(2 s^2)) in d dimensions, s = .5."""

    def __init__(self, d: int = 2) -> None:
        super().__init__()
        self.d, self.log_z = d, d / 2 * math.log(2 * math.pi * 0.25)

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - 1) ** 2).sum(1) / (2 * 0.25)

    def reference(self, n: int, seed: int = 0) -> torch.Tensor:
        return 1 + 0.5 * torch.randn(n, self.d, generator=torch.Generator().manual_seed(seed))


def net(base: Any, scale: float = 0.05) -> NeuralTilt:
    """A tuned model that is a little off its base everywhere."""
    torch.manual_seed(4)
    predictor = NeuralTilt(base, hidden=8, layers=1)
    for p in predictor.trained_parameters().values():
        torch.nn.init.normal_(p, std=scale)
    return predictor


def mixture() -> NeuralTilt:
    return net(GaussianMixturePredictor.of(the_mixture()[0]))


def look(tmp_path: Path, task: Any, diagnostic: Any, updates: int = 1, **sampler: Any) -> dict[str, Any]:
    callback = TrajectorySampler(**({"steps": 8, "samples_per_condition": 1, "seed": 3} | sampler))
    fit(task, callback, [torch.zeros(4)] * updates, callbacks=[diagnostic], default_root_dir=tmp_path)
    assert (tmp_path / f"{diagnostic.name}.png").stat().st_size > 0
    found: dict[str, Any] = json.loads((tmp_path / f"{diagnostic.name}.json").read_text())
    assert found["update"] == updates
    return found


def frozen(task_class: Any, predictor: Any, reward: Any, **kwargs: Any) -> Any:
    kwargs = {"checkpoint": False, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0)} | kwargs
    return task_class(predictor, reward, **kwargs)


# Work ----------------------------------------------------------------------------------------------------------------


def close(estimate: dict[str, float], exact: float) -> bool:
    return abs(estimate["mean"] - exact) < 4 * estimate["se"]


EXACT_CHAINS = {
    "flow": (lambda: GaussianBase([2]), ExactGaussian()),
    "cosine": (lambda: GaussianBase([2], process=Cosine()), ExactGaussian()),
    "driftless": (lambda: GaussianBase([2], process=Driftless(0.2, 1.5)), Brownian()),
}


@pytest.mark.parametrize("name", EXACT_CHAINS)
def test_both_sides_know_log_z_where_the_chain_is_exact(tmp_path: Path, name: str) -> None:
    """At 8 steps, of a model that is neither base nor tilt: bounds hold, Bennett and both one-sided estimates agree."""
    base, transition = EXACT_CHAINS[name]
    density = Shifted()
    task = frozen(AdjointMatchingTask, net(base(), 0.25), density)
    look_at = WorkHistograms(4000, micro_batch=1500)
    found = look(tmp_path, task, look_at, transition=transition)
    assert found["ends"] == "exact" and found["exact"] == density.log_z
    assert close(found["log_z_bennett"], density.log_z) and found["log_z_bennett"]["se"] < 0.05
    assert found["elbo"]["mean"] < density.log_z - 4 * found["elbo"]["se"]
    assert found["eubo"]["mean"] > density.log_z + 4 * found["eubo"]["se"]
    chain, path = task.sampler.chain(task, count=False), look_at.paths(task)
    ends = path.__class__(**{**path.__dict__, "states": path.states.clone()})
    ends.states[-1] = density.reference(4000, 9)
    noised = noised_back(task, chain, ends)
    inverse = torch.exp(-chain.log_weights(task.predictor, noised, 1.0)).double()  # E_Q[1/w] = 1/Z
    assert abs(float(inverse.mean()) - math.exp(-density.log_z)) < 4 * float(inverse.std()) / math.sqrt(4000)


def test_backward_states_have_the_noised_laws_and_the_base_makes_the_last_step(tmp_path: Path) -> None:
    task = frozen(AdjointMatchingTask, mixture(), the_mixture()[1])
    look_at = WorkHistograms(3000)
    look(tmp_path, task, look_at)
    chain, path = task.sampler.chain(task, count=False), look_at.paths(task)
    noised = noised_back(task, chain, path)
    alpha, beta = chain.process.alpha(chain.t), chain.process.beta(chain.t)
    for k in (0, 3, 7):
        excess = noised.states[k] - alpha[k].float() * path.end
        assert abs(float(excess.std() / beta[k]) - 1) < 4 / math.sqrt(2 * 6000)
    with task.predictor.base() as base, torch.no_grad():
        mean = chain.mean(base, noised.condition[noised.index])(noised.states[7], 7)
    torch.testing.assert_close(noised.end, mean)
    torch.testing.assert_close(noised.reward, the_mixture()[1].score(noised.end, None))


def test_without_reference_samples_ends_are_resampled_and_other_chains_go_forward_alone(tmp_path: Path) -> None:
    task = frozen(AdjointMatchingTask, PromptedNet(FLOW), SumReward(), lam=0.7)
    diagnostic = WorkHistograms(60, prompts=["one", "seven", "eleven"])
    callback = TrajectorySampler(steps=4, samples_per_condition=1, seed=3)
    fit(task, callback, [["one"]], callbacks=[diagnostic], default_root_dir=tmp_path)
    found = json.loads((tmp_path / "work.json").read_text())
    assert found["ends"] == "resampled" and found["log_z_bennett"]["n"] == 120 and found["exact"] is None
    cmcd = frozen(CMCDTask, net(GaussianBase([2])), Shifted())
    found = look(tmp_path, cmcd, WorkHistograms(100))
    assert "eubo" not in found and found["ends"] is None and math.isfinite(found["elbo"]["mean"])


def test_numbers_of_prompts_are_means_of_theirs() -> None:
    sets = [torch.randn(500, dtype=torch.float64) + shift for shift in (0.0, 3.0)]
    both, each = numbers_of(sets, sets), [numbers_of([s], [s]) for s in sets]
    for key in ("elbo", "eubo", "log_z_forward", "log_z_bennett"):
        assert both[key]["mean"] == pytest.approx((each[0][key]["mean"] + each[1][key]["mean"]) / 2)


# ESS -----------------------------------------------------------------------------------------------------------------


def test_partial_weights_are_plain_sums(tmp_path: Path) -> None:
    task = frozen(AdjointMatchingTask, mixture(), the_mixture()[1], lam=LAM)
    diagnostic = EssCurves(50, micro_batch=20)
    callback, recorder = TrajectorySampler(steps=8, samples_per_condition=1, seed=3), Recorder()
    fit(task, callback, [torch.zeros(6)] * 3, callbacks=[diagnostic, recorder], default_root_dir=tmp_path)
    found = json.loads((tmp_path / "ess.json").read_text())
    assert found["ess"] == pytest.approx([ess(p.log_w) for p in recorder.trajectories]) and found["updates"] == [
        1,
        2,
        3,
    ]
    chain, path = task.sampler.chain(task, count=False), diagnostic.paths(task)
    with torch.no_grad(), task.predictor.base() as base:
        mean = chain.mean(base, path.condition[path.index])
        means = torch.stack([mean(path.states[k], k) for k in range(8)])
    log_w = partial_log_weights(chain, path, means)
    total = torch.zeros(50)
    for k in range(8):
        torch.testing.assert_close(log_w[k], total)
        std = float(chain.stds[k])
        if std > 0:
            for n in range(50):
                z = path.noise[k, n]
                u = (path.states[k + 1, n] - std * z - means[k, n]) / std
                total[n] -= float(u @ z + u @ u / 2)
    torch.testing.assert_close(log_w[8], total + LAM * path.reward)
    torch.testing.assert_close(log_w[8], chain.log_weights(task.predictor, path, LAM))
    assert found["ess_over_time"] == pytest.approx([ess(w) for w in log_w], rel=1e-5) and found["t"][0] == 0


def test_ess_of_other_chains_and_of_none(tmp_path: Path) -> None:
    found = look(tmp_path, frozen(CMCDTask, net(GaussianBase([2])), Shifted()), EssCurves(50))
    assert len(found["ess_over_time"]) == 1 and 0 < found["ess_over_time"][0] <= 1
    nsm = frozen(NovelScoreMatchingTask, mixture(), the_mixture()[1])
    found = look(tmp_path, nsm, EssCurves(50), base_last_step=False)
    assert found["ess"] == [] and "t" not in found


# Densities -----------------------------------------------------------------------------------------------------------


def test_levels_hold_their_mass() -> None:
    """A normal density in the plane has the fraction q of its mass where it is above (1 - q)/(2 pi)."""
    x = torch.linspace(-6, 6, 400, dtype=torch.float64)
    p = torch.exp(-(x[:, None] ** 2 + x**2) / 2) / (2 * math.pi)
    assert [2 * math.pi * v for v in mass_levels(p, [0.5, 0.95])] == pytest.approx([0.5, 0.05], rel=0.02)


def test_densities_are_drawn_in_the_plane_in_space_and_for_particles(tmp_path: Path) -> None:
    flat = look(tmp_path / "2", frozen(AdjointMatchingTask, mixture(), the_mixture()[1]), DensityPicture(300))
    assert flat["exact"]["mean"] == pytest.approx([-0.01, 0.70], abs=4 * 1.5 / math.sqrt(300))
    assert flat["tuned"]["n"] == 300 and flat["base"]["mean"] != flat["tuned"]["mean"]
    task = frozen(AdjointMatchingTask, net(GaussianBase([5])), Shifted(5))
    space = look(tmp_path / "5", task, DensityPicture(200), transition=ExactGaussian())
    assert len(space["exact"]["mean"]) == 5 and space["exact"]["energy"] == pytest.approx(2.5, abs=0.5)
    dw4 = frozen(AdjointMatchingTask, net(GaussianBase([4, 2], scale=2.0, mean_free=True), 0.0), DoubleWell4())
    particles = look(tmp_path / "4", dw4, DensityPicture(200), transition=ExactGaussian(0.25))
    assert particles["exact"]["energy"] == pytest.approx(-22.5, abs=1.0)
    other = frozen(AdjointMatchingTask, net(GaussianBase([2])), LinearReward(B))
    with pytest.raises(TypeError, match="none in closed form"):
        look(tmp_path, other, DensityPicture(10), transition=ExactGaussian())


# A run that is looked at ---------------------------------------------------------------------------------------------


def everything() -> list[Any]:
    return [TargetVariance(8, 2, (0.3,), 2, every_n_updates=2), AdjointNorm(8, every_n_updates=2),
            WorkHistograms(20, every_n_updates=2), EssCurves(8, every_n_updates=2),
            DensityPicture(8, every_n_updates=2)]  # fmt: skip


@pytest.mark.parametrize("task_class", [AdjointMatchingTask, NovelScoreMatchingTask, TiltMatchingTask])
def test_training_does_not_notice(tmp_path: Path, task_class: Any) -> None:
    """The same gradients, counts of evaluations, modes and random numbers, bit for bit, after looks at every update."""
    seen = []
    looks = everything() if task_class is AdjointMatchingTask else [TargetVariance(8, 2, (0.3,), 2, every_n_updates=2)]
    for callbacks in ([], looks):
        torch.manual_seed(7)
        more = {"level_ess": 0.99} if task_class is TiltMatchingTask else {"checkpoint": False}
        task = task_class(mixture(), the_mixture()[1], optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **more)
        callback = TrajectorySampler(steps=5, samples_per_condition=1, seed=3)
        recorder = fit(task, callback, [torch.zeros(16)] * 3, callbacks=callbacks, default_root_dir=tmp_path)
        modes = [m.training for m in task.modules()]
        seen.append((recorder.gradients, copy.copy(callback.evaluations), modes, torch.rand(3).tolist()))
    (gradients, *rest), (others, *rest_looked_at) = seen
    assert len(gradients) == len(others) == 3 and rest == rest_looked_at
    for a, b in zip(gradients, others, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    # A look on the way, which is kept, and one at the end.
    updates = [json.loads((tmp_path / f"target_variance{n}.json").read_text())["update"] for n in (".1", "")]
    assert updates == [2, 3] and not (tmp_path / "target_variance.2.png").exists()


def test_prompts_and_guidance_are_looked_at(tmp_path: Path) -> None:
    task = frozen(AdjointMatchingTask, PromptedNet(FLOW), SumReward(), lam=0.7)
    callback = TrajectorySampler(steps=4, samples_per_condition=2, seed=3, guidance_scale=1.5)
    looks = [TargetVariance(8, 2, (0.5,), 2), EssCurves(8), WorkHistograms(8)]
    fit(task, callback, [["one", "seven"]], callbacks=looks, default_root_dir=tmp_path)
    found = json.loads((tmp_path / "target_variance.json").read_text())
    assert found["outer"] == 8 and found["times"][0]["gradient"]["variance"] > 0
    assert looks[0].paths(task).prompts == ["one"] * 4 + ["seven"] * 4


class Host(lightning.LightningModule):
    """No loss."""


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="EssCurves looks at a loss, and Host is none"):
        EssCurves().setup(trainer([]), Host(), "fit")
    with pytest.raises(ValueError, match="every_n_updates must be at least 1"):
        EssCurves(every_n_updates=0)
    task = frozen(NovelScoreMatchingTask, mixture(), the_mixture()[1])
    with pytest.raises(ValueError, match="base_last_step: true"):
        look(tmp_path, task, WorkHistograms(10), base_last_step=False)


# Loggers -------------------------------------------------------------------------------------------------------------


class Board(TensorBoardLogger):
    """A TensorBoard without TensorBoard."""

    def __init__(self) -> None:
        self.figures: list[Any] = []

    @property
    def experiment(self) -> Any:
        return self

    def add_figure(self, tag: str, figure: Any, step: int, close: bool) -> None:
        self.figures.append((tag, len(figure.axes), step))


class Weights(WandbLogger):
    """Weights & Biases without either."""

    def __init__(self) -> None:
        self.images: list[Any] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images.append((key, images, step))


def test_loggers_that_take_pictures_are_given_them(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure, board, weights = Figure(), Board(), Weights()
    figure.subplots(1, 2)
    log_figure([board, weights], "ess", figure, tmp_path / "ess.png", 5)
    assert board.figures == [("diagnostics/ess", 2, 5)]
    assert weights.images == [("diagnostics/ess", [str(tmp_path / "ess.png")], 5)]

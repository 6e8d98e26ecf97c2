# %% [markdown]
# # 01 What tilting is
#
# A model samples a law $p_\mathrm{base}$, a reward $r$ says what is liked, a number $\lambda$ says how much. Together
# they name one law, the *tilt*
#
# $$p^*(x) = \frac{1}{Z}\, p_\mathrm{base}(x)\, e^{\lambda r(x)}, \qquad Z = \mathbb{E}_\mathrm{base}[e^{\lambda r}].$$
#
# It is neither the maximum of the reward nor a compromise by hand: it is the law that earns most reward at a given
# distance from the base. Here everything is in two dimensions, where the tilt is known in closed form, and where
# every loss of this package can be watched on its way to it.

# %%
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from _common import show, trainer
from matplotlib.figure import Figure

from lightning_tilt import DDIM, ExactGaussian, Predictor, TrajectorySampler, tasks
from lightning_tilt.callbacks.diagnostic import undisturbed
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.identities import expectation, log_partition, mean
from lightning_tilt.metrics import noise_floor, squared_sliced_wasserstein2
from lightning_tilt.models import (
    GaussianBase,
    GaussianMixturePredictor,
    NeuralTilt,
    NeuralTransport,
    the_mixture,
)
from lightning_tilt.rewards.mixture_density import TiltedMixture

mixture, reward = the_mixture()  # three Gaussians, and r(x) = -(x - c)' A (x - c)/2
tilted, log_z = mixture.tilt(reward, 1.0)  # a quadratic reward makes Gaussians of Gaussians: the truth
LAM = 1.0

# %% [markdown]
# ## The truth, and the oldest way to it
#
# Base samples that are weighted by $e^{\lambda r}$ are samples of the tilt: $Z$ and every mean under $p^*$ follow,
# each with its standard error. That costs no training, but nothing new is ever drawn, and where the reward asks for
# what the base rarely makes, few samples carry all the weight. The effective sample size (ESS) says how many do.

# %%
x = mixture.sample(20_000, torch.Generator().manual_seed(0))
log_w = LAM * reward.score(x, None)
found = log_partition(log_w)
means = [expectation(x[:, i], log_w) for i in range(2)]
truth = tilted.weights @ tilted.means
print(f"log Z  reweighted {found.mean:.4f} +- {found.se:.4f}    closed form {float(log_z):.4f}")
for name, weighted, exact in zip(("E*[x_1]", "E*[x_2]"), means, truth.tolist(), strict=True):
    print(f"{name}  reweighted {weighted.mean:.4f} +- {weighted.se:.4f}    closed form {exact:.4f}")
print(f"ESS {found.ess:.2f}: of 20,000 base samples, the weights leave {found.ess * 20_000:.0f}")
assert abs(found.mean - float(log_z)) < 4 * found.se
assert all(abs(found.mean - exact) < 4 * found.se for found, exact in zip(means, truth.tolist(), strict=True))

# %%
axis_values = torch.linspace(-4, 4, 161, dtype=torch.float64)
grid = torch.stack(torch.meshgrid(axis_values, axis_values, indexing="xy"), -1).reshape(-1, 2)
panels = {
    "base density": mixture.log_prob(grid).exp(),
    "reward": reward.score(grid, None),
    "tilted density": tilted.log_prob(grid).exp(),
}
figure = Figure(figsize=(10, 3.5), layout="constrained")
axes = figure.subplots(1, 3, sharex=True, sharey=True)
for axis, (title, values) in zip(axes, panels.items(), strict=True):
    picture = values.reshape(161, 161).numpy()
    drawn = axis.contourf(axis_values, axis_values, picture, 12, cmap="Greys" if "density" in title else "cividis")
    figure.colorbar(drawn, ax=axis, shrink=0.85, format="%.2g")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("$x_1$")
    axis.set_aspect("equal")
axes[0].set_ylabel("$x_2$")
show(figure, "01_truth")

# %% [markdown]
# Three modes stay three modes: the tilt moves weight between them and shifts each a little. A method that climbs the
# reward alone would end on the brightest spot of the middle panel.
#
# ## Every loss on one axis
#
# The losses differ in what they need (a gradient of the reward or only its value; whole paths or end points; a chain
# with noise, an ODE, a transport) and in what they pay. What they share is a currency: evaluations of the network,
# all of them counted - forwards, vector-Jacobian products, backwards. So each is trained on the same problem with the
# same small network (two hidden layers of 64), and at a few moments 4000 fresh samples of the model are compared with
# the exact tilt:
#
# $$\text{accuracy} = 1 - \frac{W^2 - W^2_\text{floor}}{W_0^2 - W^2_\text{floor}},$$
#
# with $W^2$ the squared sliced Wasserstein-2 distance (squares of noise and of bias add up), $W_0^2$ that of the
# untrained model and $W^2_\text{floor}$ that of exact samples from exact samples. 0 is where training starts, 1 is
# what 4000 samples cannot tell from the truth, and noise can lift a value a little above 1.
#
# The runs are short: a few seconds each, a chain of 20 steps where the configs of `configs/toy/` have 40 to 100. They
# show that the losses move to one target, and roughly what that costs. They do not rank losses that end close to each
# other; `benchmarks/losses.py` trains each as its config says, with three seeds.


# %%
@dataclass
class Method:
    """One loss, and how its short run is set up."""

    family: str
    task: type[L.LightningModule]
    updates: int
    samples: int = 128
    lr: float = 5e-3
    loss: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    kind: str = "tilt"  # of the network: a tilt of the base, a tilt of a Gaussian, or a transport


PATHS, ENDS, ODES, TRANSPORTS = (
    "whole paths", "noised end points of paths", "end points of an ODE", "a transport or a Gaussian base",
)  # fmt: skip
whole = {"checkpoint": False}
ends = {"noisings": 8, "time_sampling": "importance", "t_min": 0.01, "t_max": 0.99}
replay = {"rollout_every": 4, "buffer_size": 4, "replay_samples": 256}
ode = {"transition": DDIM(ddim_eta=0.0), "base_last_step": False}
quarter = {"supervised_steps": 5} | whole

METHODS = {
    "AdjointMatching": Method(PATHS, tasks.AdjointMatchingTask, 60, loss=whole),
    "LogVariance": Method(PATHS, tasks.LogVarianceTask, 60, loss=whole),
    "TrajectoryBalance": Method(PATHS, tasks.TrajectoryBalanceTask, 60, loss=whole),
    "RelativeEntropy": Method(PATHS, tasks.RelativeEntropyTask, 60, loss=whole),
    "CrossEntropy": Method(PATHS, tasks.CrossEntropyTask, 60, loss=whole),
    "Reinforce": Method(PATHS, tasks.ReinforceTask, 60, loss=whole),
    "GRPO": Method(PATHS, tasks.GRPOTask, 60, loss={"penalty": "exact"} | whole, sampler={"rollout_every": 2}),
    "NovelScoreMatching": Method(ENDS, tasks.NovelScoreMatchingTask, 100, 256, 2e-3, loss=ends, sampler=replay),
    "MixedScoreMatching": Method(ENDS, tasks.MixedScoreMatchingTask, 100, 256, 2e-3, loss=ends, sampler=replay),
    "ConditionalScoreMatching": Method(
        ENDS, tasks.ConditionalScoreMatchingTask, 100, 256, 2e-3,
        loss=ends | {"path_weights": "self_normalised"}, sampler=replay,
    ),
    "TargetScoreMatching": Method(
        ENDS, tasks.TargetScoreMatchingTask, 100, 256, 2e-3,
        loss=ends | {"path_weights": "self_normalised"}, sampler=replay,
    ),
    "EfficientAdjointMatching": Method(
        ODES, tasks.EfficientAdjointMatchingTask, 100, 256, 2e-3, loss=ends, sampler=replay | ode
    ),
    "ReinforceAdjointMatching": Method(
        ODES, tasks.ReinforceAdjointMatchingTask, 80, 256, loss={"noisings": 4}, sampler=ode
    ),
    "ExactReinforceAdjointMatching": Method(
        ODES, tasks.ExactReinforceAdjointMatchingTask, 80, 256, loss={"noisings": 4}, sampler=ode
    ),
    "TiltMatching": Method(
        ODES, tasks.TiltMatchingTask, 150, 1024,
        loss={"variant": "weighted", "level_ess": 0.85, "noisings": 2, "time_weight": "control", "t_max": 0.9},
        sampler=ode | {"rollout_every": 50},
    ),
    "AdjointSampling": Method(
        TRANSPORTS, tasks.AdjointSamplingTask, 120, 512, 1e-2,
        loss=ends | {"noisings": 4, "path_weights": "self_normalised"},
        sampler={"rollout_every": 10, "buffer_size": 8, "replay_samples": 512, "transition": ExactGaussian(1 / 1.5**2)},
        kind="gaussian",
    ),
    "CMCD": Method(TRANSPORTS, tasks.CMCDTask, 60, loss={"objective": "log_variance"} | whole, kind="transport"),
    "NETS": Method(
        TRANSPORTS, tasks.NETSTask, 100, 256, loss={"objective": "pinn"} | quarter, sampler={"rollout_every": 4},
        kind="transport",
    ),
}  # fmt: skip
assert {method.task.__name__ for method in METHODS.values()} == set(tasks.__all__)  # no loss is left out

# %%
SAMPLES, LOOKS = 4000, 6
reference = tilted.sample(4 * SAMPLES, torch.Generator().manual_seed(1)).float()
floor = noise_floor(squared_sliced_wasserstein2, reference, SAMPLES, repeats=10).mean


def modes(x: torch.Tensor) -> torch.Tensor:
    """Which mode of the tilt each sample is nearest to, (n,): they lie six standard deviations apart."""
    return torch.cdist(x.double(), tilted.means).argmin(1)


def parts(x: torch.Tensor) -> torch.Tensor:
    """The part of the samples that is in each mode, (3,)."""
    return torch.bincount(modes(x), minlength=3).double() / len(x)


truly = parts(reference)


class Accuracy(L.Callback):
    """Samples at a few moments of a run, their accuracy, and the network evaluations spent until then."""

    def __init__(self, sampler: TrajectorySampler, updates: int) -> None:
        self.sampler, self.moments = sampler, [updates * i // LOOKS for i in range(1, LOOKS + 1)]
        self.evaluations, self.ends, self.distance = [], [], []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.look(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step in self.moments:
            self.look(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step not in self.moments:  # Tilt Matching stops where lambda is reached
            self.look(pl_module)

    def look(self, host: Any) -> None:
        self.evaluations.append(self.sampler.evaluations.network)
        with undisturbed(host):
            x = self.sampler.rollout(host, torch.zeros(SAMPLES), stream="report", number=0, samples_per_condition=1).end
        self.ends.append(x)
        self.distance.append(float(squared_sliced_wasserstein2(x, reference[:SAMPLES])))

    def of(self, distance: float) -> float:
        return 1 - (distance - floor) / (self.distance[0] - floor)

    @property
    def accuracy(self) -> list[float]:
        return [self.of(distance) for distance in self.distance]

    @property
    def parts(self) -> list[torch.Tensor]:
        return [parts(x) for x in self.ends]

    def mended(self, look: int) -> float:
        """Accuracy when each mode is given its exact weight: of the modes' places and shapes alone."""
        x = self.ends[look]
        p = (truly / parts(x))[modes(x)].float()
        return self.of(float(squared_sliced_wasserstein2(x, reference[:SAMPLES], p=p)))


def network(kind: str) -> torch.nn.Module:
    """The same small network on top of what it starts from."""
    if kind == "gaussian":
        return NeuralTilt(GaussianBase([2], scale=1.5), hidden=64, layers=2)
    base = GaussianMixturePredictor(mixture.weights, mixture.means, mixture.covariances)
    return (NeuralTransport if kind == "transport" else NeuralTilt)(base, hidden=64, layers=2)


def run(method: Method) -> Accuracy:
    """Train one loss for its few updates, from the same seed as all the others."""
    L.seed_everything(0, verbose=False)
    density = TiltedMixture(mixture.weights, mixture.means, mixture.covariances, reward.A, reward.c)
    module = method.task(
        predictor=network(method.kind),
        reward=density if method.kind == "gaussian" else reward,
        optimizer=lambda p: torch.optim.Adam(p, lr=method.lr, betas=(0.9, 0.95)),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.05, method.updates),
        **method.loss,
    )
    sampler = TrajectorySampler(**({"steps": 20, "samples_per_condition": 1} | method.sampler))
    accuracy = Accuracy(sampler, method.updates)
    data = DrawsDataModule(samples=method.samples, batches=method.updates)
    trainer([sampler, accuracy], method.updates).fit(module, datamodule=data)
    return accuracy


# %% [markdown]
# A chain of 20 steps that keeps the base's noise is not exact: the best that training could find still misses the tilt
# a little. How much? The control is known in closed form here, so the exact tilt's own prediction runs through the same
# chain, from the same noise, and is given its accuracy: the ceiling of 20 steps. (With more steps it goes to 1. It is
# the control of continuous time; one that was fitted to the 20 steps could be a little better.)


# %%
class ExactTilt(GaussianMixturePredictor):
    """The prediction of the exact tilt; its base is the mixture."""

    @contextmanager
    def base(self) -> Iterator[Predictor]:
        yield GaussianMixturePredictor.of(mixture)


def ceiling(steps: int, draws: int, **sampler: Any) -> Any:
    """Accuracy of the exact control in a chain: the mean of a few draws."""
    chain = TrajectorySampler(steps=steps, samples_per_condition=1, **sampler)
    hosts = [tasks.AdjointMatchingTask(predictor=p, reward=reward) for p in (network("tilt"), ExactTilt.of(tilted))]
    found = []
    for number, truth in enumerate(reference.split(SAMPLES)[:draws]):
        ends = [chain.rollout(host, torch.zeros(SAMPLES), stream="report", number=number).end for host in hosts]
        start, best = (float(squared_sliced_wasserstein2(end, truth)) for end in ends)
        found.append(1 - (best - floor) / (start - floor))
    return mean(torch.tensor(found, dtype=torch.float64))


CEILINGS = {}
for family, name, kernel in ((PATHS, "memoryless steps", {}), (ODES, "steps of an ODE", ode)):
    CEILINGS[family], long = ceiling(20, 4, **kernel), ceiling(100, 2, **kernel)
    short = CEILINGS[family]
    print(f"exact control, {name:17s} 20: {short.mean:.2f} +- {short.se:.2f}    100: {long.mean:.2f}")
    assert 0.85 < short.mean < 1.02 and abs(long.mean - 1) < 0.04
CEILINGS[ENDS] = CEILINGS[PATHS]

# %%
RUNS = {name: run(method) for name, method in METHODS.items()}
for name, found in RUNS.items():
    accuracy = " ".join(f"{a:5.2f}" for a in found.accuracy[1:])
    print(f"{name:30s} {found.evaluations[-1] / 1e6:4.2f} M   accuracy on the way {accuracy}")

# %%
LINES = [("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ("-", "v"), ("--", "P"), ("-.", "X")]
SHADES = ["#1b1b1b", "#c8553d", "#2b6777", "#b58900", "#6c4f8c", "#7f8c99", "#4b7f3a"]
figure = Figure(figsize=(10, 7.4), layout="constrained")
axes = figure.subplots(2, 2, sharex=True, sharey=True).flat
for axis, family in zip(axes, (PATHS, ENDS, ODES, TRANSPORTS), strict=True):
    for found in RUNS.values():
        axis.plot([e / 1e6 for e in found.evaluations], found.accuracy, color="0.88", lw=1, zorder=1)
    mine = [name for name, method in METHODS.items() if method.family == family]
    for name, (line, marker), colour in zip(mine, LINES, SHADES, strict=False):
        spent = [e / 1e6 for e in RUNS[name].evaluations]
        axis.plot(spent, RUNS[name].accuracy, line, marker=marker, ms=4, lw=1.5, color=colour, label=name, zorder=2)
    axis.axhline(1, color="0.4", lw=0.8)
    if family in CEILINGS:
        axis.axhline(CEILINGS[family].mean, color="0.4", lw=0.8, ls=(0, (6, 4)))
    axis.set_title(family, fontsize=10)
    axis.set_ylim(-0.3, 1.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
for axis in figure.axes[2:]:
    axis.set_xlabel("network evaluations, millions")
for axis in figure.axes[::2]:
    axis.set_ylabel("accuracy  (0 untrained, 1 the truth)")
show(figure, "01_losses")

# %% [markdown]
# (Broken lines: the exact control in the same chain of 20 steps.) All of them leave the base towards the same law, and
# most are most of the way there within half a million evaluations. 4000 samples alone scatter an accuracy of .8 by
# about .05, and the order of the curves is largely learning rate and noise. The README's table of long runs is the
# place to compare, and `benchmarks/losses.py` what makes it.
#
# ## What is missing, and why curves bend down
#
# Some curves fall: Efficient Adjoint Matching from .8 to .1 and back to .4. The learning rate does not tell why; it
# only goes down. The modes do. The tilt moves each mode a little, and it moves weight from the mode at the bottom right
# (.2 of the base, .11 of the tilt) to the left one (.3 and .39). So the samples are sorted by mode, and each mode is
# given its exact weight: the accuracy of what is left is that of the modes' places and shapes alone.

# %%
SORTED = {name: (found.mended(2), found.mended(-1)) for name, found in RUNS.items()}
print("accuracy of places and shapes, after a third of the run and at the end, and the weights of the modes at the end")
for name, found in RUNS.items():
    weights = " ".join(f"{part:.2f}" for part in found.parts[-1])
    print(f"{name:30s} {SORTED[name][0]:5.2f} {SORTED[name][1]:5.2f}   {weights}")
print(f"{'exact':42s}   {' '.join(f'{part:.2f}' for part in truly)}")
print("\nplace of the left mode, and the sum of its two variances")
for name in ("TargetScoreMatching", "TiltMatching", "AdjointSampling", "Reinforce"):
    x = RUNS[name].ends[-1]
    x = x[modes(x) == 0]
    print(f"{name:30s} ({x[:, 0].mean():.2f}, {x[:, 1].mean():.2f})   {x.var(0).sum():.2f}")
place, spread = tilted.means[0].tolist(), float(tilted.covariances[0].trace())
print(f"{'exact':30s} ({place[0]:.2f}, {place[1]:.2f})   {spread:.2f}")

# %%
figure = Figure(figsize=(10, 4.6), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
shown = ["EfficientAdjointMatching", "NovelScoreMatching", "MixedScoreMatching", "AdjointMatching", "LogVariance"]
for name, (line, marker), colour in zip(shown, LINES, SHADES, strict=False):
    spent = [e / 1e6 for e in RUNS[name].evaluations]
    left.plot(spent, [p[0] for p in RUNS[name].parts], line, marker=marker, ms=4, lw=1.5, color=colour, label=name)
for weight, text in ((mixture.weights[0], "base"), (truly[0], "exact tilt")):
    left.axhline(float(weight), color="0.4", lw=0.8)
    left.text(1.0, float(weight) + 0.002, text, ha="right", fontsize=8)
left.set_xlabel("network evaluations, millions")
left.set_ylabel("weight of the left mode")
left.set_ylim(0.19, 0.41)
left.legend(frameon=False, fontsize=8, loc="lower right")
for y, (name, found) in enumerate(reversed(RUNS.items())):
    plain, mended = found.accuracy[-1], SORTED[name][1]
    right.plot([plain, mended], [y, y], color="0.7", lw=1, zorder=1)
    right.scatter(plain, y, s=26, color="#1b1b1b", zorder=2, label="as it is" if y == 0 else None)
    right.scatter(
        mended, y, s=30, facecolor="white", edgecolor="#c8553d", lw=1.4, zorder=3,
        label="every mode with its exact weight" if y == 0 else None,
    )  # fmt: skip
right.set_yticks(range(len(RUNS)), list(RUNS)[::-1], fontsize=8)
right.axvline(1, color="0.4", lw=0.8)
right.set_xlabel("accuracy at the end")
right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
show(figure, "01_modes")

# %% [markdown]
# Of nearly all losses the modes stand where they should after a third of the run, and what is missing at the end are
# weights of modes. While modes move, their weights go astray, and where nothing in the loss compares one mode with
# another they come back slowly. That is so in Efficient Adjoint Matching and in novel and mixed score matching: they
# see the reward's gradient at each end point, never its value, and a regression at a noised state learns of another
# mode only where the noise is strong enough to reach it. A high point of such a curve is a moment on the way, not a
# better model, and more updates of the same kind help little. Path weights do (conditional and target score matching
# have them here), or a loss that looks at whole paths, or one that compares rewards. That is what "slow in the weights
# of modes" means in this package's pages. NETS, after its hundred updates, is short of them as well.
#
# Three are short of something else. Adjoint Sampling starts from one broad Gaussian and has to make three modes of it:
# they are still too wide. Those of Tilt Matching are too narrow, and Target Score Matching's left one is not yet where
# it belongs.
#
# What a curve cannot show is what a loss asks for. Half of these never see a gradient of the reward.

# %%
final = {name: found.accuracy[-1] for name, found in RUNS.items()}
blind = [name for name, method in METHODS.items() if not method.task.needs_reward_gradient]
print("without a gradient of the reward:", ", ".join(f"{name} {final[name]:.2f}" for name in blind))
assert 2 * len(blind) == len(METHODS)
LEAST = {
    "NovelScoreMatching": 0.35, "MixedScoreMatching": 0.3, "EfficientAdjointMatching": 0.05, "NETS": 0.3,
    "ConditionalScoreMatching": 0.6, "TargetScoreMatching": 0.6, "ReinforceAdjointMatching": 0.65,
    "ExactReinforceAdjointMatching": 0.6, "TiltMatching": 0.55, "AdjointSampling": 0.55, "CMCD": 0.65,
}  # fmt: skip
for name in METHODS:  # each within the scatter of its own end, which weights of modes make
    assert final[name] > LEAST.get(name, 0.7), (name, final[name])
places = set(METHODS) - {"AdjointSampling", "TargetScoreMatching", "TiltMatching"}
assert all(min(SORTED[name]) > 0.9 for name in places)
assert all(end > 0.6 for _, end in SORTED.values())
slow = ["EfficientAdjointMatching", "NovelScoreMatching", "MixedScoreMatching"]
assert all(RUNS[name].parts[-1][0] < 0.35 and RUNS[name].parts[-1][2] > 0.13 for name in slow)  # exact: .39 and .11

# %% [markdown]
# # 05 Which number to believe
#
# A run ends with an effective sample size, a log Z, bounds and a reward. This notebook shows what each of them says
# about a model that is right, and then about one that is wrong while nearly all of its numbers look fine.
#
# Two rules are taken home:
#
# * **ESS and log Z from a model's own paths know only where the model goes.**  A mode that is never visited is missing
#   from log Z, and nothing that is computed from those paths can tell.
# * **What tells is what comes from elsewhere**: samples of the truth run backwards, or a base that covers more.
#
# Everything here has a Gaussian base and exact steps, so that log Z has no error of discretisation.

# %%
import math
from itertools import pairwise

import torch
from _common import show, trainer
from matplotlib.figure import Figure

from lightning_tilt.callbacks import EssCurves, TrajectorySampler, WorkHistograms
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.identities import ess, log_partition
from lightning_tilt.models import GaussianBase, NeuralTilt, the_mixture
from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.energies import FunctionDensity
from lightning_tilt.rewards.mixture_density import TiltedMixture
from lightning_tilt.tasks import AdjointSamplingTask
from lightning_tilt.transition import ExactGaussian


def tuned(base, density, updates=500):
    """Adjoint Sampling with a small network on a Gaussian base; some ten seconds."""
    torch.manual_seed(0)
    task = AdjointSamplingTask(
        NeuralTilt(base, hidden=96), density, noisings=4, time_sampling="importance", t_min=0.01, t_max=0.99,
        path_weights="self_normalised", checkpoint=False,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.99)),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.03, total_iters=updates),
    )  # fmt: skip
    sampler = TrajectorySampler(
        steps=40, samples_per_condition=1, seed=0, transition=ExactGaussian(base.precision), rollout_every=20,
        buffer_size=8, replay_samples=1024,
    )  # fmt: skip
    curves = EssCurves(samples=2000)
    trainer([sampler, curves], updates).fit(task, DrawsDataModule(1024, updates).train_dataloader())
    return task, curves


def weights(task, samples=4000, base=False):
    """End points of the model's own paths and the log weights of those paths."""
    path = task.sampler.rollout(
        task, torch.zeros(1), stream="report", number=0, base=base, samples_per_condition=samples
    )
    if base:
        return path.end, (task.current_lam() * path.reward).double()
    chain = task.sampler.chain(task, count=False)
    return path.end, chain.log_weights(task.predictor, path, task.current_lam()).double()


# %% [markdown]
# ## 1. A model that is right
#
# The density is the tilt of the project's two-dimensional mixture; its log Z is known, -1.3756.

# %%
mixture, quadratic = the_mixture()
density = TiltedMixture(
    mixture.weights.tolist(), mixture.means.tolist(), mixture.covariances.tolist(), quadratic.A.tolist(),
    quadratic.c.tolist(),
)  # fmt: skip
good, curves = tuned(GaussianBase([2], scale=1.5), density)
_, figure = curves.look(good)
show(figure, "05_ess")

# %% [markdown]
# Left: ESS of the rollouts of training, right: ESS of the weights of the trained model up to each time. On the way the
# model leaves the base, and the ESS against the base falls; the reward at the end brings it back. That it comes back
# is what says that the control did what the reward asks.
#
# Now the work, the log weight, from both sides. *Forward* paths are the model's; their mean is a lower bound of log Z
# (ELBO), and below it by the divergence of the model from the truth. *Backward* paths are samples of the truth that
# are noised; their mean is an upper bound (EUBO). The two histograms cross at log Z, and Bennett's ratio is the
# estimate of least variance that both together allow.

# %%
numbers, figure = WorkHistograms(samples=4000).look(good)
show(figure, "05_work_right")
for key in ("elbo", "log_z_forward", "log_z_bennett", "eubo"):
    print(f"{key:14s} {numbers[key]['mean']:8.4f} +- {numbers[key]['se']:.4f}")
print(f"exact          {density.log_z:8.4f}")
print(f"ESS {numbers['ess']:.3f}, overlap of both sides {numbers['overlap']:.3f}")
right = numbers

# %%
assert numbers["ends"] == "exact" and numbers["ess"] > 0.8
assert numbers["elbo"]["mean"] < density.log_z < numbers["eubo"]["mean"]
for key in ("log_z_forward", "log_z_bennett"):  # both unbiased: the steps of the chain are exact
    assert abs(numbers[key]["mean"] - density.log_z) < 4 * numbers[key]["se"] < 0.08, key
assert numbers["log_z_bennett"]["se"] < numbers["log_z_forward"]["se"]

# %% [markdown]
# ## 2. Few paths flatter
#
# A progress bar shows the ESS of a handful of paths a prompt. With n paths it can never be below 1/n, and its mean is
# above the truth: of the *untuned* base on this density four paths report nearly twice what is there, thirty-two a
# tenth too much.

# %%
_, log_w = weights(good, samples=65536, base=True)
sizes = [2**k for k in range(1, 14)]
seen = [sum(ess(part) for part in log_w.split(n)[:400]) / min(400, len(log_w) // n) for n in sizes]
truth = ess(log_w)

figure = Figure(figsize=(5.6, 3.4), layout="constrained")
axis = figure.subplots()
axis.plot(sizes, seen, "o-", color="#c8553d", ms=4, label="mean ESS that n paths report")
axis.plot(sizes, [1 / n for n in sizes], ":", color="#7f8c99", label="1/n, the least it can be")
axis.axhline(truth, color="#2b6777", ls="--", label=f"from {len(log_w)} paths: {truth:.3f}")
axis.set(xscale="log", ylim=(0, 1), xlabel="n, paths behind one number", ylabel="ESS, the untuned base")
axis.legend(frameon=False, fontsize=8)
axis.spines[["top", "right"]].set_visible(False)
show(figure, "05_few_paths")

# %%
assert all(a >= b - 0.02 for a, b in pairwise(seen))  # it falls with n
assert seen[0] > 1.5 * truth and abs(seen[-1] - truth) < 0.1 * truth

# %% [markdown]
# ## 3. A model that is wrong, and does not know
#
# Two Gaussians, 30 % at (-4, -4) and 70 % at (2, 2), normalised: log Z = 0. The base is N(2, 1) in either coordinate:
# it sits on the second mode and never comes near the first. We pretend to know the energy alone, as one does.

# %%
LEFT, RIGHT, STD = torch.tensor([-4.0, -4.0]), torch.tensor([2.0, 2.0]), 0.6


class TwoModes(Density):
    """.3 N(LEFT, STD^2 I) + .7 N(RIGHT, STD^2 I)."""

    log_z = 0.0

    def energy(self, x):
        """(B, 2) -> (B,)."""
        logs = [
            math.log(p / (2 * math.pi * STD**2)) - (x - m.to(x)).square().sum(1) / (2 * STD**2)
            for p, m in ((0.3, LEFT), (0.7, RIGHT))
        ]
        return -torch.logaddexp(*logs)

    def reference(self, n, seed=0):
        """Exact samples, (n, 2)."""
        generator = torch.Generator().manual_seed(seed)
        left = torch.rand(n, 1, generator=generator) < 0.3
        return torch.where(left, LEFT, RIGHT) + STD * torch.randn(n, 2, generator=generator)


wrong, _ = tuned(GaussianBase([2], scale=1.0, mean=2.0), FunctionDensity(TwoModes().energy), updates=200)
alone, _ = WorkHistograms(samples=4000).look(wrong)
print(f"ESS {alone['ess']:.3f}, ends of the backward paths: {alone['ends']}")
for key in ("elbo", "log_z_forward", "log_z_bennett", "eubo"):
    print(f"{key:14s} {alone[key]['mean']:8.4f} +- {alone[key]['se']:.4f}")
print(f"what is true      0.0000, and log .7 = {math.log(0.7):.4f}")

# %% [markdown]
# An ESS above .9, bounds that are tight, a small standard error, forward and Bennett's estimates that agree: and log Z
# is wrong by .36, a hundred standard errors. All of it is right *about the mode that was visited*: log Z is log .7.
# Without samples of the truth the backward paths start at the model's own end points, resampled by their weights, and
# those know the other mode as little.
#
# Now the same model and the same numbers, but somebody has samples of the truth.

# %%
wrong.reward = TwoModes()
wrong.reward.bind(wrong.predictor)
numbers, figure = WorkHistograms(samples=4000).look(wrong)
show(figure, "05_work_wrong")
print(f"ends: {numbers['ends']}; EUBO {numbers['eubo']['mean']:.1f}, ELBO {numbers['elbo']['mean']:.3f}")
print(f"overlap of both sides {numbers['overlap']:.3f}, Bennett {numbers['log_z_bennett']['mean']:.3f}")

# %% [markdown]
# Left the surroundings of log Z, right all of both sides: three in ten backward paths lie far to the right, the model
# would nearly never make them. The gap between the bounds is what to look at; a tight pair of bounds whose upper side
# is made of the model's own ends is no second opinion. The overlap of both sides does not warn: of a model that is
# perfect but for the 30 % that it misses it would be 2 x .7/1.7 = .82, where the right model's is .96. Bennett's
# ratio, which weighs both sides, is right even now: the samples of the truth carry what the model does not know.

# %%
assert alone["ends"] == "resampled" and numbers["ends"] == "exact"
assert alone["ess"] > 0.9 and alone["eubo"]["mean"] - alone["elbo"]["mean"] < 0.2
assert abs(alone["log_z_forward"]["mean"] - math.log(0.7)) < 4 * alone["log_z_forward"]["se"]
assert abs(alone["log_z_forward"]["mean"]) > 20 * alone["log_z_forward"]["se"]  # nothing warns
assert abs(numbers["log_z_bennett"]["mean"]) < 4 * numbers["log_z_bennett"]["se"]
assert numbers["eubo"]["mean"] - numbers["elbo"]["mean"] > 10  # the truth does
assert right["eubo"]["mean"] - right["elbo"]["mean"] < 0.3
assert abs(numbers["overlap"] - 1.4 / 1.7) < 0.03  # the overlap does not
assert right["overlap"] - numbers["overlap"] < 0.2

# %% [markdown]
# ## 4. What helps
#
# A base that covers: N(0, 4^2) sees both modes from the start. Training from it is harder, the ESS is lower, and the
# number is right. **An ESS speaks only of what its paths visit**: the higher one is that of the wrong model. What
# speaks of more are the weights of the covering base's own samples, untuned: they need no training to be trusted, and
# give log Z without it, with a larger error.

# %%
covering, _ = tuned(GaussianBase([2], scale=4.0), TwoModes())
numbers, figure = WorkHistograms(samples=4000).look(covering)
ends = {"wrong": weights(wrong)[0], "covering": weights(covering)[0]}
left = {name: float((x.sum(1) < -2).float().mean()) for name, x in ends.items()}
estimate = log_partition(weights(covering)[1])
print(f"covering base: ESS {numbers['ess']:.3f}, log Z {estimate.mean:.3f} +- {estimate.se:.3f} (true 0)")
_, log_w_base = weights(covering, samples=20_000, base=True)
by_base = log_partition(log_w_base)
print(f"its own samples, untuned, by weight: ESS {ess(log_w_base):.3f}, log Z {by_base.mean:.3f} +- {by_base.se:.3f}")
print(f"samples in the left mode: {left['wrong']:.1%} and {left['covering']:.1%} (true 30 %)")

figure = Figure(figsize=(8.0, 3.9), layout="constrained")
axes = figure.subplots(1, 2, sharex=True, sharey=True)
grid = torch.linspace(-7, 5, 160)
plane = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).reshape(-1, 2)
height = (-TwoModes().energy(plane)).exp().reshape(160, 160)
titles = {"wrong": f"ESS {alone['ess']:.2f}: wrong", "covering": f"ESS {numbers['ess']:.2f}: right"}
for axis, (name, x) in zip(axes, ends.items(), strict=True):
    axis.scatter(*x[:1500].T, s=4, lw=0, alpha=0.4, color="#c8553d")
    axis.contour(grid, grid, height, [0.002, 0.02, 0.1], colors="#2b6777", linewidths=1)
    axis.set(title=f"{titles[name]}  ({left[name]:.0%} on the left, true 30 %)", xlabel="$x_1$", aspect="equal")
    axis.title.set_fontsize(10)
axes[0].set_ylabel("$x_2$")
show(figure, "05_two_modes")

# %%
assert left["wrong"] == 0 and 0.1 < left["covering"] < 0.5
assert abs(estimate.mean) < 4 * estimate.se + 0.01 and estimate.se < 0.1
assert abs(by_base.mean) < 4 * by_base.se < 0.5 and abs(by_base.mean - math.log(0.7)) > 2 * by_base.se
assert numbers["ess"] < alone["ess"]

# %% [markdown]
# | number | says | is blind to |
# | --- | --- | --- |
# | ESS of the model's paths | how evenly the visited part is weighted | modes never visited; too high with few paths |
# | log Z forward, its standard error | the mass of what is visited | the same |
# | ELBO and EUBO with the model's own ends | the same, twice | the same |
# | EUBO with samples of the truth | whether the truth is covered | nothing, but the samples are needed |
# | weights of the base's own samples: ESS, log Z | the whole tilt, whatever the model does | where the base never is |
#
# A tuned model that dropped a mode has a high ESS whatever its base covers: the base's reach helps only where the
# base's own samples are weighted.
#
# For fine-tuning the base *defines* what is covered, since p* has no mass where p_base has none; there the danger is a
# model that lost a mode on the way. `TiltReport` reweights base samples for that: `reward_exact` and `log_z_base` do
# not come from the tuned model, and the tuned one has to agree with both.

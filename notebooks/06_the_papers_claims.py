# %% [markdown]
# # 06 The papers' claims, drawn
#
# *A unified perspective on fine-tuning and sampling with diffusion and flow models* (2605.00229) and *Adjoint
# Matching* (2409.08861) make statements about targets and adjoints that can be looked at on a problem whose answer is
# known:
#
# 1. Every regression has a bias, which training removes, and a variance, which it cannot.  Towards the noise the
#    variance of *target* score matching grows as 1/alpha^2, towards the data that of *conditional* score matching as
#    1/beta^2; *novel* score matching, Adjoint Sampling and Adjoint Matching are finite at both ends.
# 2. Training removes the bias and leaves the variance where it is.
# 3. The lean adjoint of a log-concave base is bounded by a known function of time, with equality for a Gaussian.  For a
#    base of several modes it is not.

# %%
import math

import torch
from _common import show, trainer
from matplotlib.figure import Figure

from lightning_tilt.callbacks import AdjointNorm, TargetVariance, TrajectorySampler
from lightning_tilt.callbacks.mixture_variances import mixture_variances
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.models import GaussianBase, GaussianMixturePredictor, NeuralTilt, the_mixture
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards import QuadraticReward
from lightning_tilt.tasks import AdjointMatchingTask
from lightning_tilt.transition import ExactGaussian

LOOKS = {
    "target": ("target score matching", "#c8553d", "-", "s"),
    "conditional": ("conditional score matching", "#2b6777", "-", "o"),
    "novel": ("novel score matching", "#7f8c99", "--", "^"),
    "adjoint": ("Adjoint Matching", "black", "-", "v"),
}

# %% [markdown]
# ## 1. Variances over time
#
# The base is the two-dimensional mixture, the reward quadratic, the process a rectified flow: `X_t = t X_1 + (1 - t)
# eps`. The base, its tilt, `X_1 | X_t` and the score are closed forms, so nothing below is trained: the four targets
# are drawn at exact samples `X_t ~ p*_t`, sixteen of them a state. All four have the same mean, the score of the tilt.

# %%
mixture, reward = the_mixture()
flow = RectifiedFlow()
times = torch.tensor(
    [0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.9975],
    dtype=torch.float64,
)
found = mixture_variances(mixture, reward, 1.0, flow, times, outer=600, inner=8, steps=30)
two_eta = 2 * flow.beta(times) / flow.alpha(times)  # eta = beta/alpha of this flow: what the control metric weighs with

figure = Figure(figsize=(9.6, 4.2), layout="constrained")
axes = figure.subplots(1, 2, sharex=True)
for axis, factor, title in zip(axes, (1, two_eta), ("score metric", "control metric, 2 eta times that"), strict=True):
    for name, (label, colour, line, marker) in LOOKS.items():
        axis.plot(times, factor * found[name][0], line, marker=marker, ms=3, lw=1.3, color=colour, label=label)
    axis.set(xscale="logit", yscale="log", xlabel="t  (noise 0, data 1)", title=f"E tr Cov(y | X_t), {title}")
    axis.xaxis.set_minor_formatter(lambda *_: "")
    axis.title.set_fontsize(10)
    axis.spines[["top", "right"]].set_visible(False)
ends = (times < 0.06, times > 0.94)
for inside, name, power, text in (
    (ends[0], "target", 1 / flow.alpha(times) ** 2, "1/alpha²"),
    (ends[1], "conditional", 1 / flow.beta(times) ** 2, "1/beta²"),
):
    line = 3 * power * (found[name][0] / power)[inside].median()
    axes[0].plot(times[inside], line[inside], ":", color="black", lw=1.2)
    at = int(inside.nonzero()[len(inside.nonzero()) // 2])
    left = name == "target"
    axes[0].annotate(
        text, (times[at], line[at]), (12 if left else -12, 6), textcoords="offset points",
        ha="left" if left else "right",
    )  # fmt: skip
axes[0].legend(frameon=False, fontsize=8, loc="lower center")
show(figure, "06_variances")

# %% [markdown]
# Time is stretched at both ends. The dotted lines are the powers that the papers name, drawn three times above the
# curves that they belong to. Halving the distance to an end makes the infinite variances four times as large, and that
# is asserted here to a tenth; the finite ones are small at both ends. In the middle Adjoint Matching's variance is not
# small: its adjoint passes through the saddle between the modes of the base, where the Jacobian is large, and a few
# paths carry it (section 3).

# %%
for name, k in (("target", 0), ("conditional", -1)):
    value, se = found[name]
    inner = 1 if k == 0 else -2
    ratio = float(value[k] / value[inner])
    print(f"{name:12s} twice as near to its end: {ratio:.2f} times the variance (claim: 4)")
    assert abs(ratio - 4) < 0.4
    assert float(se[k] / value[k]) < 0.2
for name in ("novel", "adjoint"):
    at_the_ends = [float(found[name][0][k]) for k in (0, -1)]
    print(f"{name:12s} at t = {float(times[0])} and {float(times[-1])}: {at_the_ends[0]:.1e}, {at_the_ends[1]:.1e}")
    assert max(at_the_ends) < 0.01
assert float(found["target"][0][0]) > 1e5 and float(found["conditional"][0][-1]) > 1e5

# %% [markdown]
# *Adjoint Sampling* is not a fifth curve: for a Gaussian base its target is novel score matching's, state by state.
# Here is the check, with N(0, I) as the base and the adjoint swept step by step, which Adjoint Sampling need not do.

# %%
normal = GaussianMixturePredictor([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]]).mixture
same = mixture_variances(normal, reward, 1.0, flow, times[::3], outer=50, inner=4, steps=8)
gap = float((same["adjoint"][0] / same["novel"][0] - 1).abs().max())
print(f"largest relative difference of the two variances: {gap:.1e}")
assert gap < 1e-9

# %% [markdown]
# ## 2. What training removes
#
# `TargetVariance` measures both parts along paths of any model, by nested samples. It looks at Adjoint Matching before
# the first update and after the last.

# %%
UPDATES = 80
torch.manual_seed(0)
task = AdjointMatchingTask(
    NeuralTilt(GaussianMixturePredictor.of(mixture), hidden=64), reward, checkpoint=False, loss_micro_batch=16384,
    optimizer=lambda p: torch.optim.Adam(p, lr=4e-3, betas=(0.9, 0.95)),
    lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.05, total_iters=UPDATES),
)  # fmt: skip
look = TargetVariance(samples=400, inner=8, times=(0.05, 0.2, 0.4, 0.6, 0.8, 0.9))
sampler = TrajectorySampler(steps=40, samples_per_condition=1, seed=0)
steps = {}
# One update at a learning rate of 0 only starts the chain: what is looked at first is the base itself.
still = AdjointMatchingTask(
    task.predictor, reward, checkpoint=False, loss_micro_batch=16384, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)
)
trainer([TrajectorySampler(steps=40, samples_per_condition=1, seed=0)], 1).fit(
    still, DrawsDataModule(8, 1).train_dataloader()
)
steps["before"], _ = look.look(still)
trainer([sampler], UPDATES).fit(task, DrawsDataModule(256, UPDATES).train_dataloader())
steps["after"], _ = look.look(task)

figure = Figure(figsize=(8.6, 3.6), layout="constrained")
axes = figure.subplots(1, 2, sharey=True)
styles = {"before": ("#7f8c99", "s", "--"), "after": ("#c8553d", "o", "-")}
for axis, part, title in zip(
    axes, ("bias2", "variance"), ("bias²: training removes it (hollow: at most)", "variance: it stays"), strict=True
):
    for when, (colour, marker, line) in styles.items():
        rows = steps[when]["times"]
        seen = [(row["t"], row["control"][part]) for row in rows]
        sure = [(t, v["mean"], v["se"]) for t, v in seen if part == "variance" or v["mean"] > 2 * v["se"]]
        most = [(t, v["mean"] + 2 * v["se"]) for t, v in seen if part == "bias2" and v["mean"] <= 2 * v["se"]]
        label = f"after {UPDATES} updates" if when == "after" else "the untuned base"
        axis.errorbar(*zip(*sure, strict=True), color=colour, marker=marker, ls=line, ms=4, capsize=2, label=label)
        if most:
            axis.plot(*zip(*most, strict=True), color=colour, marker="v", mfc="white", ls="", ms=6)
    axis.set(yscale="log", xlabel="t  (noise 0, data 1)", title=title)
    axis.title.set_fontsize(10)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("control metric")
axes[1].legend(frameon=False, fontsize=8)
show(figure, "06_bias_and_variance")

# %%
for before, after in zip(steps["before"]["times"], steps["after"]["times"], strict=True):
    (b0, b1), (v0, v1) = ((before["control"][part], after["control"][part]) for part in ("bias2", "variance"))
    print(
        f"t = {before['t']:.2f}: bias² {b0['mean']:7.3f} -> {b1['mean']:7.3f} (+- {b1['se']:.3f})    "
        f"variance {v0['mean']:7.2f} -> {v1['mean']:7.2f}"
    )
    if before["t"] >= 0.6:
        assert b1["mean"] < 0.2 * b0["mean"] and b0["mean"] > 4 * b0["se"]
        assert abs(v0["mean"] - v1["mean"]) < 4 * math.hypot(v0["se"], v1["se"])

# %% [markdown]
# Near the data the bias falls to a hundredth while the variance does not move. Towards the noise no bias is seen,
# before or after: there the variance of these few paths is larger than it, and that is what a batch has to average
# away.

# %% [markdown]
# ## 3. How long the lean adjoint is
#
# The adjoint starts at the end, `a = -lam grad r`, and runs backwards through the base alone. If `-hess log p_base >=
# m I`,
#
#     |a_t| <= alpha_t/(alpha_t^2 + m beta_t^2) |a_1|
#
# Three bases: N(0, I/m), where it is an equality; a Gaussian whose smallest precision is m, where it is a bound; and
# the mixture, which is no log-concave law at all. For that one we draw the formula with the smallest precision of its
# *components*, as somebody might who forgets that a mixture of log-concave laws is not log-concave, beside what does
# hold for any base: the product of the largest singular values of the steps' Jacobians.


# %%
def adjoints(base, precision, jacobians=False, **sampler):
    """The norms along 600 paths of the untuned base."""
    torch.manual_seed(0)
    network = NeuralTilt(base, hidden=8, layers=1)
    task = AdjointMatchingTask(network, far, checkpoint=False, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer([TrajectorySampler(steps=60, samples_per_condition=1, seed=0, **sampler)], 1).fit(
        task, DrawsDataModule(8, 1).train_dataloader()
    )
    return AdjointNorm(samples=600, precision=precision, jacobians=jacobians).look(task)[0]


far = QuadraticReward([[0.6, 0.2], [0.2, 0.5]], [-0.5, 1.0])
narrow = [[1.2, 0.3], [0.3, 0.5]]
smallest = float(1 / torch.linalg.eigvalsh(torch.tensor(narrow))[-1])
components = float(1 / mixture.variances.max())
cases = {
    "N(0, I/m): equality": adjoints(GaussianBase([2], scale=0.7), None, transition=ExactGaussian(1 / 0.49)),
    "a Gaussian of least precision m: a bound": adjoints(
        GaussianMixturePredictor([1.0], [[0.5, 0.0]], [narrow]), smallest
    ),
    "the mixture: no bound": adjoints(GaussianMixturePredictor.of(mixture), components, jacobians=True),
}

figure = Figure(figsize=(11.4, 3.9), layout="constrained")
axes = figure.subplots(1, 3)
for axis, (title, case) in zip(axes, cases.items(), strict=True):
    axis.fill_between(case["t"], case["median"], case["q95"], color="#c8553d", alpha=0.2, lw=0, label="median to 95 %")
    axis.plot(case["t"], case["mean"], color="#c8553d", lw=1.6, label="mean |a|")
    axis.plot(case["t"], case["bound"], "--", color="#2b6777", lw=1.6, label="the formula")
    if "growth" in case:
        axis.plot(case["t"], case["growth"], ":", color="black", lw=1.6, label="product of singular values")
    axis.set(yscale="log", xlabel="t  (noise 0, data 1)", title=title)
    axis.title.set_fontsize(10)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("norm of the lean adjoint")
show(figure, "06_adjoint_norms")

# %%
for title, case in cases.items():
    print(f"{title:42s} largest |a| / formula {case['ratio_max']:.4f}")
equal, bounded, broken = cases.values()
assert max(abs(a / b - 1) for a, b in zip(equal["mean"], equal["bound"], strict=True)) < 1e-4
assert bounded["ratio_max"] < 1 + 1e-4 and bounded["mean"][0] < 0.95 * bounded["bound"][0]
assert broken["ratio_max"] > 2
assert all(a <= b * (1 + 1e-4) for a, b in zip(broken["mean"], broken["growth"], strict=True))

# %% [markdown]
# The last panel is the reason for the hump in the first picture: between the modes the adjoint grows. It is also why
# `loss_cap` exists, and why `AdjointNorm` is a callback: on a base that nobody has a formula for, one looks.

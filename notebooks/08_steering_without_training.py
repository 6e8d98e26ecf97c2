# %% [markdown]
# # 08 Steering without training
#
# Sequential Monte Carlo draws from the tilt without a single update. Particles run through the base's own chain; on
# the way each is judged by the reward of its *predicted* end point, the promising ones are copied, the others are
# dropped. The weights that are left give Z without bias, at any number of steps, for any way of judging; a bad judge
# costs variance alone. (Z, not log Z: the logarithm of an unbiased number lies low by half its relative variance.)
#
# This notebook steers a mixture whose answer is known, sets log Z beside that of a tuned model, asks when training
# pays, and then steers the digits.

# %%

import torch
from _common import show, trainer
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from lightning_tilt import DDIM, TrajectorySampler
from lightning_tilt.assets import folder
from lightning_tilt.callbacks import SteeredSampler
from lightning_tilt.chain import Chain
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.identities import Estimate, ess, log_partition, stratified
from lightning_tilt.metrics import noise_floor, sliced_wasserstein2
from lightning_tilt.models import GaussianMixturePredictor, NeuralTilt, StableDiffusion, the_mixture
from lightning_tilt.rewards import DigitAccuracy, Ink
from lightning_tilt.steering import SMC, Steered
from lightning_tilt.tasks import AdjointMatchingTask

mixture, reward = the_mixture()
base = GaussianMixturePredictor.of(mixture)
LAM, STEPS, PARTICLES, REPLICATES = 3.0, 40, 16384, 128
BASE, TUNED, EXACT = "#7f8c99", "#c8553d", "#2b6777"


def steer(smc: SMC, predictor=base, seed: int = 1) -> tuple[Steered, int]:
    """Run the particles once; what they found, and the network evaluations of each."""
    chain = Chain(base.process, DDIM(), base.process.grid(STEPS))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(STEPS + 1, smc.particles, 2, generator=generator)
    uniforms = torch.rand(STEPS, smc.particles, generator=generator, dtype=torch.float64)
    found = smc.run(chain, predictor, reward, base.encode(None, 1), noise, LAM, uniforms=uniforms)
    return found, round(chain.evaluations.network / smc.particles)


# %% [markdown]
# ## 1. Five ways to the same number
#
# At lam = 3 the tilt has moved far from the base. The number to hit is log Z of the chain of forty steps, which a
# quarter of a million weighted base paths know well; the five below have 16384 paths each.
#
# * the base's samples, weighted at the end by `exp(lam r)`: nothing is judged on the way
# * steered: judged by the reward of the predicted end point, resampled when the ESS falls below a half
# * steered and guided: moved along that reward's gradient as well
# * a tuned model: Adjoint Matching, trained here
# * both: the tuned model's moves, with resampling

# %%
UPDATES = 200
torch.manual_seed(0)
task = AdjointMatchingTask(
    NeuralTilt(base, hidden=64), reward, lam=LAM, checkpoint=False, loss_micro_batch=16384,
    optimizer=lambda p: torch.optim.Adam(p, lr=4e-3, betas=(0.9, 0.95)),
    lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.05, total_iters=UPDATES),
)  # fmt: skip
sampler = TrajectorySampler(steps=STEPS, samples_per_condition=1, seed=0)
trainer([sampler], UPDATES).fit(task, DrawsDataModule(256, UPDATES).train_dataloader())
training = sampler.evaluations.network

many, _ = steer(SMC(particles=2**18, replicates=1, twist="none"), seed=0)
reference = log_partition(many.log_w)

common = {"particles": PARTICLES, "replicates": REPLICATES}
ways = {
    "base, weighted": (SMC(twist="none", **common), base),
    "steered": (SMC(**common), base),
    "steered, guided": (SMC(guided=True, **common), base),
    "tuned, weighted": (SMC(twist="none", proposal="tuned", **common), task.predictor),
    "tuned, steered": (SMC(proposal="tuned", **common), task.predictor),
}
found, cost = {}, {}
for name, (smc, predictor) in ways.items():
    found[name], cost[name] = steer(smc, predictor)
last = {name: float(run.ess[-1].mean()) for name, run in found.items()}

_, continuous = mixture.tilt(reward, LAM)
print(f"log Z of the chain {reference.mean:.4f} +- {reference.se:.4f} (of continuous time: {float(continuous):.4f})")
for name, run in found.items():
    print(
        f"{name:16s} log Z {run.log_z.mean:.4f} +- {run.log_z.se:.4f}   ESS at the end {last[name]:.2f}   "
        f"{cost[name]} network evaluations a particle"
    )

# %%
figure = Figure(figsize=(10.2, 3.8), layout="constrained")
left, right = figure.subplots(1, 2)
looks = ((BASE, ":", "s"), (TUNED, "-", "o"), ("black", "-.", "D"), (EXACT, "--", "v"), (EXACT, (0, (5, 1, 1, 1)), "^"))
styles = dict(zip(ways, looks, strict=True))
t = base.process.grid(STEPS)[1:]
for name, run in found.items():
    colour, line, marker = styles[name]
    left.plot(t, run.ess.mean((1, 2)), color=colour, ls=line, lw=1.4, marker=marker, ms=4, markevery=5, label=name)
left.set(xlabel="t  (noise 0, data 1)", ylabel="ESS on arrival, before it is resampled", ylim=(0, 1.03))
left.legend(frameon=False, fontsize=8, loc="lower left")
for i, (name, run) in enumerate(found.items()):
    colour, _, marker = styles[name]
    right.errorbar(run.log_z.mean, -i, xerr=1.96 * run.log_z.se, color=colour, marker=marker, capsize=3)
right.axvline(reference.mean, color="black", lw=1, ls=":")
right.set_yticks([-i for i in range(len(found))], list(found))
right.set(xlabel="log Z, 95 % intervals (dotted: many base paths)")
right.locator_params(axis="x", nbins=5)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
show(figure, "08_log_z")

# %% [markdown]
# All five agree: that is what "Z is unbiased for any judge" means, with errors so small that the bias of the logarithm
# is not seen. They differ in their error bars. Steering is resampled
# some times on the way and arrives with an ESS that the plain weights are far from; the tuned model's paths need
# little resampling at all. Of the plain base nothing is weighed before the end; the weights of the tuned model fall as
# it leaves the base, and the reward at the end brings them back.

# %%
for name, run in found.items():
    apart = abs(run.log_z.mean - reference.mean)
    assert apart < 4 * (run.log_z.se**2 + reference.se**2) ** 0.5, name
    assert run.log_z.n == REPLICATES
assert last["steered"] > 2 * last["base, weighted"]
assert found["tuned, weighted"].log_z.se < found["base, weighted"].log_z.se
resampled = int(found["steered"].resampled.sum())
print(f"{resampled / REPLICATES:.1f} resamplings a replicate")
assert resampled > 0

# %% [markdown]
# ## 2. The samples
#
# Equal particles, drawn by their final weights, on contours of the exact tilt.

# %%
tilted, _ = mixture.tilt(reward, LAM)
figure = Figure(figsize=(11.0, 4.4), layout="constrained")
axes = figure.subplots(1, 3, sharex=True, sharey=True)
grid = torch.linspace(-4, 3.5, 160, dtype=torch.float64)
plane = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).reshape(-1, 2)
height = tilted.log_prob(plane).exp().reshape(160, 160)
generator = torch.Generator().manual_seed(0)
shown = {"base": many.end[:1500]}
for name in ("steered", "tuned, weighted"):
    run = found[name]
    chosen = torch.multinomial(run.log_w.softmax(0), 1500, replacement=True, generator=generator)
    shown[name] = run.end[chosen]
means = {}
for axis, (name, x), colour in zip(axes, shown.items(), (BASE, TUNED, EXACT), strict=True):
    means[name] = x.mean(0)
    axis.scatter(*x.T, s=4, lw=0, alpha=0.5, color=colour)
    axis.contour(grid, grid, height, [0.02, 0.1, 0.3], colors="black", linewidths=0.8)
    axis.set(title=name, xlabel="$x_1$", aspect="equal", xlim=(-4, 3.5), ylim=(-4, 3.5))
axes[0].set_ylabel("$x_2$")
show(figure, "08_samples")
print("exact mean", [round(v, 3) for v in tilted.mean.tolist()])
for name, mean in means.items():
    print(f"{name:16s}", [round(v, 3) for v in mean.tolist()])
assert float((means["steered"] - tilted.mean).norm()) < 0.2 * float((means["base"] - tilted.mean).norm())

# %% [markdown]
# ## 3. When training pays
#
# Steering pays for every sample anew, training pays once. What is a sample worth? Paths that were never resampled are
# worth their ESS. Of steered ones the ESS at the end flatters: copies of one particle count as several. The standard
# error of log Z does not, since its replicates never mix: n particles that give it are worth n/(1 + n se²) independent
# ones. Of 128 replicates se² is known to some 13 %, and that is the error printed. First like with like, **weighted
# samples of the tilt** from each way, in network evaluations per effective sample:

# %%
worth, doubt = dict(last), dict.fromkeys(last, 0.0)
for name in ("steered", "steered, guided", "tuned, steered"):
    noise = PARTICLES * found[name].log_z.se ** 2
    worth[name], doubt[name] = 1 / (1 + noise), cost[name] * noise * (2 / (REPLICATES - 1)) ** 0.5
price = {name: cost[name] / worth[name] for name in found}
for name, value in price.items():
    error = f" +- {doubt[name]:2.0f}" if doubt[name] else ""
    print(f"{name:16s} ESS {last[name]:.2f}, worth {worth[name]:.2f}: {value:4.0f}{error} evaluations a sample")


def paid(saved):
    """After how many samples training has paid for itself, within the error of what a steered one costs."""
    few, many = (training / (saved + sign * doubt["steered"]) / 1000 for sign in (1, -1))
    return f"{few:.0f},000 to {many:.0f},000 samples"


weighted = paid(price["steered"] - price["tuned, weighted"])
print(f"training took {training:,}: by weight it has paid for itself after some {weighted}")
assert price["steered"] + 2 * doubt["steered"] < price["base, weighted"]
assert price["tuned, weighted"] < price["steered"] - 2 * doubt["steered"]
assert worth["steered"] < 0.6 * last["steered"]

# %% [markdown]
# By weight a tuned path costs two evaluations a step, the model's and the base's, and a steered one costs one: that
# eats most of what training gained.
#
# The other comparison is not like with like: the tuned model's samples **without weights** cost forty evaluations each
# and are not the tilt's. How far they are from it, as a sliced W2 beside that of perfect samples:

# %%
perfect = tilted.sample(40_000, torch.Generator().manual_seed(3))
floor = noise_floor(sliced_wasserstein2, perfect, PARTICLES, repeats=4)
apart = {}
for label, name, by_weight in (
    ("base", "base, weighted", False), ("steered, by weight", "steered", True),
    ("tuned, by weight", "tuned, weighted", True), ("tuned, no weights", "tuned, weighted", False),
):  # fmt: skip
    run = found[name]
    apart[label] = float(sliced_wasserstein2(run.end, perfect[:PARTICLES], run.log_w.softmax(0) if by_weight else None))
    print(f"{label:20s} {apart[label]:.3f}")
print(f"{'perfect samples':20s} {floor.mean:.3f} +- {floor.se:.3f}")
print(f"where that will do, training has paid for itself after some {paid(price['steered'] - STEPS)}")
assert apart["tuned, no weights"] < 0.4 * apart["base"]
assert apart["tuned, no weights"] > 2 * apart["steered, by weight"] and apart["tuned, no weights"] > 3 * floor.mean

# %% [markdown]
# Few samples, a reward that changes by the hour, a reward without gradient: steer. Hundreds of thousands of samples of
# one tilt, or samples among which no copies may stand: train. Where they must be the tilt's, weigh them; where it will
# do that they are near it, training pays two to four times as early.
#
# ## 4. The digits
#
# The same on the small text-to-image model. On the command line this is `lightning-tilt predict --config
# configs/digits/sd15_adjoint_matching.yaml --steering smc`.

# %%
torch.manual_seed(0)
LAM_INK, prompts = 50.0, ["a handwritten three", "the digit 5", "eight", "a handwritten zero"]
digits = AdjointMatchingTask(StableDiffusion(str(folder("digits-sd15")), rank=4), Ink(), lam=LAM_INK)
plain = TrajectorySampler(steps=16, samples_per_condition=64, seed=0, rollout_micro_batch=64, reward_micro_batch=64)
few, many_more = (SteeredSampler(plain, SMC(particles=n, replicates=8)) for n in (64, 192))
callbacks = {"base": plain, "64 particles": few, "192 particles": many_more}
runs = {}
for name, callback in callbacks.items():
    (runs[name],) = trainer([callback], 0, inference_mode=False).predict(digits, DataLoader(prompts, len(prompts)))

asked, rows = [prompt for prompt in prompts for _ in range(64)], len(prompts)
judge = DigitAccuracy()
ink = {name: run["reward"].double().view(rows, -1) for name, run in runs.items()}
right = {name: judge.score(run["images"].float(), asked).double().view(rows, -1) for name, run in runs.items()}
p = (LAM_INK * ink["base"]).softmax(1)
weighted = stratified([log_partition(LAM_INK * row) for row in ink["base"]])
log_z = {name: Estimate(**callbacks[name].found[0]["log_z"]) for name in runs if name != "base"}
ess_base = sum(ess(LAM_INK * row) for row in ink["base"]) / rows
print("means over four prompts")
print(f"base            ink {float(ink['base'].mean()):.4f}   read right {float(right['base'].mean()):.3f}")
exact, exactly_right = (float((p * v["base"]).sum(1).mean()) for v in (ink, right))
print(
    f"base, by weight ink {exact:.4f}   read right {exactly_right:.3f}"
    f"   log Z {weighted.mean:.3f} +- {weighted.se:.3f}   ESS {ess_base:.2f}"
)
for name, estimate in log_z.items():
    seen = callbacks[name].found[0]
    print(
        f"{name:15s} ink {float(ink[name].mean()):.4f}   read right {float(right[name].mean()):.3f}"
        f"   log Z {estimate.mean:.3f} +- {estimate.se:.3f}   ESS {seen['ess'][-1]:.2f}"
        f"   64 samples of {seen['ancestors']:.0f} ancestors"
    )
print("read right, prompt by prompt:")
for name, row in right.items():
    print(f"  {name:15s}", *(f"{prompt}: {v:.2f}  " for prompt, v in zip(prompts, row.mean(1).tolist(), strict=True)))

# %%
figure = Figure(figsize=(12.6, 2.4), layout="constrained")
axes = figure.subplots(1, 3)
for axis, (name, run) in zip(axes, runs.items(), strict=True):
    images = run["images"].view(rows, -1, *run["images"].shape[1:])[:, ::8]
    axis.imshow(torch.cat([torch.cat([*row], -1) for row in images], -2).permute(1, 2, 0).clamp(0, 1).numpy())
    axis.set_title(name if name == "base" else f"steered, {name}")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
size = images.shape[-1]
axes[0].set_yticks([size * (i + 0.5) for i in range(rows)], prompts, fontsize=8)
show(figure, "08_digits")

# %%
for name, estimate in log_z.items():
    assert abs(estimate.mean - weighted.mean) < 4 * (estimate.se**2 + weighted.se**2) ** 0.5, name
    assert float(ink[name].mean()) > float(ink["base"].mean()) + 0.5 * (exact - float(ink["base"].mean()))
    assert float(right[name].mean()) > 0.9
assert few.found[0]["ancestors"] < 40 and few.found[0]["ancestors"] < many_more.found[0]["ancestors"]

# %% [markdown]
# The steered digits have the ink of the tilt, and the classifier reads them as well as the base's. The eye is less
# content: with 64 particles several eights are one and the same filled blob, and some fives lean towards an S. That is
# what few ancestors do: one bold particle was copied again and again, and the 64 samples of a prompt descend from fewer
# than forty. Three times the particles for the same 64 samples have more ancestors and fewer copies. What is left of
# filled strokes is the reward's own wish: ink is all it asks for, and the base's samples by weight have as much of it.

# %% [markdown]
# # 07 Sampling a density
#
# An unnormalised density `exp(-E)` is the tilt of a Gaussian base by `-E - log p_base`: the losses that fine-tune
# image models sample it, and log Z of the run is that of the density. This notebook takes an energy of one line,
# trains a sampler by Adjoint Sampling, and asks how good the samples are, with the distance that *perfect* samples
# would have beside each number.  The answer: a set of some hundred cannot be told from perfect ones, a set of eight
# thousand can, and weights mend most of that.

# %%
import math

import torch
from _common import show, trainer
from matplotlib.figure import Figure

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.identities import Estimate, ess, expectation, log_partition, mean
from lightning_tilt.metrics import sliced_wasserstein2
from lightning_tilt.models import GaussianBase, NeuralTilt
from lightning_tilt.rewards.density import Density
from lightning_tilt.rewards.energies import FunctionDensity
from lightning_tilt.tasks import AdjointSamplingTask
from lightning_tilt.transition import ExactGaussian

# %% [markdown]
# ## 1. An energy
#
# A ring of radius 3 with three bright places, in polar coordinates
#
#     E = 2 (rho - 3)^2 - k(rho) cos 3 phi,        k = 2 rho^3/(rho^3 + 27)
#
# That is all a user needs: a function of a batch of states. On the command line it would be
# `--model.reward FunctionDensity --model.reward.function my_energies.ring`.


# %%
def ring(x: torch.Tensor) -> torch.Tensor:
    """(B, 2) -> (B,)."""
    rho = x.norm(dim=1)
    return 2 * (rho - 3) ** 2 - 2 * (x[:, 0] ** 3 - 3 * x[:, 0] * x[:, 1] ** 2) / (rho**3 + 27)


UPDATES, EVERY, NOISINGS, STEPS = 400, 20, 4, 60
base = GaussianBase([2], scale=2.5)
torch.manual_seed(0)
task = AdjointSamplingTask(
    NeuralTilt(base, hidden=96, input_scale=2.5, guide=FunctionDensity(ring)), FunctionDensity(ring),
    noisings=NOISINGS, time_sampling="importance", t_min=0.01, t_max=0.99, path_weights="self_normalised",
    checkpoint=False,
    optimizer=lambda p: torch.optim.Adam(p, lr=5e-3, betas=(0.9, 0.99)),
    lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.03, total_iters=UPDATES),
)  # fmt: skip
sampler = TrajectorySampler(
    steps=STEPS, samples_per_condition=1, seed=0, transition=ExactGaussian(base.precision), rollout_every=EVERY,
    buffer_size=8, replay_samples=1024,
)  # fmt: skip
trainer([sampler], UPDATES).fit(task, DrawsDataModule(1024, UPDATES).train_dataloader())
count = sampler.evaluations
print(f"{NOISINGS * EVERY} supervised pairs an end point, {count.forwards_per_pair:.1f} forwards a pair")
print(f"{count.reward / count.pairs:.1f} energies a pair, nearly all of them the guide's")

# %% [markdown]
# End points are kept in a buffer and noised again and again: one simulation and one gradient of the energy serve many
# updates. The `guide` is the other choice: the gradient of the energy at the predicted end point helps the network, and
# costs an energy with every call. Where the energy is expensive, leave it out and take more updates.
#
# ## 2. Numbers that need no truth
#
# Of the trained model's own paths come ESS and log Z with its standard error, and every expectation under the density
# by the weights of the paths. (What they cannot tell is in notebook 05.)


# %%
def paths(n: int, of_base: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """End points (n, 2) and log weights (n,)."""
    path = sampler.rollout(task, torch.zeros(1), stream="report", number=0, base=of_base, samples_per_condition=n)
    if of_base:
        return path.end, path.reward.double()
    return path.end, sampler.chain(task, count=False).log_weights(task.predictor, path, 1.0).double()


x, log_w = paths(8000)
x_base, log_w_base = paths(8000, of_base=True)
log_z = log_partition(log_w)
for name, found in (("tuned", log_z), ("base", log_partition(log_w_base))):
    print(f"{name:5s} ESS {found.ess:.3f}, log Z {found.mean:.4f} +- {found.se:.4f}")
print(f"mean energy: {ring(x).mean():.4f} of the samples, {expectation(ring(x), log_w).mean:.4f} by weight")

# %% [markdown]
# ## 3. With the truth beside it
#
# This energy was chosen so that everything is known: the radius by an integral in one dimension, the angle by a von
# Mises law. A `Density` says what it knows, and `TiltReport` then writes all of the following by itself.


# %%
class Ring(Density):
    """exp(-E) of `ring`, with log Z and exact samples: given rho the angle is von Mises', of concentration k(rho)."""

    rho = torch.linspace(0, 9, 40001, dtype=torch.float64)
    k = 2 * rho**3 / (rho**3 + 27)
    # int exp(k cos 3 phi) dphi = 2 pi I_0(k)
    radial = torch.exp(-2 * (rho - 3) ** 2) * rho * 2 * math.pi * torch.special.i0(k)
    log_z = float(torch.trapezoid(radial, rho).log())

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 2) -> (B,)."""
        return ring(x)

    def reference(self, n: int, seed: int = 0) -> torch.Tensor:
        """Exact samples, (n, 2)."""
        generator = torch.Generator().manual_seed(seed)
        i = torch.multinomial(self.radial, n, replacement=True, generator=generator)
        rho = self.rho[i]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            phi = torch.distributions.VonMises(torch.zeros(n).double(), self.k[i].clamp(min=1e-9)).sample()
        phi = (phi + 2 * math.pi * torch.randint(3, (n,), generator=generator)) / 3
        return torch.stack([rho * phi.cos(), rho * phi.sin()], 1).float()


truth = Ring()
print(f"log Z {log_z.mean:.4f} +- {log_z.se:.4f}, true {truth.log_z:.4f}")
reference = truth.reference(40_000)
assert abs(log_z.mean - truth.log_z) < 4 * log_z.se < 0.1
assert abs(expectation(ring(x), log_w).mean - float(ring(reference).mean())) < 4 * expectation(ring(x), log_w).se + 0.02

# %%
figure = Figure(figsize=(11.0, 4.5), layout="constrained")
axes = figure.subplots(1, 3, sharex=True, sharey=True)
grid = torch.linspace(-5, 5, 200)
plane = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).reshape(-1, 2)
height = (-ring(plane)).exp().reshape(200, 200)
sets = {"base": (x_base, "#7f8c99"), "tuned": (x, "#c8553d"), "truth": (reference, "#2b6777")}
for axis, (name, (points, colour)) in zip(axes, sets.items(), strict=True):
    axis.scatter(*points[:2000].T, s=3, lw=0, alpha=0.5, color=colour)
    axis.contour(grid, grid, height, [0.1, 0.5, 1.5], colors="black", linewidths=0.7)
    axis.set(title=name, xlabel="$x_1$", aspect="equal", xlim=(-5, 5), ylim=(-5, 5))
axes[0].set_ylabel("$x_2$")
show(figure, "07_samples")

# %% [markdown]
# ## 4. A distance means nothing without its floor
#
# Two sets of N *perfect* samples are apart too. The floor is that distance, truth against truth, at the same N. A
# sliced W2 of 0.2 may be a poor sampler at N = 8000 and a perfect one at N = 500. One set scatters as well, so six
# disjoint sets of each are compared with six disjoint sets of the truth.

# %%
sizes, SETS = [250, 500, 1000, 2000, 4000, 8000], 6
reference = truth.reference(2 * SETS * sizes[-1], seed=1)
x_base, log_w_base = paths(SETS * sizes[-1], of_base=True)
x, log_w = paths(SETS * sizes[-1])
points = {"base": x_base, "tuned": x, "floor": reference[SETS * sizes[-1] :]}  # the truth once more
curves: dict[str, list[Estimate]] = {
    name: [
        mean(
            torch.stack(
                [sliced_wasserstein2(x[i * n : (i + 1) * n], reference[i * n : (i + 1) * n]) for i in range(SETS)]
            )
        )
        for n in sizes
    ]
    for name, x in points.items()
}
figure = Figure(figsize=(6.4, 3.9), layout="constrained")
axis = figure.subplots()
styles = {"base": ("#7f8c99", "s", "--", "base"), "tuned": ("#c8553d", "o", "-", "tuned")}
styles |= {"floor": ("#2b6777", "^", ":", "floor: truth against truth")}
for name, (colour, marker, line, label) in styles.items():
    value, scatter = [e.mean for e in curves[name]], [e.se * SETS**0.5 for e in curves[name]]
    axis.errorbar(sizes, value, scatter, color=colour, marker=marker, ls=line, ms=4, capsize=2, label=label)
axis.set(xscale="log", yscale="log", xlabel="N, samples on either side", ylabel="sliced W2, scatter of one set")
axis.set_xticks(sizes, [str(n) for n in sizes])
axis.set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
axis.minorticks_off()
axis.legend(frameon=False, fontsize=8, loc="lower left")
axis.spines[["top", "right"]].set_visible(False)
show(figure, "07_floors")

# %%
for i, n in enumerate(sizes):
    print(f"N = {n:5d}:", *(f"  {name} {e[i].mean:.3f} +- {e[i].se:.3f}" for name, e in curves.items()))
base_curve, tuned, floors = curves.values()
slope = math.log(floors[-1].mean / floors[0].mean) / math.log(sizes[-1] / sizes[0])
print(f"the floor falls as N^{slope:.2f}")
print(f"N = {sizes[-1]}: the tuned samples are {tuned[-1].mean / floors[-1].mean:.1f} floors from the truth")
assert -0.75 < slope < -0.3  # N^-1/2
assert base_curve[-1].mean > 5 * floors[-1].mean and tuned[-1].mean < 0.5 * base_curve[-1].mean
assert tuned[0].mean < 2 * floors[0].mean  # a small set tells little
assert tuned[-1].mean - floors[-1].mean > 4 * math.hypot(tuned[-1].se, floors[-1].se)  # a large one tells

# %% [markdown]
# At N = 250 the tuned samples are as near to the truth as other samples of the truth: the distance says nothing there,
# not that the sampler is perfect. The floor goes on falling and the tuned curve does not. From N = 2000 on it lies
# clearly above, and at N = 8000 it is more than three floors away, a quarter of the base's distance. **The unweighted
# sampler is good, and it is not the density**: what is left is its own error, some 0.17.
#
# ## 5. Weights are part of the sampler
#
# The tuned model is not perfect, and its weights know by how much. A weighted set of N points is worth ESS x N equal
# ones, so its floor is that of fewer samples: ESS x N perfect ones against N. Six sets of each, by the distance of
# before.

# %%
N = sizes[-1]
rows = {}
for name, points_of, w in (
    ("base", x_base, None), ("base, weighted", x_base, log_w_base), ("tuned", x, None), ("tuned, weighted", x, log_w)
):  # fmt: skip
    fraction = 1.0 if w is None else ess(w)
    equal, seen = int(fraction * N), []
    for i in range(SETS):
        part = slice(i * N, (i + 1) * N)
        perfect = reference[(SETS + i) * N :][:equal]
        p = None if w is None else w[part].softmax(0)
        seen.append(
            (sliced_wasserstein2(points_of[part], reference[part], p), sliced_wasserstein2(perfect, reference[part]))
        )
    rows[name] = [mean(torch.stack(column)) for column in zip(*seen, strict=True)]
    value, floor = rows[name]
    print(
        f"{name:16s} worth {equal:5d}   sliced W2 {value.mean:.3f} +- {value.se:.3f}   "
        f"floor {floor.mean:.3f} +- {floor.se:.3f}   {value.mean / floor.mean:.1f} floors"
    )
assert rows["tuned, weighted"][0].mean < 0.6 * rows["tuned"][0].mean
for name in ("base, weighted", "tuned, weighted"):
    assert rows[name][0].mean < 2 * rows[name][1].mean

# %% [markdown]
# By weight both are within their floors of the truth, the base as well: importance sampling is right on average, and a
# set of 8000 of its samples is worth 2000. What training buys is the ESS, and samples that are near without weights.
# (The metric `Wasserstein2` takes log weights too; the floor that it gives is that of N equal samples.)
#
# The same lines serve `GMM40`, `ManyWell32`, `DoubleWell4`, `LennardJones13`, `Phi4`: `configs/densities/`.

# %% [markdown]
# # 07 Sampling a density
#
# An unnormalised density `exp(-E)` is the tilt of a Gaussian base by `-E - log p_base`: the losses that fine-tune
# image models sample it, and log Z of the run is that of the density. This notebook takes an energy of one line,
# trains a sampler by Adjoint Sampling, and asks how good the samples are, with the distance that *perfect* samples
# would have beside each number.

# %%
import math
from collections.abc import Callable

import torch
from _common import show, trainer
from matplotlib.figure import Figure

from lightning_tilt.callbacks import TrajectorySampler
from lightning_tilt.data import DrawsDataModule
from lightning_tilt.identities import expectation, log_partition
from lightning_tilt.metrics import Wasserstein2, noise_floor, sliced_wasserstein2
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
# sliced W2 of 0.1 may be a poor sampler at N = 8000 and a perfect one at N = 500.

# %%
sizes = [250, 500, 1000, 2000, 4000, 8000]
distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = sliced_wasserstein2
floors = [noise_floor(distance, reference, n, repeats=8) for n in sizes]


def curve(points: torch.Tensor) -> list[float]:
    """Distance of the first n points from n reference samples, the mean over a few sets of those."""
    return [sum(float(distance(points[:n], reference[i * n : (i + 1) * n])) for i in range(4)) / 4 for n in sizes]


values = {"base": curve(x_base), "tuned": curve(x)}
figure = Figure(figsize=(5.8, 3.8), layout="constrained")
axis = figure.subplots()
axis.plot(sizes, values["base"], "s--", color="#7f8c99", ms=4, label="base")
axis.plot(sizes, values["tuned"], "o-", color="#c8553d", ms=4, label="tuned")
scatter = [f.se * 8**0.5 for f in floors]
axis.errorbar(
    sizes,
    [f.mean for f in floors],
    scatter,
    color="#2b6777",
    marker="^",
    ms=4,
    capsize=2,
    label="floor: truth against truth",
)
axis.set(xscale="log", yscale="log", xlabel="N, samples on either side", ylabel="sliced W2")
axis.set_xticks(sizes, [str(n) for n in sizes])
axis.set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
axis.minorticks_off()
axis.legend(frameon=False, fontsize=8)
axis.spines[["top", "right"]].set_visible(False)
show(figure, "07_floors")

# %%
for n, base_value, value, floor in zip(sizes, values["base"], values["tuned"], floors, strict=True):
    print(f"N = {n:5d}: base {base_value:.3f}   tuned {value:.3f}   floor {floor.mean:.3f} +- {floor.se:.3f}")
slope = math.log(floors[-1].mean / floors[0].mean) / math.log(sizes[-1] / sizes[0])
print(f"the floor falls as N^{slope:.2f}")
assert -0.75 < slope < -0.3  # N^-1/2
assert values["base"][-1] > 5 * floors[-1].mean and values["tuned"][-1] < 0.5 * values["base"][-1]

# %% [markdown]
# ## 5. Weights are part of the sampler
#
# The tuned model is not perfect, and its weights know by how much. `Wasserstein2` takes log weights, and gives value
# and floor of the same N. Here it measures the exact distance, the base's samples, the tuned ones, and both again by
# weight.

# %%
N = 1500
table = {}
for name, points, w in (
    ("base", x_base, None), ("base, weighted", x_base, log_w_base), ("tuned", x, None), ("tuned, weighted", x, log_w)
):  # fmt: skip
    metric = Wasserstein2(reference[:6000], floor=4)
    metric.update(points[:N], None if w is None else w[:N])
    table[name] = metric.compute()
for name, row in table.items():
    value, floor, se = (float(row["wasserstein2" + end]) for end in ("", "_floor", "_floor_se"))
    print(f"{name:16s} W2 {value:.3f}   floor {floor:.3f} +- {se:.3f}")
assert float(table["tuned"]["wasserstein2"]) < 0.5 * float(table["base"]["wasserstein2"])

# %% [markdown]
# A weighted sample of N points is worth about ESS x N of them, so its own floor is that of fewer samples: the weighted
# base, of low ESS, is right on average and coarse. What training buys is the ESS.
#
# The same lines serve `GMM40`, `ManyWell32`, `DoubleWell4`, `LennardJones13`, `Phi4`: `configs/densities/`.

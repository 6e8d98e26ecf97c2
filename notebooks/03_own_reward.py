# %% [markdown]
# # 03 Your own reward, with a gradient and without
#
# A reward is a class with one method: images in, one number a sample out. If what happens inside is differentiable,
# the losses that use gradients take it as it is. If not, one line says so, and there are losses that need the value
# alone. Both kinds are tried here on the small Stable Diffusion of digits that comes with the package, in three short
# runs.

# %%
import io
import json
import tempfile
from pathlib import Path

import lightning as L
import torch
from _common import show, trainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from lightning_tilt import DDIM, TrajectorySampler
from lightning_tilt.assets import folder
from lightning_tilt.callbacks import TiltReport
from lightning_tilt.data import PromptDataModule
from lightning_tilt.models import StableDiffusion
from lightning_tilt.rewards import Reward
from lightning_tilt.tasks import AdjointMatchingTask, TiltMatchingTask

# %% [markdown]
# ## With a gradient
#
# Ten lines would be generous.


# %%
class LeftHalf(Reward):
    """How much brighter the left half is than the right one, in [-1, 1]."""

    def score(self, images, prompts):  # (B, 3, H, W) in [0, 1] -> (B,)
        left, right = images.chunk(2, dim=-1)
        return left.flatten(1).mean(1) - right.flatten(1).mean(1)


# %% [markdown]
# Three things are asked of it, and they are quickly checked: one number a sample, from that sample alone, and a
# gradient that arrives at the image.

# %%
images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
score = LeftHalf().score(images, None)
(gradient,) = torch.autograd.grad(score[0], images)
assert score.shape == (4,) and score.dtype == images.dtype
assert gradient[0].any() and not gradient[1:].any()

# %% [markdown]
# ## Without a gradient
#
# Whatever rounds, counts, decodes or asks another program has none. The trait `is_differentiable = False` says it,
# and a loss that needs one refuses the reward before anything is computed.


# %%
class Small(Reward):
    """Negative size of the image as a PNG file, in units of 100 bytes."""

    is_differentiable = False

    @torch.no_grad()
    def score(self, images, prompts):
        pixels = (images.clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
        files = [io.BytesIO() for _ in pixels]
        for array, file in zip(pixels, files, strict=True):
            Image.fromarray(array).save(file, "PNG")
        return torch.tensor([-file.tell() / 100 for file in files]).to(images)


# %% [markdown]
# ## A run with each
#
# The scale of `lam` follows from the reward's spread over base samples: `lam` times that spread is what the weights
# $e^{\lambda r}$ vary by, and values around 1 leave the base recognisable. Adjoint Matching uses the gradient along
# whole paths. `TiltReport` samples the base before and the tuned model after, and says by reweighting where the exact
# tilt is.

# %%
PROMPTS = ["a handwritten three", "a handwritten seven"]
NETWORK = {"rank": 16, "targets": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]}


def tune(task, reward, updates, lr, sampler, **loss):
    """Train, and return the report with its folder."""
    L.seed_everything(0, verbose=False)
    module = task(
        predictor=StableDiffusion(folder("digits-sd15"), **NETWORK),
        reward=reward,
        optimizer=lambda p: torch.optim.Adam(p, lr=lr, betas=(0.9, 0.95)),
        **loss,
    )
    home = Path(tempfile.mkdtemp())
    report = TiltReport(base_samples=128, tuned_samples=128, steps=10, transition=DDIM())
    run = trainer([TrajectorySampler(**sampler), report], updates, default_root_dir=home)
    run.fit(module, datamodule=PromptDataModule(PROMPTS, batch_size=len(PROMPTS)))
    return json.loads((home / "report.json").read_text()), home


def say(report):
    """The numbers of one report."""
    for key in ("reward_base", "reward_tuned", "reward_exact"):
        print(f"{key:14s} {report[key]['mean']:8.4f} +- {report[key]['se']:.4f}")
    spent = sum(report["evaluations"][kind] for kind in ("forward", "vjp", "backward"))
    print(f"the way to the exact tilt {report['way']:.0%}")
    print(f"{report['updates']} updates, {spent:,} network evaluations")


left, left_home = tune(
    AdjointMatchingTask, LeftHalf(), 12, 3e-3, {"steps": 10, "samples_per_condition": 9}, lam=30.0, checkpoint=False
)
say(left)

# %% [markdown]
# Tilt Matching has only the values: it regresses on noised end points of a few steps of the ODE. It does not go to
# `lam` at once but in levels $0 < h_1 < h_1 + h_2 < \dots$: at each it rolls the model out, takes it for the tilt at
# the level reached so far, and trains it towards the next.
#
# - `level_ess` chooses how far apart two levels are: as far as leaves this ESS to the weights $e^{h r}$.
# - `rollout_every` is the number of updates that a level is given.
#
# When the last level is `lam`, it ends by itself, whatever `max_steps` allows, for at `lam` there is nothing left to
# regress on. And what a level misses is not made good by the next, which starts from where the model is and takes it
# for where it should be. So a run that ended short of the tilt wants more updates a level, not more updates. Here is
# one with four a level, and one with more.

# %%
ODE = {"steps": 8, "transition": DDIM(ddim_eta=0.0), "base_last_step": False, "samples_per_condition": 16}
MOST = 200


def tune_by_levels(updates_a_level):
    """Tilt Matching on file sizes: the reward without a gradient."""
    return tune(
        TiltMatchingTask, Small(), MOST, 2e-3, ODE | {"rollout_every": updates_a_level}, lam=1.0, variant="explicit",
        level_ess=0.85,
    )  # fmt: skip


hasty, _ = tune_by_levels(4)
say(hasty)
small, small_home = tune_by_levels(20)
say(small)

# %% [markdown]
# Both ended at `lam` by themselves, long before the 200 updates that they were allowed, and the second is further. It
# is not at the tilt either: with 32 end points an update the regression is a noisy one. More of them
# (`samples_per_condition`, `noisings`), more updates a level and more levels (`level_ess` nearer to 1) are the ways on;
# a larger `max_steps` is not.
#
# The command line takes the same class from any file that can be imported:
#
#     lightning-tilt fit --config configs/digits/sd15_adjoint_matching.yaml --model.reward my_rewards.LeftHalf
#
# Adjoint Matching with the other one is refused in one line:

# %%
try:
    tune(AdjointMatchingTask, Small(), 1, 1e-3, {"steps": 4})
except TypeError as error:
    print(error)
    assert "Small has none" in str(error)
else:
    raise AssertionError("a reward without gradient was taken")

assert 0.5 < left["way"] < 1.2
for report, updates_a_level in ((hasty, 4), (small, 20)):
    assert report["updates"] % updates_a_level == 0 and report["updates"] < MOST  # it ended after a level, by itself
gap, se = small["reward_tuned"]["mean"] - hasty["reward_tuned"]["mean"], small["reward_tuned"]["se"]
assert gap > 2 * se  # from the same noise: less than the error of two independent means
assert 0.4 < small["way"] < 1.3

# %%
figure = Figure(figsize=(10, 5.2), layout="constrained")
for axes, home, name in zip(
    figure.subplots(2, 2, width_ratios=(1.35, 1)), (left_home, small_home), ("LeftHalf", "Small"), strict=True
):
    for axis, picture in zip(axes, ("before_after.png", "reward_histogram.png"), strict=True):
        axis.imshow(imread(home / picture))
        axis.set_axis_off()
    axes[0].set_title(name, loc="left", fontsize=11)
show(figure, "03_rewards")

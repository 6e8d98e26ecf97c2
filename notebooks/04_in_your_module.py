# %% [markdown]
# # 04 The mixin in your own LightningModule
#
# You have a LightningModule: a network, a training loss, a validation, an optimiser. A loss of this package is a
# mixin that goes in front of it. What your module must offer are three attributes, `predictor`, `process` and
# `reward`; everything else stays yours. Below is such a module from start to end: a flow-matching model of points in
# the plane, pretrained by its own loss, then tilted - with its own validation, its own optimiser, and a second loss
# of its own beside the tilt.

# %%
from contextlib import contextmanager
from copy import deepcopy

import lightning as L
import torch
from _common import show, trainer
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from lightning_tilt import AdjointMatching, Frozen, Predictor, RectifiedFlow, Reward, TrajectorySampler
from lightning_tilt.identities import expectation, log_partition, mean

# %% [markdown]
# ## The module that was there before
#
# Nothing in it knows of tilting. The batch is what its loader brings: points (B, 2) on two half circles.


# %%
def moons(n):
    """Points on two interlocking half circles, with a little noise."""
    angle = torch.pi * torch.rand(n)
    second = (torch.rand(n) < 0.5).float()
    x = torch.stack([angle.cos() * (1 - 2 * second) + second, angle.sin() * (1 - 2 * second) + second / 2], 1)
    return 1.5 * (x - torch.tensor([0.5, 0.25])) + 0.12 * torch.randn(n, 2)


class Velocity(nn.Module):
    """v(x, t): a perceptron that sees a few waves of t."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, t):
        waves = t[:, None] * torch.pi * torch.arange(1, 5)
        return self.layers(torch.cat([x, waves.cos(), waves.sin()], 1))


class FlowModule(L.LightningModule):
    """Flow matching: v(X_t, t) learns X_1 - X_0 on X_t = t X_1 + (1 - t) X_0."""

    def __init__(self, network, lr):
        super().__init__()
        self.network, self.lr = network, lr

    def flow_loss(self, x1):
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        xt = t[:, None] * x1 + (1 - t[:, None]) * x0
        return (self.network(xt, t) - (x1 - x0)).pow(2).mean()

    def training_step(self, batch, batch_idx):
        return self.flow_loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/flow_loss", self.flow_loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batches, size):
    return DataLoader(moons(batches * size), batch_size=size)


L.seed_everything(0, verbose=False)
pretrained = FlowModule(Velocity(), lr=5e-3)
trainer([], 1500).fit(pretrained, loader(1500, 256))

# %% [markdown]
# ## The adapter, and the reward
#
# A `Predictor` says what the network predicts (here a velocity), of which process (here the straight lines of
# rectified flow), and what the untuned model is: a frozen copy, which is not trained, not saved and never in train
# mode.


# %%
class FlowPredictor(Predictor):
    """The velocity network, and its frozen copy as the base."""

    prediction_type = "velocity"
    state_shape = (2,)

    def __init__(self, network):
        super().__init__()
        self.process = RectifiedFlow()
        self.network = network
        self.untuned = Frozen(deepcopy(network))
        self.asked = [network]  # in a list: it is no second child

    def predict(self, x, t, condition):
        return self.asked[0](x, t.to(x))

    @contextmanager
    def base(self):
        self.asked[0] = self.untuned
        try:
            yield self
        finally:
            self.asked[0] = self.network


class Right(Reward):
    """How far right a point is, softly bounded: a sigmoid of x_1."""

    def score(self, points, prompts):
        return torch.sigmoid(2 * points[:, 0])


# %% [markdown]
# ## The mixin in front, and a second loss
#
# The host of the tilt is the old module with three attributes more. Its validation is inherited, its optimiser gets a
# second group of parameters with a learning rate of its own. The sampler reads nothing of the batch but its length:
# 128 points ask for 128 paths.
#
# The second loss is a value network that learns, from the very rollouts that the tilt trains on, what reward a path
# will have: $V(x, t) \approx \mathbb{E}[r(X_1) \mid X_t = x]$. It costs no further evaluation of the velocity, and
# since it shares no parameter with the velocity, it does not move the tilt's fixed point. `super().training_step` is
# the tilt's loss.

# %%
LAM = 3.0


class Host(FlowModule):
    """The old module with what a tilt asks for, and its own loss of a value network."""

    def __init__(self, network, lr):
        super().__init__(network, lr)
        self.predictor = FlowPredictor(network)
        self.process = self.predictor.process
        self.reward = Right()
        self.value = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def configure_optimizers(self):
        groups = [{"params": self.network.parameters()}, {"params": self.value.parameters(), "lr": 5 * self.lr}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def value_loss(self, path):
        x = path.states.flatten(0, 1)
        t = path.t.to(x).repeat_interleave(len(path))[:, None]
        return (self.value(torch.cat([x, t], 1)).squeeze(1) - path.reward.repeat(len(path.t))).pow(2).mean()


class Tuned(AdjointMatching, Host):
    """Adjoint Matching first, the host second."""

    def training_step(self, batch, batch_idx):
        tilt = super().training_step(batch, batch_idx)
        value = self.value_loss(self.sampler.trajectory)
        self.log_dict({"train/tilt": tilt.detach(), "train/value": value.detach()})
        return tilt + value

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)  # how well the data are still fitted
        path = self.sampler.rollout(self, batch, stream="validate", number=batch_idx)
        self.log("val/reward", path.reward.mean())


class Curves(L.Callback):
    """Keeps what was logged."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, *args):
        self.train.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer, *args):
        self.val.append({k: float(v) for k, v in trainer.callback_metrics.items()} | {"update": trainer.global_step})


UPDATES = 100
module = Tuned(deepcopy(pretrained.network), lr=2e-3, lam=LAM, checkpoint=False)
sampler, curves = TrajectorySampler(steps=25, samples_per_condition=1), Curves()
run = trainer([sampler, curves], UPDATES, val_check_interval=10, log_every_n_steps=1)
held_out = loader(4, 256)
run.validate(module, held_out, verbose=False)  # the untuned model
run.fit(module, loader(UPDATES, 128), held_out)
for name in ("val/reward", "val/flow_loss"):
    print(f"{name:14s}" + "".join(f"{v[name]:8.3f}" for v in curves.val))

# %% [markdown]
# The reward goes up, and the fit to the data goes down: the tilt is another law than the data's. Both are validations
# that a Trainer knows how to monitor, checkpoint and stop by.
#
# ## Did it reach the tilt?
#
# 8000 base samples of the same chain, weighted by $e^{\lambda r}$, say where the exact tilt is; the tuned paths have
# weights of their own, and both ways lead to one $\log Z$. The value network is checked on fresh paths: of the
# variance of a path's reward it can explain nothing at $t = 0$, since the chain is memoryless, and nearly all at $t =
# 1$. At $t = 0$ the best is a constant, and 0. This one is below 0, so worse than a constant: each update shows it 128
# rewards and as many starting points that have nothing to do with them, and it has read something into those.


# %%
@torch.no_grad()
def look(n, base, sampler=sampler):
    """A rollout of n paths, and their log weights."""
    path = sampler.rollout(module, torch.zeros(n), stream="report", number=0, base=base)
    chain = sampler.chain(module, count=False)
    return path, LAM * path.reward if base else chain.log_weights(module.predictor, path, LAM)


base, base_w = look(8000, base=True)
tuned, tuned_w = look(4000, base=False)
reward_base, reward_tuned = mean(base.reward.double()), mean(tuned.reward.double())
reward_exact = expectation(base.reward, base_w)
log_z = log_partition(base_w), log_partition(tuned_w)
way = (reward_tuned.mean - reward_base.mean) / (reward_exact.mean - reward_base.mean)
for name, number in (
    ("reward, base", reward_base), ("reward, tuned", reward_tuned), ("reward, exact tilt", reward_exact),
    ("log Z, base", log_z[0]), ("log Z, tuned", log_z[1]),
):  # fmt: skip
    print(f"{name:20s} {number.mean:7.4f} +- {number.se:.4f}")
print(f"the way {way:.0%}, ESS of the base {log_z[0].ess:.2f}, of the tuned paths {log_z[1].ess:.2f}")

with torch.no_grad():
    t = tuned.t.to(tuned.states)
    value = torch.stack(
        [module.value(torch.cat([x, s.expand(len(x), 1)], 1)).squeeze(1) for x, s in zip(tuned.states, t, strict=True)]
    )
explained = 1 - (value - tuned.reward).pow(2).mean(1) / tuned.reward.var()
print(f"variance explained by the value network: {explained[0]:.2f} at t = 0, {explained[-1]:.2f} at t = 1")
print(f"at t = 0 it spreads by {value[0].std():.3f} (rewards by {tuned.reward.std():.3f}) where a constant were best")

assert abs(log_z[0].mean - log_z[1].mean) < 4 * (log_z[0].se ** 2 + log_z[1].se ** 2) ** 0.5
assert 0.85 < way < 1.1
assert log_z[1].ess > max(0.8, log_z[0].ess)
assert abs(explained[0]) < 0.25 and explained[-1] > 0.9

# %% [markdown]
# Nearly. The reward has stood still since update 30 and stays below the exact one. A step of the tuned chain moves its
# mean but keeps the base's noise, while the exactly tilted step has less of it: with few steps even the best control is
# a little off. Is that what is missing, or are updates? The module is trained on with four times the paths an update,
# three times on the same chain and three times on one of 50 steps, each time from here and with other draws.
#
# What is missing is small, and two independent samples would hide it in their errors. The tuned paths say it
# themselves: with their path weights they give the exact mean, and the difference to their plain mean has the smaller
# error of paths that are compared with themselves.


# %%
def missing(path, log_w):
    """E*[r] - E_theta[r] from tuned paths alone, with the standard error of this difference."""
    r, w = path.reward.double(), len(log_w) * torch.softmax(log_w.double(), 0)
    return (w * r).mean() - r.mean(), (w * (r - (w * r).mean()) - (r - r.mean())).std() / len(r) ** 0.5


def train_on(steps, seed):
    """Sixty larger updates from where the module was, on a chain of so many steps, and what is missing then."""
    module.load_state_dict(here)
    L.seed_everything(seed, verbose=False)
    sampler = TrajectorySampler(steps=steps, samples_per_condition=1)
    trainer([sampler], 60).fit(module, loader(60, 512))
    return missing(*look(16_000, False, sampler))


first, se = missing(*look(16_000, False))
print(f"{'25 steps':20s} {first:.4f} +- {se:.4f} of reward are missing")
here, gaps = deepcopy(module.state_dict()), {}
for steps in (25, 50):
    runs = [train_on(steps, seed) for seed in (1, 2, 3)]
    gaps[steps] = torch.stack([gap for gap, _ in runs])
    found = ", ".join(f"{gap:.4f} +- {se:.4f}" for gap, se in runs)
    print(f"{f'trained on, {steps}':20s} {found}: in the mean {gaps[steps].mean():.4f}")
scatter = (gaps[25].var() / 3 + gaps[50].var() / 3) ** 0.5
print(f"half the step takes off {gaps[25].mean() - gaps[50].mean():.4f} +- {scatter:.4f}")
assert all(gap > 0.003 for steps in gaps for gap in gaps[steps])  # no training reached it
assert 0.7 * first < gaps[25].mean() < 1.4 * first  # updates are not what it lacked
assert gaps[50].mean() > 0.6 * gaps[25].mean()  # and the length of a step is a part of it at most

# %% [markdown]
# Neither. More updates with more paths leave what was missing, and half the step takes off a fifth of it, hardly more
# than three trainings scatter. The rest is what this network and this optimiser leave: 1 % of the reward. Two trainings
# would have said anything; and where the last per cent matters, the weights of the tuned paths have it.

# %%
figure = Figure(figsize=(10, 2.7), layout="constrained")
generator = torch.Generator().manual_seed(0)
drawn = torch.multinomial(torch.softmax(base_w, 0), 2000, replacement=True, generator=generator)
sets = {"base": base.end[:2000], "exact tilt (base, reweighted)": base.end[drawn], "tuned": tuned.end[:2000]}
axes = figure.subplots(1, 3, sharex=True, sharey=True)
for axis, (name, points), colour in zip(axes, sets.items(), ("#7f8c99", "#2b6777", "#c8553d"), strict=True):
    axis.scatter(*points.T.numpy(), s=4, lw=0, alpha=0.5, color=colour)
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("$x_1$  (rewarded to the right)")
    axis.set_aspect("equal")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("$x_2$")
show(figure, "04_points")

# %%
figure = Figure(figsize=(10, 3.2), layout="constrained")
axes = figure.subplots(1, 3)
axes[0].plot([v["update"] for v in curves.val], [v["val/reward"] for v in curves.val], "o-", color="#c8553d", ms=4)
for estimate, name, line in ((reward_base, "base", ":"), (reward_exact, "exact tilt", "--")):
    axes[0].axhline(estimate.mean, color="#2b6777", ls=line, label=name)
axes[0].legend(frameon=False, fontsize=9)
axes[0].set_title("own validation: reward", fontsize=10)
axes[1].plot([r["train/value"] for r in curves.train], color="#1b1b1b", lw=1)
axes[1].set_title("own second loss: value network", fontsize=10)
axes[2].plot(t.numpy(), explained.numpy(), "o-", color="#1b1b1b", ms=3)
axes[2].set_title("what it explains of a path's reward", fontsize=10)
for axis, label in zip(axes, ("update", "update", "t  (noise 0, data 1)"), strict=True):
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
for axis, label in zip(axes, ("mean reward", "mean squared error", "part of the variance"), strict=True):
    axis.set_ylabel(label)
show(figure, "04_curves")

# %% [markdown]
# # 04 The mixin in your own LightningModule
#
# You have a LightningModule: a network, a training loss, a validation, an optimiser. A loss of this package is a mixin
# that goes in front of it. What your module must offer are three attributes, `predictor`, `process` and `reward`;
# everything else stays yours. Below is such a module from start to end: a flow-matching model of points in the plane,
# pretrained by its own loss, then tilted - with its own validation, its own optimiser, and a second loss of its own
# beside the tilt.

# %%
from contextlib import contextmanager
from copy import deepcopy

import lightning as L
import torch
from _common import show, trainer
from lightning_tilt import AdjointMatching, Frozen, Predictor, Reward, RectifiedFlow, TrajectorySampler
from lightning_tilt.identities import expectation, log_partition, mean
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

L.seed_everything(0, verbose=False)

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


pretrained = FlowModule(Velocity(), lr=5e-3)
trainer([], 1500).fit(pretrained, loader(1500, 256))

# %% [markdown]
# ## The adapter, and the reward
#
# A `Predictor` says what the network predicts (here a velocity), of which process (here the straight lines of rectified
# flow), and what the untuned model is: a frozen copy, which is not trained, not saved and never in train mode.


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
# The host of the tilt is the old module with three attributes more. Its optimiser and its validation are inherited as
# they are. The sampler reads nothing of the batch but its length: 128 points ask for 128 paths.
#
# The second loss is a value network that learns, from the very rollouts that the tilt trains on, what reward a path will
# have: $V(x, t) \approx \mathbb{E}[r(X_1) \mid X_t = x]$. It costs no further evaluation of the velocity, and since it
# shares no parameter with the velocity, it does not move the tilt's fixed point. `super().training_step` is the tilt's loss.

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


UPDATES = 150
module = Tuned(deepcopy(pretrained.network), lr=2e-3, lam=LAM, checkpoint=False)
sampler, curves = TrajectorySampler(steps=25, samples_per_condition=1), Curves()
run = trainer([sampler, curves], UPDATES, val_check_interval=25, log_every_n_steps=1)
run.fit(module, loader(UPDATES, 128), loader(4, 256))
for name in ("val/reward", "val/flow_loss"):
    print(f"{name:14s}" + "".join(f"{v[name]:8.3f}" for v in curves.val))

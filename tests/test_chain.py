"""The chain of a mixture tends to its continuous tilt as the steps get finer, and counts what it asks."""

import torch

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.identities import ess, log_partition
from lightning_tilt.models import GaussianMixturePredictor, the_mixture
from lightning_tilt.process import RectifiedFlow, VariancePreserving
from lightning_tilt.trajectory import Trajectory
from lightning_tilt.transition import DDIM

N = 8_000
NOBODY = Condition({}, None, N)


def weighed(steps: int, process: object) -> tuple[Trajectory, torch.Tensor]:
    """Paths of the exactly tilted model, with their weights against the base."""
    mixture, reward = the_mixture()
    tilted, _ = mixture.tilt(reward, 1.0)
    base, tuned = (GaussianMixturePredictor.of(m, process) for m in (mixture, tilted))  # type: ignore[arg-type]
    chain = Chain(process, DDIM(), process.grid(steps))  # type: ignore[arg-type, attr-defined]
    noise = torch.randn(steps + 1, N, 2, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    # The last step, of std = 0, is the base's: what makes it is asked through `tuned.base()`.
    states, z = chain.rollout(tuned, NOBODY, noise, base_last_step=False)
    last = chain.kernel(base, chain.output(base, states[-2], steps - 1, NOBODY), states[-2], steps - 1).mean
    states = torch.cat([states[:-1], last[None]])
    path = Trajectory(
        t=chain.t, states=states, noise=z, condition=NOBODY, index=torch.arange(N), sample=torch.arange(N),
        reward=reward.score(last, None), lam=1.0, rollout=0, weight=torch.ones(N),
    )  # fmt: skip
    return path, path.reward - chain.log_ratio(path, chain.mean(base, NOBODY))


def test_distance_to_the_continuous_tilt_shrinks_with_the_steps() -> None:
    """log Z of the mixture is -1.3756 in continuous time; the chain's own comes nearer by more than 3 errors."""
    errors, standard = [], []
    for steps in (10, 30, 90):
        _, log_w = weighed(steps, RectifiedFlow())
        estimate = log_partition(log_w)
        errors.append(estimate.mean + 1.3756)
        standard.append(estimate.se)
    for i in (0, 1):
        assert abs(errors[i]) - abs(errors[i + 1]) > 3 * (standard[i] ** 2 + standard[i + 1] ** 2) ** 0.5
    assert abs(errors[2]) < 0.03


def test_weights_of_the_exactly_tilted_model_are_nearly_constant() -> None:
    for process, floor in ((RectifiedFlow(), 0.93), (VariancePreserving.from_betas(), 0.93)):
        path, log_w = weighed(40, process)
        assert ess(log_w) > floor
        w = torch.softmax(log_w, 0)
        mixture, reward = the_mixture()
        tilted, _ = mixture.tilt(reward, 1.0)
        torch.testing.assert_close((w[:, None] * path.end).sum(0), tilted.mean, atol=0.06, rtol=0)


def test_evaluations_are_counted_by_sample() -> None:
    mixture, _ = the_mixture()
    base = GaussianMixturePredictor.of(mixture)
    chain = Chain(base.process, DDIM(), base.process.grid(5))
    few = Condition({}, None, 7)
    chain.rollout(base, few, torch.randn(6, 7, 2))
    assert chain.evaluations.forward == 35
    chain.rollout(base, few, torch.randn(6, 7, 2), scale=2.0)
    assert chain.evaluations.forward == 35 + 70
    assert chain.evaluations.forwards_per_pair == 105

"""Sequential Monte Carlo: unbiased at ten steps for every twist and every move, against exact chains.

The Gaussian chain's log Z is the oracles'; the mixture's is a quadrature, by hand, of its ten kernels.
"""

import math
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from toys import AffineControl, PromptedNet, SumReward, gaussian

from lightning_tilt.chain import Chain
from lightning_tilt.condition import Condition
from lightning_tilt.identities import expectation, log_partition
from lightning_tilt.interfaces import Predictor, Prompts, Reward
from lightning_tilt.models import GaussianMixturePredictor
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.rewards.quadratic import QuadraticReward
from lightning_tilt.steering import SMC, Steered
from lightning_tilt.transition import DDIM, EulerMaruyama

K, MU, V, LAM, C = 10, 0.4, 0.8, 3.0, 1.0
PROCESS = RectifiedFlow()
CHAIN = oracles.ddim_chain(oracles.flow_schedule(K), MU, V)
TILT = oracles.Tilt(lam=LAM, q=1.0, c=C)
REWARD = QuadraticReward([[1.0]], [C])
NOBODY = Condition({}, None, 1)


def steer(
    smc: SMC,
    predictor: Predictor,
    reward: Reward = REWARD,
    lam: float = LAM,
    condition: Condition = NOBODY,
    **more: Any,
) -> Steered:
    g = torch.Generator().manual_seed(more.get("seed", 0))
    chain = more.get("chain") or Chain(predictor.process, DDIM(), predictor.process.grid(K))
    n, bad = len(condition) * smc.particles, more.get("bad")
    noise = torch.randn(chain.steps + 1, n, *predictor.state_shape, generator=g, dtype=torch.float64)
    uniforms = torch.rand(chain.steps, n, generator=g, dtype=torch.float64)
    return smc.run(chain, predictor, reward, condition, noise, lam, uniforms=uniforms, bad=bad)


def replicates(smc: SMC, steered: Steered) -> tuple[Tensor, Tensor]:
    """Log Z and tilted mean of each replicate of one prompt."""
    log_w = steered.log_w.view(smc.replicates, -1)
    x = steered.end[:, 0].view(smc.replicates, -1)
    return log_w.logsumexp(1) - math.log(log_w.shape[1]), (log_w.softmax(1) * x).sum(1)


def assert_unbiased(smc: SMC, steered: Steered, log_z: float) -> None:
    """The mean of Z over replicates of a few particles each, within four standard errors of at most 5 %."""
    z = (replicates(smc, steered)[0] - log_z).exp()
    error = float(z.std()) / smc.replicates**0.5
    assert error < 0.05 and abs(float(z.mean()) - 1) < 4 * error


MOVES: dict[str, dict[str, Any]] = {
    "x1_hat": {},
    "x1_hat guided": {"guided": True, "resample_below": 0.95},
    "x1_hat early": {"power": 0.0},
    "x1_hat late": {"power": 3.0},
    "state": {"twist": "state"},
    "state guided": {"twist": "state", "guided": True, "power": 2.0, "resample_below": 0.95},
    "always": {"resample_below": 1.0, "guided": True},
    "stratified": {"kind": "stratified", "resample_below": 0.8},
    "none": {"twist": "none"},
}


@pytest.mark.parametrize("name", MOVES)
def test_log_z_is_unbiased_with_eight_particles(name: str) -> None:
    smc = SMC(**{"particles": 8 * 1000, "replicates": 1000, "resample_below": 0.7, **MOVES[name]})
    steered = steer(smc, gaussian(MU, V, PROCESS))
    exact = oracles.log_z(CHAIN, TILT)
    assert_unbiased(smc, steered, exact)
    z, mean = replicates(smc, steered)
    assert abs(steered.log_z.mean - exact) < 4 * steered.log_z.se
    assert steered.log_z == log_partition(z)
    tilted = expectation(mean, z)
    assert abs(tilted.mean - oracles.tilted_end_law(CHAIN, TILT)[0]) < 4 * tilted.se < 0.1
    assert steered.ess.shape == steered.resampled.shape == (K, 1, 1000)
    assert bool(steered.resampled.any()) == (name != "none") and not bool(steered.resampled[-1].any())
    assert bool((steered.ess[steered.resampled] < smc.resample_below).all())


def quadrature_log_z(predictor: GaussianMixturePredictor, chain: Chain, reward: Reward, lam: float) -> float:
    """log E exp(lam r(X_K)) of the chain, from its kernels on a grid of one dimension."""
    y = torch.linspace(-7, 7, 701, dtype=torch.float64)[:, None]
    grid, value = Condition({}, None, len(y)), None
    for k in reversed(range(chain.steps)):
        kernel = chain.kernel(predictor, chain.output(predictor, y, k, grid), y, k)
        if value is None:
            assert float(kernel.std.max()) == 0  # the last step
            value = lam * reward.score(kernel.mean, None)
        else:
            value = (_log_normal(y[:, 0], kernel.mean, kernel.std) + value).logsumexp(1) + math.log(0.02)
    assert value is not None
    start = _log_normal(y[:, 0], torch.zeros(1, 1).double(), torch.ones(1, 1).double())[0]
    return float((start + value).logsumexp(0)) + math.log(0.02)


def _log_normal(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -((y - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2


def test_ancestors_are_of_the_same_replicate_and_become_fewer_where_it_is_resampled() -> None:
    smc = SMC(particles=8 * 50, replicates=50, resample_below=0.7)
    steered = steer(smc, gaussian(MU, V, PROCESS))
    ancestors = steered.ancestor.view(50, 8)
    assert bool((ancestors // 8 == torch.arange(50)[:, None]).all())
    often = steered.resampled.sum((0, 1))
    distinct = torch.tensor([len(row.unique()) for row in ancestors])
    assert bool((distinct[often == 0] == 8).all()) and bool((distinct[often > 0] < 8).all()) and bool((often > 0).any())
    plain = steer(SMC(particles=8, replicates=1, twist="none"), gaussian(MU, V, PROCESS))
    assert plain.ancestor.tolist() == list(range(8))


@pytest.mark.parametrize("name", ["x1_hat", "x1_hat guided", "state"])
def test_two_modes(name: str) -> None:
    predictor = GaussianMixturePredictor([0.8, 0.2], [[-1.5], [1.5]], [[[0.3]], [[0.2]]], PROCESS)
    chain = Chain(PROCESS, DDIM(), PROCESS.grid(K))
    exact = quadrature_log_z(predictor, chain, REWARD, 2.0)
    smc = SMC(**{"particles": 8 * 1000, "replicates": 1000, "resample_below": 0.7, **MOVES[name]})
    steered = steer(smc, predictor, lam=2.0)
    assert_unbiased(smc, steered, exact)


def test_the_quadrature_knows_the_gaussian() -> None:
    chain = Chain(PROCESS, DDIM(), PROCESS.grid(K))
    value = quadrature_log_z(gaussian(MU, V, PROCESS), chain, REWARD, LAM)
    assert value == pytest.approx(oracles.log_z(CHAIN, TILT), abs=1e-6)


def test_the_chain_need_not_be_memoryless() -> None:
    times = PROCESS.grid(K)[1:].clone()  # from t = .1, where 1/alpha is finite
    times[-1] = 0.99
    chain = Chain(PROCESS, EulerMaruyama(0.5), times)
    predictor = gaussian(MU, V, PROCESS)
    smc = SMC(particles=16_000, replicates=2000, guided=True)
    assert_unbiased(smc, steer(smc, predictor, chain=chain), _affine_log_z(chain, predictor))


def _affine_log_z(chain: Chain, predictor: Predictor) -> float:
    """The oracles' log Z of a chain whose kernels are read off at two points."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    two, A, b = Condition({}, None, 2), [], []
    for k in range(chain.steps):
        m = chain.kernel(predictor, chain.output(predictor, x, k, two), x, k).mean[:, 0].tolist()
        A.append(m[1] - m[0])
        b.append(m[0])
    return oracles.log_z(oracles.Chain(A, b, chain.stds.tolist()), TILT)


def test_guidance_and_resampling_lessen_the_error() -> None:
    """Sixteen dimensions, 64 particles: the error of log Z is about 1.7 by weights alone, .6 twisted, .2 guided too."""
    predictor = GaussianMixturePredictor([1.0], [[MU] * 16], (V * torch.eye(16))[None], PROCESS)
    reward = QuadraticReward(torch.eye(16), [C] * 16)
    error = {}
    for name, settings in {"none": {"twist": "none"}, "twist": {}, "guided": {"guided": True}}.items():
        smc = SMC(**{"particles": 64 * 100, "replicates": 100, **settings})
        z, _ = replicates(smc, steer(smc, predictor, reward))
        error[name] = float((z - 16 * oracles.log_z(CHAIN, TILT)).square().mean().sqrt())
    assert error["guided"] < 0.6 * error["twist"] and error["twist"] < 0.6 * error["none"]


def test_a_tuned_model_moves_the_particles() -> None:
    base = gaussian(MU, V, PROCESS)
    tuned = AffineControl(base, K, oracles.best_control(CHAIN, TILT))
    settings: dict[str, Any] = {"particles": 8 * 1000, "replicates": 1000, "twist": "none"}
    smc, plain = SMC(**settings, proposal="tuned"), SMC(**settings)
    steered = steer(smc, tuned)
    assert_unbiased(smc, steered, oracles.log_z(CHAIN, TILT))
    assert float(steered.ess[-1].mean()) > 0.8 > 0.75 > float(steer(plain, tuned).ess[-1].mean())
    guided = SMC(**{**settings, "twist": "x1_hat"}, proposal="tuned", guided=True)
    assert_unbiased(guided, steer(guided, tuned, lam=1.0), oracles.log_z(CHAIN, oracles.Tilt(lam=1.0, q=1.0, c=C)))


def test_without_resampling_the_weights_are_the_rewards() -> None:
    """They telescope; the paths are the chain's own, guidance of the model included."""
    torch.manual_seed(0)
    net = PromptedNet(PROCESS).double()
    prompts = net.encode(["a", "bbbb", ""], 3)
    smc = SMC(particles=6, replicates=2, resample_below=0.0, scale=2.5)
    steered = steer(smc, net, SumReward(), 1.5, prompts)
    assert steered.index.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    torch.testing.assert_close(steered.log_w, 1.5 * steered.reward)
    noise = torch.randn(K + 1, 18, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain = Chain(PROCESS, DDIM(), PROCESS.grid(K))
    with torch.no_grad():
        states, _ = chain.rollout(net, prompts[steered.index], noise, scale=2.5)
    torch.testing.assert_close(steered.end, states[-1])
    torch.testing.assert_close(steered.reward, SumReward().score(states[-1], None))


@pytest.mark.parametrize("guided", [False, True])
def test_prompts_and_micro_batches_do_not_mix(guided: bool) -> None:
    torch.manual_seed(1)
    net = PromptedNet(PROCESS).double()
    prompts = net.encode(["a", "bbbb", "cc"], 3)
    settings: dict[str, Any] = {"particles": 16, "replicates": 2, "resample_below": 0.9, "guided": guided, "scale": 1.5}
    chain = Chain(PROCESS, DDIM(), PROCESS.grid(K))
    noise, uniforms = torch.randn(K + 1, 48, 2).double(), torch.rand(K, 48).double()

    def run(smc: SMC, rows: slice, condition: Condition) -> Steered:
        part = noise[:, rows], uniforms[:, rows]
        return smc.run(chain, net, SumReward(), condition, part[0], 4.0, uniforms=part[1])

    together = run(SMC(**settings), slice(None), prompts)
    assert bool(together.resampled.any())
    pieces = run(SMC(**settings, micro_batch=5), slice(None), prompts)
    alone = [run(SMC(**settings), slice(16 * i, 16 * i + 16), prompts[torch.tensor([i])]) for i in range(3)]
    for name in ("end", "log_w", "reward"):
        whole = getattr(together, name)
        torch.testing.assert_close(getattr(pieces, name), whole)
        torch.testing.assert_close(torch.cat([getattr(one, name) for one in alone]), whole)
    assert together.log_z.mean == pytest.approx(sum(one.log_z.mean for one in alone) / 3)
    assert not together.end.requires_grad


def test_evaluations_are_counted() -> None:
    predictor = gaussian(MU, V, PROCESS)
    for settings, expected in (
        ({}, (120, 0, 120)),
        ({"guided": True}, (120, 108, 132)),  # one VJP a step but the last, whose std is 0; a reward at k = 0 too
        ({"proposal": "tuned"}, (228, 0, 120)),
        ({"twist": "none"}, (120, 0, 12)),
    ):
        chain = Chain(PROCESS, DDIM(), PROCESS.grid(K))
        steer(SMC(particles=12, **settings), predictor, chain=chain)  # type: ignore[arg-type]
        seen = chain.evaluations
        assert (seen.forward, seen.vjp, seen.reward) == expected
    chain = Chain(PROCESS, DDIM(), PROCESS.grid(K))
    steer(SMC(particles=12, guided=True, twist="state"), predictor, chain=chain)
    assert chain.evaluations.vjp == 0


class Step(Reward):
    """1 above a threshold, else 0; nothing to differentiate."""

    is_differentiable = False

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return (images[:, 0] > 1).to(images)


class Bad(Reward):
    """Something is wrong with it."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        x = images[:, 0]
        faults = {
            "nan": torch.where(x > 0, math.nan, x), "gradient": (x - x).sqrt(), "shape": images, "cut": x.detach(),
        }  # fmt: skip
        return faults[self.fault]


def test_a_reward_without_gradient() -> None:
    predictor, smc = gaussian(MU, V, PROCESS), SMC(particles=16_000, replicates=2000)
    m, v = oracles.laws(CHAIN)[-1]
    above = 0.5 * math.erfc((1 - m) / math.sqrt(2 * v))
    assert_unbiased(smc, steer(smc, predictor, Step(), 2.0), math.log(1 + above * (math.exp(2.0) - 1)))
    with pytest.raises(ValueError, match="Step has no gradient to guide by: use guided: false"):
        steer(SMC(guided=True), predictor, Step())


def test_bad_rewards_are_named() -> None:
    predictor = gaussian(MU, V, PROCESS)
    with pytest.raises(FloatingPointError, match=r"reward Bad is not finite for \d+ of 64 particles at step 1 of 10"):
        steer(SMC(), predictor, Bad("nan"))
    with pytest.raises(
        FloatingPointError, match=r"gradient of the reward Bad is not finite .* step 0 .*mend the reward"
    ):
        steer(SMC(guided=True), predictor, Bad("gradient"))
    with pytest.raises(ValueError, match=r"returned shape \(64, 1\) for 64 samples"):
        steer(SMC(), predictor, Bad("shape"))
    with pytest.raises(TypeError, match=r"Bad\.score has no gradient although is_differentiable is True"):
        steer(SMC(guided=True), predictor, Bad("cut"))
    net = PromptedNet(PROCESS).double()
    with pytest.raises(FloatingPointError, match=r"\('a', 'bb'\)"):
        steer(SMC(), net, Bad("nan"), condition=net.encode(["a", "bb"], 2))


class Holes(Reward):
    """r(x) = x, of which there is no value, or no gradient, above a threshold."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of

    def score(self, images: Tensor, prompts: Prompts) -> Tensor:
        x = images[:, 0]
        above = x > 1
        return x.masked_fill(above, math.nan) if self.of == "reward" else x + torch.where(above, (x - x).sqrt(), 0.0)


@pytest.mark.parametrize("of", ["reward", "gradient"])
@pytest.mark.parametrize("guided", [False, True])
def test_particles_without_a_reward_weigh_nothing_and_the_rest_is_unbiased(of: str, guided: bool) -> None:
    """E[e^x; x <= 1] of a Gaussian, or E[e^x] where the gradient alone is missing."""
    smc, bad = SMC(particles=16_000, replicates=2000, guided=guided), list[str]()
    steered = steer(smc, gaussian(MU, V, PROCESS), Holes(of), 1.0, bad=bad)
    m, v = oracles.laws(CHAIN)[-1]
    kept = 0.5 * math.erfc((m + v - 1) / math.sqrt(2 * v)) if of == "reward" else 1.0
    assert_unbiased(smc, steered, m + v / 2 + math.log(kept))
    assert torch.equal(steered.log_w.isinf(), steered.reward.isnan()) and bool(steered.reward.isnan().any()) == (
        of == "reward"
    )
    assert bool(steered.end.isfinite().all()) and bool(steered.ess.isfinite().all())
    # Said once, at the first step: the gradient is asked for there already.
    first = "gradient of the reward Holes" if of == "gradient" else "reward Holes"
    assert len(bad) == (of == "reward" or guided) and all(f"the {first} is not finite for" in text for text in bad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"particles": 10}, "10 particles cannot be split into 4 equal replicates"),
        ({"replicates": 0}, "cannot be split into 0"),
        ({"resample_below": 1.5}, "is a fraction"),
        ({"power": -1.0}, "power must not be negative"),
        ({"kind": "residual"}, "unknown kind 'residual'; known are systematic, stratified"),
        ({"twist": "x1"}, "unknown twist 'x1'; known are x1_hat, state, none"),
        ({"proposal": "best"}, "unknown proposal 'best'; known are base, tuned"),
        ({"twist": "none", "guided": True}, "twist: none has none: use x1_hat"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMC(**settings)


def test_wrong_shapes_are_refused() -> None:
    chain, predictor = Chain(PROCESS, DDIM(), PROCESS.grid(K)), gaussian(MU, V, PROCESS)
    good = torch.zeros(K + 1, 64, 1), torch.zeros(K, 64)
    for i, name in enumerate(("noise", "uniforms")):
        parts = [part[:, :60] if i == j else part for j, part in enumerate(good)]
        with pytest.raises(ValueError, match=rf"64 particles each need {name} of shape"):
            SMC().run(chain, predictor, REWARD, NOBODY, parts[0], LAM, uniforms=parts[1])
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode: false"):
        SMC(guided=True).run(chain, predictor, REWARD, NOBODY, good[0], LAM, uniforms=good[1])

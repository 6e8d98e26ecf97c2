"""Resampling and the treatments of path weights, against naive loops."""

import math

import pytest
import torch
from torch import Tensor

from lightning_tilt.identities import Resampling, Treatment, resample, treat_weights

KINDS: tuple[Resampling, ...] = ("systematic", "stratified")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(log_w: Tensor, kind: Resampling, seed: int) -> Tensor:
    return torch.bincount(resample(log_w, kind, generator=generator(seed)), minlength=len(log_w))


@pytest.mark.parametrize("kind", KINDS)
def test_particles_are_kept_as_often_as_they_weigh(kind: Resampling) -> None:
    log_w = torch.randn(13, generator=generator(0), dtype=torch.float64) * 1.5
    expected = 13 * torch.softmax(log_w, 0)
    runs = torch.stack([counts(log_w, kind, seed) for seed in range(4000)]).double()
    error = runs.std(0).clamp(min=1e-3) / 4000**0.5
    assert bool(((runs.mean(0) - expected).abs() < 4 * error).all())
    apart = (runs - expected).abs().max()
    assert apart < (1 if kind == "systematic" else 2)


def test_points_are_those_of_the_definition() -> None:
    w, u = [0.1, 0.0, 0.4, 0.2, 0.3], [0.3, 0.9, 0.05, 0.6, 0.7]
    for kind in KINDS:
        naive = []
        for j in range(5):
            point, i = (j + (u[0] if kind == "systematic" else u[j])) / 5, 0
            while sum(w[: i + 1]) <= point:
                i += 1
            naive.append(i)
        assert resample(torch.tensor(w).log(), kind, uniforms=torch.tensor(u, dtype=torch.float64)).tolist() == naive


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("u", [0.0, 1.0, 1 - 1e-9])
def test_what_weighs_nothing_is_never_kept(kind: Resampling, u: float) -> None:
    log_w = torch.tensor([-math.inf, 1.0, -math.inf, 1.0, -math.inf])
    assert set(resample(log_w, kind, uniforms=torch.full((5,), u)).tolist()) <= {1, 3}
    assert resample(torch.zeros(1), kind, uniforms=torch.full((1,), u)).tolist() == [0]


def test_equal_weights_keep_everybody() -> None:
    for n in (7, 10_000):
        assert torch.equal(resample(torch.full((n,), 3.0), uniforms=torch.tensor([0.5])), torch.arange(n))


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown resampling 'multinomial'; known are systematic, stratified"):
        resample(torch.zeros(2), "multinomial")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stratified resampling to 3 particles needs 3 uniforms, not 1"):
        resample(torch.zeros(3), "stratified", uniforms=torch.zeros(1))
    for wrong in ([-math.inf, -math.inf], [0.0, math.nan], [0.0, math.inf], []):
        with pytest.raises(ValueError, match="must hold a finite one"):
            resample(torch.tensor(wrong))


def naive_treatment(w: list[float], kind: Treatment, c: float) -> list[float]:
    if kind == "none":
        return [1.0] * len(w)
    n, centre = len(w), sum(w) / len(w)
    v = [x / centre for x in w]
    top = {"self_normalised": math.inf, "clipped": c, "truncated": math.sqrt(n)}[kind]
    v = [min(x, top) for x in v]
    return [x * n / sum(v) for x in v]


@pytest.mark.parametrize("kind", ["none", "self_normalised", "clipped", "truncated"])
def test_treatments_equal_naive_loops_in_every_group(kind: Treatment) -> None:
    log_w = torch.randn(40, generator=generator(1), dtype=torch.float64) * 3
    group = torch.randint(0, 4, (40,), generator=generator(2)) * 5
    log_w = log_w + 400.0 * group  # every prompt has its own Z
    treated = treat_weights(log_w, kind, group=group, clip=2.0)
    for g in group.unique().tolist():
        own = group == g
        naive = naive_treatment((log_w[own] - log_w[own].max()).exp().tolist(), kind, 2.0)
        assert treated[own].tolist() == pytest.approx(naive, rel=1e-9)
        assert float(treated[own].mean()) == pytest.approx(1.0, rel=1e-12)
    alone = treat_weights(log_w.float(), kind)
    assert alone.dtype == torch.float32 and float(alone.mean()) == pytest.approx(1.0, rel=1e-6)


def test_treatments_are_biased_as_they_say() -> None:
    """E*[x] = 1.2 under exp(1.2 x) on N(0, 1): clipping stays away from it, truncation comes near as n grows."""
    x = torch.randn(200, 4000, generator=generator(3), dtype=torch.float64)

    def tilted_mean(kind: Treatment, n: int) -> float:
        return float(torch.stack([(treat_weights(1.2 * r, kind, clip=3.0) * r).mean() for r in x[:, :n]]).mean())

    bias = {(kind, n): tilted_mean(kind, n) - 1.2 for kind in ("clipped", "truncated") for n in (16, 4000)}
    assert abs(tilted_mean("none", 4000)) < 0.01 and abs(tilted_mean("self_normalised", 4000) - 1.2) < 0.01
    assert bias["clipped", 4000] < -0.2 and abs(bias["clipped", 4000] - bias["clipped", 16]) < 0.1
    assert bias["truncated", 16] < -0.1 and abs(bias["truncated", 4000]) < 0.02
    weights = torch.stack([treat_weights(2.5 * r, "truncated") for r in x[:50]])
    plain = torch.stack([treat_weights(2.5 * r, "self_normalised") for r in x[:50]])
    assert float(weights.max()) < 3 * 4000**0.5 < float(plain.max())


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown treatment of weights 'clip'"):
        treat_weights(torch.zeros(2), "clip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"clip must be at least 1, the mean weight, not 0\.5"):
        treat_weights(torch.zeros(2), "clipped", clip=0.5)
    group = torch.tensor([0, 0, 1])
    assert treat_weights(torch.tensor([0.0, -math.inf, 5.0]), "self_normalised", group=group).tolist() == [2, 0, 1]
    for wrong in ([0.0, 0.0, -math.inf], [0.0, math.nan, 0.0], [0.0, math.inf, 0.0]):
        with pytest.raises(ValueError, match="every group of log weights needs a finite one"):
            treat_weights(torch.tensor(wrong), "truncated", group=group)

"""Draws that belong to the sample: same whatever the order and the batch, and nobody else's generator moves."""

import itertools
import math
import random
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch

from lightning_tilt.noise import Stream, keyed_choice, keyed_normal

SHAPE = (2, 3)


@pytest.mark.parametrize("samples", [[0, 1, 2, 3, 4], [4, 2, 0], [3], [1, 1]])
def test_a_sample_has_its_draw_in_any_order_and_subset(samples: list[int]) -> None:
    everything = keyed_normal(7, "train", 2, range(5), SHAPE)
    assert torch.equal(keyed_normal(7, "train", 2, samples, SHAPE), everything[samples])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_change_nothing(size: int) -> None:
    parts = [keyed_normal(0, "validate", 1, range(i, min(i + size, 7)), SHAPE) for i in range(0, 7, size)]
    assert torch.equal(torch.cat(parts), keyed_normal(0, "validate", 1, range(7), SHAPE))


def test_seed_stream_rollout_and_sample_all_matter() -> None:
    keys = itertools.product([0, 1, -1, 2**40], get_args(Stream), [0, 1, 2**33], [0, 1, 2**32, 2**32 + 1])
    draws = [tuple(keyed_normal(s, stream, n, [i], (4,)).flatten().tolist()) for s, stream, n, i in keys]
    assert len(set(draws)) == len(draws) == 4 * len(get_args(Stream)) * 3 * 4


def test_seeds_and_rollouts_are_not_added_up() -> None:
    """(1, 2) and (2, 1) are different keys, and so are (1, 23) and (12, 3)."""
    pairs = [(1, 2), (2, 1), (1, 23), (12, 3), (0, 3), (3, 0)]
    assert len({float(keyed_normal(s, "train", n, [5], (1,))) for s, n in pairs}) == len(pairs)


def test_shape_and_type() -> None:
    draw = keyed_normal(0, "report", 0, [8, 9], SHAPE)
    assert draw.shape == (2, *SHAPE) and draw.dtype == torch.float32 and draw.device.type == "cpu"
    assert keyed_normal(0, "report", 0, [], SHAPE).shape == (0, *SHAPE)


def test_draws_are_standard_normal_and_independent() -> None:
    """Moments of 80,000 numbers within 4 standard errors."""
    x = keyed_normal(1, "train", 0, range(20_000), (4,)).double()
    n = x.numel()
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert abs(float((x**2).mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((x**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    within, across = (x[:, 0] * x[:, 1]).mean(), (x[1:] * x[:-1]).mean()
    later = (keyed_normal(1, "train", 1, range(20_000), (4,)).double() * x).mean()
    assert abs(float(within)) < 4 / math.sqrt(20_000)
    assert abs(float(across)) < 4 / math.sqrt(n) and abs(float(later)) < 4 / math.sqrt(n)


def test_global_generators_stay_where_they_are() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    keyed_normal(3, "train", 0, range(5), SHAPE)
    keyed_choice(3, "steps", 0, range(9), 4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
    assert random.getstate() == before[2]


def test_every_subset_is_equally_likely() -> None:
    """6,000 subsets of 2 out of 6: chi-square with 14 degrees of freedom, below its 99.9 % point."""
    population = [0, 2, 3, 5, 7, 11]
    drawn = Counter(tuple(keyed_choice(0, "steps", rollout, population, 2)) for rollout in range(6000))
    assert set(drawn) == set(itertools.combinations(population, 2))
    expected = 6000 / 15
    assert sum((count - expected) ** 2 / expected for count in drawn.values()) < 36.1


def test_choice_is_keyed_increasing_and_without_repeats() -> None:
    assert keyed_choice(0, "steps", 4, range(20), 8) == keyed_choice(0, "steps", 4, range(20), 8)
    assert keyed_choice(0, "steps", 4, range(20), 8) != keyed_choice(1, "steps", 4, range(20), 8)
    for rollout in range(50):
        chosen = keyed_choice(0, "steps", rollout, range(10), 6)
        assert chosen == sorted(set(chosen)) and len(chosen) == 6 and all(type(i) is int for i in chosen)
    assert keyed_choice(0, "steps", 0, range(3), 3) == [0, 1, 2]
    assert keyed_choice(0, "steps", 0, range(3), 0) == []

"""Holds a reward to its traits; every exported reward goes through every check.

A case says how to make the reward, what its inputs look like, and five prompts for five samples.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_tilt.frozen import Frozen
from lightning_tilt.interfaces.skeleton import without_weights
from lightning_tilt.rewards import Reward


@dataclass(frozen=True)
class RewardCase:
    make: Callable[[], Reward]
    shape: tuple[int, ...]
    prompts: list[str]
    saved: frozenset[str] = field(default=frozenset(), kw_only=True)  # what the reward learns, and a checkpoint holds

    def images(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand(len(self.prompts), *self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def hosted(self) -> "Host":
        return Host(self.make()).double()


class Host(nn.Module):
    """A module that has a reward and something to learn, as a LightningModule has."""

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.learnt = nn.Linear(2, 2)
        self.reward = reward


def check_gradient(case: RewardCase) -> None:
    """Central differences along random directions, each sample with a weight of its own."""
    reward, x = case.hosted().reward, case.images().requires_grad_()
    weights = torch.linspace(1, 2, len(x), dtype=torch.float64)
    score = reward.score(x, case.prompts)
    if not reward.is_differentiable:
        assert not score.requires_grad
        return
    (gradient,) = torch.autograd.grad(weights @ score, x)
    assert gradient.abs().sum() > 0
    for seed in range(4):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        h = 1e-5
        with torch.no_grad():
            ahead, behind = (weights @ reward.score(x + s * h * v, case.prompts) for s in (1, -1))
        expected = (ahead - behind) / (2 * h)
        torch.testing.assert_close((gradient * v).sum(), expected, rtol=1e-6, atol=1e-8)


def check_rows_are_independent(case: RewardCase) -> None:
    reward, x = case.hosted().reward, case.images().requires_grad_()
    score = reward.score(x, case.prompts)
    assert score.shape == (len(x),)
    for i, prompt in enumerate(case.prompts):
        alone = reward.score(x[i : i + 1], [prompt])
        torch.testing.assert_close(score[i : i + 1], alone, rtol=1e-10, atol=1e-12)
    if reward.is_differentiable:
        (gradient,) = torch.autograd.grad(score[0], x)
        assert not gradient[1:].any()


def check_prompts(case: RewardCase) -> None:
    reward, x = case.hosted().reward, case.images()
    # A combination's parts ask for what they need.
    names = "|".join(type(part).__name__ for part in reward.modules() if isinstance(part, Reward))
    if reward.needs_prompts:
        for wrong in (None, case.prompts[:-1]):
            with pytest.raises(ValueError, match=f"({names}) needs one prompt an image"):
                reward.score(x, wrong)
        other = reward.score(x, case.prompts[1:] + case.prompts[:1])
        assert not torch.equal(reward.score(x, case.prompts), other)
    else:
        torch.testing.assert_close(reward.score(x, None), reward.score(x, case.prompts), rtol=0, atol=0)


def check_skeleton(case: RewardCase) -> None:
    """Without weights the same networks, none of whose weights is read; and a score, whatever the prompts."""
    reward = case.make()
    if not reward.has_skeleton:
        return
    with without_weights("meta"):
        skeleton = case.make()
    weights = [_frozen(r) for r in (reward, skeleton)]
    assert [(n, p.shape, p.dtype) for n, p in weights[0]] == [(n, p.shape, p.dtype) for n, p in weights[1]]
    assert all(p.is_meta for _, p in weights[1])
    with without_weights("cpu"):
        other = case.make()
    x = case.images(torch.float32).requires_grad_()
    score = other.score_blank(x)
    assert score.shape == (len(x),) and score.requires_grad == (reward.is_differentiable and x.requires_grad)


def _frozen(reward: Reward) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{name}.{n}", p)
        for name, part in reward.named_modules()
        if isinstance(part, Frozen)
        for n, p in part.module.named_parameters()
    ]


def check_average(case: RewardCase) -> None:
    """The metric's value is the mean of the scores: in chunks, by `forward`, merged, in a collection, after a reset."""
    reward, x, p = case.make(), case.images(torch.float32), case.prompts
    expected = reward.score(x, p).detach().double().mean().float()
    reward.update(x[:2], p[:2])
    reward.update(x[2:], p[2:])
    torch.testing.assert_close(reward.compute(), expected)
    assert not reward.compute().requires_grad

    other = copy.deepcopy(reward)
    reward.reset()
    other.reset()
    assert reward.count == 0
    torch.testing.assert_close(reward(x[:2], p[:2]), reward.score(x[:2], p[:2]).mean().detach())
    other.update(x[2:], p[2:])
    reward.merge_state(other)
    torch.testing.assert_close(reward.compute(), expected)

    reward.reset()
    collection = MetricCollection({"reward": reward})
    collection.update(x, p)
    torch.testing.assert_close(collection.compute()["reward"], expected)


def check_is_no_part_of_the_host(case: RewardCase) -> None:
    """Nothing to train, nothing to save, never in train mode, and moved with the host."""
    host = Host(case.make())
    assert {name.split(".")[0] for name, _ in host.named_parameters()} == {"learnt"}
    assert {key for key in host.state_dict() if not key.startswith("learnt.")} == {f"reward.{k}" for k in case.saved}
    x = case.images(torch.float32)
    calm = host.eval().reward.score(x, case.prompts)
    torch.testing.assert_close(host.train().reward.score(x, case.prompts), calm, rtol=0, atol=0)
    exact = host.double().reward.score(x.double(), case.prompts)
    torch.testing.assert_close(exact.float(), calm, rtol=1e-4, atol=1e-5)
    assert exact.dtype == torch.float64
    assert not any(p.grad is not None for p in host.parameters())


def check_dtype_follows_the_images(case: RewardCase) -> None:
    reward = case.make()
    for dtype in (torch.float32, torch.float64):
        assert reward.score(case.images(dtype), case.prompts).dtype == dtype


def check_inference_mode_leaves_no_trace(case: RewardCase) -> None:
    """What validation computes in inference mode must not spoil a later gradient."""
    reward, x = case.make(), case.images(torch.float32)
    with torch.inference_mode():
        before = reward.score(x, case.prompts).clone()
    score = reward.score(x.clone().requires_grad_(), case.prompts)
    torch.testing.assert_close(score.detach(), before, rtol=1e-5, atol=1e-6)
    if reward.is_differentiable:
        score.sum().backward()


def check_pickles(case: RewardCase) -> None:
    reward, x = case.make(), case.images(torch.float32)
    again = pickle.loads(pickle.dumps(reward))
    torch.testing.assert_close(again.score(x, case.prompts), reward.score(x, case.prompts), rtol=0, atol=0)


CHECKS = [
    check_gradient,
    check_rows_are_independent,
    check_prompts,
    check_skeleton,
    check_average,
    check_is_no_part_of_the_host,
    check_dtype_follows_the_images,
    check_inference_mode_leaves_no_trace,
    check_pickles,
]

"""The record: parts of it, several of them as one, and what cannot be one."""

import pytest
import torch
from torch import Tensor

from lightning_tilt.callbacks.buffer import ReplayBuffer
from lightning_tilt.condition import Condition
from lightning_tilt.trajectory import Trajectory

K, D = 3, 2


def record(number: int, prompts: list[str] | None, each: int = 2, **changes: object) -> Trajectory:
    size = 2 if prompts is None else len(prompts)
    n = size * each
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {} if prompts is None else {"c": torch.arange(size) + 10.0 * number}
    fields: dict[str, object] = {
        "t": torch.linspace(0, 1, K + 1).double(),
        "states": draw(K + 1, n, D),
        "noise": draw(K, n, D),
        "condition": Condition(tensors, prompts, size),
        "index": torch.arange(size).repeat_interleave(each),
        "sample": torch.arange(n) + 100 * number,
        "reward": draw(n),
        "lam": float(number),
        "rollout": number,
        "weight": torch.ones(n),
        "importance": draw(n),
    }
    return Trajectory(**(fields | changes))  # type: ignore[arg-type]


def test_ends_are_a_record_of_no_steps() -> None:
    path = record(1, ["a", "b"], base_mean=torch.ones(2, 4, D), supervised=torch.arange(2))
    ends = path.ends()
    assert ends.steps == 0 and len(ends) == 4 and ends.base_mean is None and ends.supervised is None
    assert torch.equal(ends.end, path.end) and torch.equal(ends.reward, path.reward)
    loaded = Trajectory.from_dict(ends.as_dict())
    assert torch.equal(loaded.states, ends.states) and loaded.prompts == ["a", "a", "b", "b"]


def test_several_records_are_one() -> None:
    parts = [record(1, ["a", "b"]).ends(), record(2, ["c"]).ends()]
    whole = Trajectory.cat(parts)
    assert len(whole) == 6 and whole.rollout == 2 and whole.lam == 2.0
    assert whole.prompts == ["a", "a", "b", "b", "c", "c"]
    assert torch.equal(whole.end, torch.cat([p.end for p in parts]))
    told = whole.condition[whole.index].tensors["c"]
    assert told.tolist() == [10.0, 10.0, 11.0, 11.0, 20.0, 20.0]
    assert torch.equal(whole[torch.tensor([5, 0])].reward, torch.stack([parts[1].reward[1], parts[0].reward[0]]))


def test_what_only_some_records_have_the_whole_has_not() -> None:
    whole = Trajectory.cat([record(1, None), record(2, None, importance=None)])
    assert whole.importance is None and whole.reward is not None


def test_records_of_other_steps_or_without_prompts_are_not_one() -> None:
    with pytest.raises(ValueError, match="same steps"):
        Trajectory.cat([record(1, None), record(2, None).ends()])
    with pytest.raises(ValueError, match="with prompts and without"):
        Trajectory.cat([record(1, None), record(2, ["a"])])


def test_samples_of_the_buffer_are_drawn_from_all_rollouts_without_repeats() -> None:
    buffer = ReplayBuffer(size=2)
    for number in (1, 2, 3):  # the first one has left
        buffer.add(record(number, ["a", "b"]).ends())
    drawn = buffer.draw_samples(0, 5, 6)
    assert len(drawn) == 6 and len(set(drawn.sample.tolist())) == 6
    assert set(drawn.sample.tolist()) < {200, 201, 202, 203, 300, 301, 302, 303}
    assert drawn.sample.tolist() == buffer.draw_samples(0, 5, 6).sample.tolist()
    assert len({tuple(buffer.draw_samples(0, batch, 6).sample.tolist()) for batch in range(8)}) > 3
    assert len(buffer.draw_samples(0, 5, 100)) == 8  # as many as there are
    buffer.add(record(4, ["a", "b"]).ends())
    assert 400 in buffer.draw_samples(0, 5, 8).sample.tolist()
    restored = ReplayBuffer(size=2)
    restored.load_state_dict(buffer.state_dict())
    assert restored.draw_samples(0, 7, 5).sample.tolist() == buffer.draw_samples(0, 7, 5).sample.tolist()

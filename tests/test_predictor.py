"""What every predictor does with checkpoints: only what is trained is saved, and only that is asked for."""

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import nn
from toys import PromptedNet

from lightning_tilt.process import RectifiedFlow


class Twofold(PromptedNet):
    """A trained part and a frozen one whose names end alike."""

    def __init__(self) -> None:
        super().__init__(RectifiedFlow())
        self.network.requires_grad_(False)
        self.head = nn.ModuleDict({"network": copy.deepcopy(self.network).requires_grad_(True)})


class Host(LightningModule):
    """A host with a part of its own that is called as the frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = Twofold()
        self.network = nn.Sequential(nn.Linear(1, 1))


def test_only_what_is_trained_is_saved() -> None:
    state = Host().state_dict()
    names = {"network.0.weight", "network.0.bias"}
    assert {k for k in state if not k.startswith("predictor.")} == names
    inner = {k.removeprefix("predictor.") for k in state if k.startswith("predictor.")}
    assert inner == {f"head.network.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(Twofold().state_dict()) == inner


@pytest.mark.parametrize("again", [lambda host: host, copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))])
def test_a_strict_load_asks_for_all_of_it(again: Any) -> None:
    host = again(Host())
    state = host.state_dict()
    other = Host()
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.predictor.head["network"][0].weight, state["predictor.head.network.0.weight"])
    for name in state:
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            host.load_state_dict({k: v for k, v in state.items() if k != name}, strict=True)


def test_a_predictor_may_stand_anywhere_in_its_host() -> None:
    inside = nn.ModuleDict({"a": nn.ModuleDict({"b": Host()}), "c": Twofold()})
    inside.load_state_dict(inside.state_dict(), strict=True)
    state = inside.state_dict()
    del state["c.head.network.2.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*c\.head\.network\.2\.bias"):
        inside.load_state_dict(state, strict=True)

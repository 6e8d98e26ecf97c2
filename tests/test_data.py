"""Prompt files and their batches; draws for densities."""

import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader.sampler import BatchSampler

from lightning_tilt.data import DrawsDataModule, PromptDataModule, read_prompts
from lightning_tilt.data.loader import Loader


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa seven\r\n\r\n# remark\r\n  deux\u2028têtes \r\nlast".encode())
    assert read_prompts(file) == ["a seven", "deux\u2028têtes", "last"]
    assert read_prompts(str(file)) == read_prompts(file)
    assert read_prompts(["# kept"]) == ["# kept"]


@pytest.mark.parametrize(
    ("content", "culprit"),
    [(b"", "holds no prompt"), (b"\n# only\n \n", "holds no prompt"), (b"\x89PNG\r\n\xff", "is no UTF-8 text")],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, culprit: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=culprit) as caught:
        PromptDataModule(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_folders_and_empty_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*nowhere\.txt"):
        PromptDataModule(["a"], val_prompts=tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="is a folder"):
        PromptDataModule(tmp_path)
    with pytest.raises(ValueError, match="at least one string"):
        PromptDataModule([])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        PromptDataModule(["a"], batch_size=0)


PROMPTS = [f"prompt {i}" for i in range(10)]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

# Lightning 2.6 with torch 2.13; and strings need no workers.
WITH_TRAINER = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")


def epochs(data: PromptDataModule, n: int) -> list[list[list[str]]]:
    loader = data.train_dataloader()
    found = []
    for epoch in range(n):
        loader.sampler.set_epoch(epoch)  # as Lightning does
        found.append(list(loader))
    return found


def test_an_epoch_is_one_pass_in_an_order_of_its_own() -> None:
    first, second = epochs(PromptDataModule(PROMPTS, batch_size=4), 2)
    assert [len(batch) for batch in first] == [4, 4, 2] and all(type(batch) is list for batch in first)
    assert sorted(chain(*first)) == sorted(chain(*second)) == sorted(PROMPTS)
    assert first != second
    torch.manual_seed(99)
    assert epochs(PromptDataModule(PROMPTS, batch_size=4), 2) == [first, second]
    assert epochs(PromptDataModule(PROMPTS, batch_size=4, seed=1), 1) != [first]
    assert epochs(PromptDataModule(PROMPTS, batch_size=4, shuffle=False), 1)[0][0] == PROMPTS[:4]


def test_an_epoch_goes_on_where_it_stopped() -> None:
    loader = PromptDataModule(PROMPTS, batch_size=4).train_dataloader()
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    again = PromptDataModule(PROMPTS, batch_size=4).train_dataloader()
    again.load_state_dict(state)
    assert list(again) == list(batches)


def test_few_prompts_fill_a_whole_batch() -> None:
    ((batch,),) = epochs(PromptDataModule(["a", "b", "c"], batch_size=8), 1)
    assert len(batch) == 8 and set(batch) == {"a", "b", "c"}
    ((batch,),) = epochs(PromptDataModule(["a", "b", "c"], batch_size=3), 1)
    assert sorted(batch) == ["a", "b", "c"]


def test_other_stages_keep_their_order() -> None:
    data = PromptDataModule(PROMPTS, batch_size=8, test_prompts=["x", "y"])
    for loader in (data.val_dataloader(), data.predict_dataloader()):
        assert list(loader) == [PROMPTS[:8], PROMPTS[8:]]
    assert list(data.test_dataloader()) == [["x", "y"]]


@pytest.mark.parametrize(("count", "batch_size"), [(10, 2), (3, 4), (9, 4)])
def test_two_processes_see_what_one_sees(count: int, batch_size: int) -> None:
    def run(world: int, rank: int, size: int) -> list[list[str]]:
        data = PromptDataModule(PROMPTS[:count], batch_size=size)
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank)  # type: ignore[assignment]
        return epochs(data, 1)[0]

    ranks = [run(2, rank, batch_size) for rank in range(2)]
    one = run(1, 0, 2 * batch_size)
    assert len(ranks[0]) == len(ranks[1]) == len(one)
    for left, right, whole in zip(*ranks, one, strict=True):
        # The last batch of two processes is padded to equal halves.
        assert sorted(left + right)[: len(whole)] == sorted(whole) or set(whole) <= set(left + right)


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.seen["train"].append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: Any, _: int) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Any, _: int) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Any, _: int) -> Any:
        self.seen["predict"].append(batch)
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@WITH_TRAINER
def test_the_trainer_takes_all_loaders() -> None:
    model, data = Recorder(), PromptDataModule(PROMPTS, batch_size=4)
    trainer = Trainer(max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=False, log_every_n_steps=1, **QUIET)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)
    assert model.seen["train"] == list(chain(*epochs(PromptDataModule(PROMPTS, batch_size=4), 2)))
    in_order = [PROMPTS[:4], PROMPTS[4:8], PROMPTS[8:]]
    assert model.seen["val"] == 2 * in_order and model.seen["test"] == model.seen["predict"] == in_order


@WITH_TRAINER
def test_draws_say_how_many() -> None:
    model, data = Recorder(), DrawsDataModule(samples=4, batches=3, val_samples=6)
    trainer = Trainer(max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False, log_every_n_steps=1, **QUIET)
    trainer.fit(model, data)
    assert [batch.tolist() for batch in model.seen["train"]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [len(batch) for batch in model.seen["val"]] == [4, 2]
    with pytest.raises(ValueError, match="batches must be at least 1, not 0"):
        DrawsDataModule(batches=0)


TWO_PROCESSES = """
import sys; sys.path.insert(0, {here!r})
import torch; torch.set_num_threads(1)
from lightning.pytorch import Trainer
from test_data import PROMPTS, QUIET, Recorder
from lightning_tilt.data import DrawsDataModule, PromptDataModule

class Shared(Recorder):
    def on_train_end(self):
        seen = [None, None]
        torch.distributed.all_gather_object(seen, self.seen)
        if self.global_rank == 0:
            print(repr(seen))

data = [PromptDataModule(PROMPTS, batch_size=2), DrawsDataModule(samples=3, batches=2, val_samples=4)]
for module in data:
    trainer = Trainer(max_epochs=2, strategy="ddp_fork", devices=2, enable_checkpointing=False, **QUIET)
    trainer.fit(Shared(), module)
"""


def test_a_shared_loader_goes_on_with_batches_of_another_size() -> None:
    """Lightning rebuilds a loader that it shares out with the batch sampler alone."""

    def loader(size: int, rank: int, world: int) -> Loader:
        share = DistributedSampler(range(16), world, rank, shuffle=False)  # type: ignore[arg-type]
        return Loader(dataset=range(16), batch_sampler=BatchSampler(share, size, drop_last=False))

    one = loader(4, 0, 1)
    batches = iter(one)
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    halves = [loader(2, rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(one.state_dict())
    assert [[b.tolist() for b in half] for half in halves] == [[[8, 10], [12, 14]], [[9, 11], [13, 15]]]


@pytest.mark.slow
def test_two_real_processes() -> None:
    code = TWO_PROCESSES.format(here=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("[{")]
    prompts, draws = (eval(line, {"tensor": torch.tensor}) for line in lines)
    one = list(chain(*epochs(PromptDataModule(PROMPTS, batch_size=4), 2)))
    pairs = [sorted(a + b) for a, b in zip(prompts[0]["train"], prompts[1]["train"], strict=True)]
    assert pairs == [sorted(batch) for batch in one]
    assert [len(batch) for batch in draws[0]["train"]] == [3, 3, 3, 3]
    assert not {int(i) for batch in draws[0]["train"][:2] for i in batch} & {
        int(i) for batch in draws[1]["train"][:2] for i in batch
    }

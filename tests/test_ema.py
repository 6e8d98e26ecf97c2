"""The moving average of the trained parameters: a naive loop, resumed fits, and who sees it when."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from toys import PromptedNet, Recorder, SumReward, fit, trainer

from lightning_tilt.callbacks import ExponentialMovingAverage, ExportWeights, TrajectorySampler
from lightning_tilt.data import PromptDataModule
from lightning_tilt.interfaces import ExportablePredictor
from lightning_tilt.process import RectifiedFlow
from lightning_tilt.tasks import AdjointMatchingTask

WORDS = ["one", "seven"]
Weights = dict[str, Tensor]


class Exportable(PromptedNet, ExportablePredictor):
    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True)
        torch.save(copied(self), Path(folder) / "weights.pt")


class Watcher(Recorder):
    """What was in use after every batch, and where the model is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: list[Weights] = []
        self.seen: dict[str, Weights] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.raw.append(copied(pl_module.predictor))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen["validate"] = copied(pl_module.predictor)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen["end"] = copied(pl_module.predictor)


def copied(predictor: Any) -> Weights:
    return {n: p.detach().clone() for n, p in predictor.trained_parameters().items()}


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def task(lr: float = 0.1) -> AdjointMatchingTask:
    torch.manual_seed(5)
    return AdjointMatchingTask(
        predictor=Exportable(RectifiedFlow()),
        reward=SumReward(),
        checkpoint=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.5),
    )


def sampler() -> TrajectorySampler:
    return TrajectorySampler(steps=3, samples_per_condition=2, seed=1)


def naive(start: Weights, raw: list[Weights], decay: float, warmup: bool) -> Weights:
    average = {n: v.clone() for n, v in start.items()}
    for k, weights in enumerate(raw):
        d = min(decay, (1 + k) / (10 + k)) if warmup else decay
        average = {n: d * average[n] + (1 - d) * weights[n] for n in average}
    return average


def assert_close(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("decay", "warmup"), [(0.3, True), (0.999, True), (0.9, False)])
def test_average_is_a_naive_loop(decay: float, warmup: bool) -> None:
    module, ema, watcher = task(), ExponentialMovingAverage(decay, warmup), Watcher()
    start = copied(module.predictor)
    fit(module, sampler(), [WORDS] * 5, callbacks=[ema, watcher])
    assert ema.updates == 5
    assert_close(ema.average, naive(start, watcher.raw, decay, warmup))
    assert set(ema.average) == set(module.predictor.trained_parameters())


def test_only_updates_count_under_accumulation() -> None:
    module, ema, watcher = task(), ExponentialMovingAverage(0.5), Watcher()
    start = copied(module.predictor)
    fit(module, sampler(), [WORDS] * 6, callbacks=[ema, watcher], accumulate_grad_batches=3, max_steps=2)
    assert ema.updates == 2
    assert_close(ema.average, naive(start, [watcher.raw[2], watcher.raw[5]], 0.5, True))


def test_half_precision_is_averaged_in_float32() -> None:
    module, ema = task(lr=0.0), ExponentialMovingAverage()
    module.predictor.network.to(torch.bfloat16)
    ema.setup(lightning.Trainer(logger=False, accelerator="cpu"), module, "fit")
    ema.on_fit_start(None, module)  # type: ignore[arg-type]
    assert {v.dtype for v in ema.average.values()} == {torch.float32}


def data() -> PromptDataModule:
    return PromptDataModule([*WORDS, "eleven"], batch_size=1)


def run(folder: Path, steps: int, ckpt: Path | None = None) -> tuple[Any, ExponentialMovingAverage, Any]:
    ema = ExponentialMovingAverage(0.9)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [sampler(), ema, keep]
    fitter = trainer(callbacks, max_steps=steps, limit_val_batches=0, enable_checkpointing=True)
    module = task()
    fitter.fit(module, datamodule=data(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module, ema, fitter


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_fit_is_the_straight_one(tmp_path: Path) -> None:
    straight, whole, _ = run(tmp_path / "whole", 4)
    resumed, again, _ = run(tmp_path / "resumed", 4, tmp_path / "whole/step=2.ckpt")
    assert again.updates == whole.updates == 4
    assert equal(again.average, whole.average)
    assert equal(copied(resumed.predictor), copied(straight.predictor))


def test_a_checkpoint_after_the_fit_has_both(tmp_path: Path) -> None:
    module, ema, fitter = run(tmp_path, 2)
    fitter.save_checkpoint(tmp_path / "end.ckpt")
    for name in ("end.ckpt", "step=2.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        state = {n.removeprefix("predictor."): v for n, v in saved["state_dict"].items()}
        assert equal(state, copied(module.predictor)) and not equal(state, ema.average)
        assert equal(saved["callbacks"]["ExponentialMovingAverage"]["average"], ema.average)


@pytest.mark.parametrize("evaluate", [True, False])
def test_validation_and_the_end_of_a_fit_see_the_average(evaluate: bool, tmp_path: Path) -> None:
    module, watcher = task(), Watcher()
    ema = ExponentialMovingAverage(0.9, evaluate=evaluate)
    # The callbacks that judge stand before the average in the list.
    callbacks = [sampler(), watcher, ExportWeights("weights"), ema]
    fitter = trainer(callbacks, max_steps=3, default_root_dir=tmp_path, num_sanity_val_steps=0)
    fitter.fit(module, datamodule=data())
    raw = copied(module.predictor)
    assert equal(raw, watcher.raw[-1]) and not equal(raw, ema.average)
    judged = ema.average if evaluate else raw
    assert equal(watcher.seen["validate"], judged) and equal(watcher.seen["end"], judged)
    assert equal(torch.load(tmp_path / "weights/weights.pt", weights_only=True), judged)


def test_validation_between_updates_changes_no_update() -> None:
    ends = []
    for every in (1, 3):
        module = task()
        fitter = trainer([sampler(), ExponentialMovingAverage(0.9)], max_steps=3, val_check_interval=every)
        fitter.fit(module, datamodule=data())
        ends.append(copied(module.predictor))
    assert equal(*ends)


def test_checkpoints_made_while_the_average_is_in_use_hold_the_raw_parameters(tmp_path: Path) -> None:
    module, ema, watcher = task(), ExponentialMovingAverage(0.9), Watcher()
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100)
    fitter = trainer([sampler(), ema, watcher, keep], max_steps=3, enable_checkpointing=True)
    fitter.fit(module, datamodule=data())
    saved = [torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.glob("*.ckpt")]
    for state in saved:
        assert equal({n.removeprefix("predictor."): v for n, v in state.items()}, watcher.raw[-1])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validating_a_checkpoint_sees_its_average(tmp_path: Path) -> None:
    _, first, fitter = run(tmp_path, 3)
    fitter.save_checkpoint(tmp_path / "end.ckpt")
    module, watcher, ema = task(), Watcher(), ExponentialMovingAverage()
    trainer([sampler(), ema, watcher]).validate(
        module, datamodule=data(), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True
    )
    assert equal(watcher.seen["validate"], first.average) and not equal(copied(module.predictor), first.average)


def test_an_exception_leaves_the_raw_parameters() -> None:
    class Breaks(lightning.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            raise RuntimeError("here")

    module, watcher = task(), Watcher()
    fitter = trainer([sampler(), ExponentialMovingAverage(), watcher, Breaks()], max_steps=3, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="here"):
        fitter.fit(module, datamodule=data())
    assert equal(copied(module.predictor), watcher.raw[-1])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_stable_diffusion_exports_its_average(tuning: str, load: Any, tmp_path: Path) -> None:
    module = AdjointMatchingTask(
        predictor=load("sd15", tuning=tuning), reward=SumReward(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
    )
    ema = ExponentialMovingAverage(0.9)
    callbacks = [ExportWeights("weights"), ema, TrajectorySampler(steps=2, samples_per_condition=1)]
    trainer(callbacks, max_steps=2, default_root_dir=tmp_path, limit_val_batches=0).fit(module, datamodule=data())
    assert set(ema.average) == set(module.predictor.trained_parameters())
    (file,) = (tmp_path / "weights").rglob("*.safetensors")
    exported = sorted(float(v.double().square().sum()) for v in load_file(file).values())
    averaged = sorted(float(v.double().square().sum()) for v in ema.average.values())
    assert exported == pytest.approx(averaged, rel=1e-12)
    raw = sorted(float(p.detach().double().square().sum()) for p in module.predictor.trained_parameters().values())
    assert exported != pytest.approx(raw, rel=1e-12)


def test_another_model_is_refused_or_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), not 1"):
        ExponentialMovingAverage(1.0)
    ema = ExponentialMovingAverage(0.9)
    for _ in range(2):
        module = task()
        fit(module, sampler(), [WORDS] * 2, callbacks=[ema])
        assert ema.updates == 2
    wrong = {"updates": 3, "average": {"network.0.weight": torch.zeros(3)}}
    ema.load_state_dict(wrong)
    with pytest.raises(ValueError, match="of other parameters than this model trains"):
        ema.on_fit_start(None, module)  # type: ignore[arg-type]

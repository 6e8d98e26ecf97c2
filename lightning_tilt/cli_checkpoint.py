"""What the command line writes into a checkpoint, and reads from one.

checkpoint["hyper_parameters"]    the model, as `load_from_checkpoint` wants it
checkpoint["settings"]            data and sampler

A resumed run takes the model from there, and says which settings are others now: to change lam or the reward in
mid-run is a choice, not a mistake.
"""

from pathlib import Path
from typing import Any

import yaml

from lightning_tilt.checkpoints import read_checkpoint

__all__ = ["changed_settings", "saved_settings", "with_checkpoint_first"]


def saved_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of a run's configuration: plain class paths and arguments."""
    model = config["model"]
    return {
        "hyper_parameters": {
            "_class_path": model["class_path"],
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            **model.get("init_args", {}),
            **model.get("dict_kwargs", {}),
        },
        "settings": {name: config[name] for name in ("data", "sampler") if config.get(name) is not None},
    }


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Which settings differ, as `model.lam: 1.0 -> 5.0`.

    Args:
        before: a checkpoint.
        now: `saved_settings` of this run.
    """
    found = list[str]()
    for key, name in (("hyper_parameters", "model"), ("settings", "")):
        _compare(before.get(key, now[key]), now[key], name, found)
    return found


def with_checkpoint_first(args: list[str]) -> list[str]:
    """Put the hyperparameters of `--ckpt_path` before all other configuration."""
    path = next((a.split("=", 1)[1] for a in args if a.startswith("--ckpt_path=")), None)
    if path is None and "--ckpt_path" in args[:-1]:
        path = args[args.index("--ckpt_path") + 1]
    if path is None or not args or not Path(path).is_file():
        return args
    hparams = read_checkpoint(path, mmap=True).get("hyper_parameters", {})
    if "_class_path" not in hparams:
        return args
    init_args = {k: v for k, v in hparams.items() if not k.startswith("_")}
    predictor = init_args.get("predictor")
    given = predictor.get("init_args") if isinstance(predictor, dict) else None
    if isinstance(given, dict):  # a folder that is written to is the user's to name, not a file's
        given.pop("embeddings", None)
    model = {"model": {"class_path": hparams["_class_path"], "init_args": init_args}}
    return [args[0], "--config", yaml.safe_dump(model), *args[1:]]


def _compare(before: Any, now: Any, where: str, found: list[str]) -> None:
    if before == now:
        return
    nested = isinstance(before, dict) and isinstance(now, dict)
    if nested and before.get("class_path") == now.get("class_path"):
        for key in {**before, **now}:
            if key != "init_args":
                _compare(before.get(key), now.get(key), f"{where}.{key}".removeprefix("."), found)
        _compare(before.get("init_args", {}), now.get("init_args", {}), where, found)
    else:
        found.append(f"{where}: {_short(before)} -> {_short(now)}")


def _short(value: Any) -> str:
    """One value, a class by its name."""
    name = value["class_path"].rpartition(".")[2] if isinstance(value, dict) and "class_path" in value else repr(value)
    return name if len(name) <= 40 else name[:37] + "..."

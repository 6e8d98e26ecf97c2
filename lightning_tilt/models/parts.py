"""The parts of a pipeline's folder, each whole: a weight that its files lack is an error, not a random number.

`model_index.json` names the parts, and each has a folder of its own.  transformers draws a missing weight at random,
diffusers leaves it without numbers, a tokenizer without its vocabulary maps all letters to one: none of them stops, so
what they report is read here.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from lightning_tilt.interfaces.reports import first_line, without_reports

__all__ = ["check_files", "dtype_option", "load_network", "load_networks", "named_parts", "read_names", "told"]


def read_names(owner: str, file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds names with values; `owner` is whose message it is.

    Raises:
        ValueError: if it is no JSON, or holds something else.
    """
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{owner} is no JSON ({first_line(error)}); restore it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{owner} holds no names with values; restore it")
    return content


def named_parts(path: str | Path, index: Mapping[str, Any], *, without: tuple[str, ...]) -> dict[str, Any]:
    """The parts that a `model_index.json` names: for each its class, of diffusers or transformers.

    Args:
        path: of the pipeline, for messages.
        index: content of the file.
        without: parts that are left out.

    Raises:
        ValueError: if one is of an unknown class, or one that every pipeline has is not named.
    """
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or name in without or entry == [None, None]:
            continue
        parts[name] = _find_class(entry)
        if parts[name] is None:
            raise ValueError(
                f"{str(path)!r} names {entry!r} as its {name}, which is no class of diffusers or transformers; mend "
                "its model_index.json"
            )
    denoiser = "unet" if index["_class_name"] == "StableDiffusionPipeline" else "transformer"
    wanted = ["vae", denoiser, "scheduler", *(n.replace("text_encoder", "tokenizer") for n in parts)]
    for name in wanted:
        if name not in parts and name not in without:
            raise ValueError(f"model_index.json of {str(path)!r} names no {name}; restore it")
    return parts


def _find_class(entry: list[Any]) -> Any:
    """The class that ["library", "name"] is; None if there is none."""
    if len(entry) != 2 or entry[0] not in ("diffusers", "transformers"):
        return None
    try:
        return getattr(import_module(entry[0]), str(entry[1]))
    except AttributeError:
        return None


def check_files(path: str | Path, folder: Path, parts: Mapping[str, Any], allow_pickle: bool) -> None:
    """Refuse parts whose files are not all there, before any of them is read.

    Args:
        path: of the pipeline, for messages.
        folder: where its files are.
        parts: the class of each.
        allow_pickle: a `.bin` will do where there is no `.safetensors`.

    Raises:
        FileNotFoundError: if a part has no folder, no configuration, no weights or no vocabulary.
        ValueError: if its weights are a pickle.
    """
    for name, kind in parts.items():
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{str(path)!r} has no folder {name!r}, which its model_index.json names; fetch it again"
            )
        if issubclass(kind, torch.nn.Module):
            _check_network(path, folder / name, allow_pickle)
        elif "tokenizer" in name:
            _check_tokenizer(path, folder / name, dict(kind.vocab_files_names))


def _check_network(path: str | Path, folder: Path, allow_pickle: bool) -> None:
    files = _files(folder)
    if "config.json" not in files:
        raise FileNotFoundError(f"{str(path)!r}: its {folder.name} has no config.json; fetch it again")
    read_names(f"{folder.name}/config.json of {str(path)!r}", folder / "config.json")
    pickles = [file for file in files if file.endswith(".bin")]
    if any(file.endswith(".safetensors") for file in files) or (pickles and allow_pickle):
        return
    if pickles:
        raise ValueError(
            f"{str(path)!r}: the weights of its {folder.name} are a pickle, {pickles[0]}; give a folder with "
            ".safetensors, or allow_pickle: true, which reads its tensors and runs no code"
        )
    raise FileNotFoundError(f"{str(path)!r}: its {folder.name} has no weights, no file *.safetensors; fetch it again")


def _check_tokenizer(path: str | Path, folder: Path, known: dict[str, str]) -> None:
    """`known`: the files of its class; one holds all, or the others do together."""
    files = _files(folder)
    whole = known.pop("tokenizer_file", "tokenizer.json")
    gone = [f for f in ("tokenizer_config.json", *([] if whole in files else known.values())) if f not in files]
    if gone:
        raise FileNotFoundError(f"{str(path)!r}: its {folder.name} has no {' and no '.join(gone)}; fetch it again")


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def load_networks(
    path: str | Path,
    folder: Path,
    parts: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> dict[str, torch.nn.Module]:
    """Load those of the parts that are networks.

    Args:
        path: of the pipeline, for messages.
        folder: where its files are.
        parts: the class of each.
        dtypes: dtype of each by its name, "default" for the others.
        variant: of the weight files, e.g. "fp16", of the parts that have it.
        allow_pickle: read a `.bin` where there is no `.safetensors`.

    Returns:
        The networks by their names.

    Raises:
        FileNotFoundError: if no part has the variant.
        ValueError: as `load_network`.
    """
    kinds = {name: kind for name, kind in parts.items() if issubclass(kind, torch.nn.Module)}
    varied = {name for name in kinds if variant and any(f".{variant}" in file for file in _files(folder / name))}
    if variant and kinds and not varied:
        raise FileNotFoundError(f"{str(path)!r} has no weights of the variant {variant!r}; give another, or null")
    return {
        name: load_network(
            f"{str(path)!r}: its {name}", str(folder / name), kind, dtypes.get(name, dtypes["default"]),
            variant=variant if name in varied else None, allow_pickle=allow_pickle,
        )
        for name, kind in kinds.items()
    }  # fmt: skip


def load_network(
    owner: str, where: str, kind: Any, dtype: torch.dtype, *, variant: str | None = None, allow_pickle: bool = False
) -> Any:
    """One network, all of whose weights are those of its files, in eval mode.

    Args:
        owner: what it is, for messages.
        where: its folder, or its name on the Hub.
        kind: its class, of diffusers or transformers.
        dtype: of its weights.
        variant: of the weight files.
        allow_pickle: read a `.bin` where there is no `.safetensors`: tensors alone, code in it is never run.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if weights are missing or of another shape, or a file is damaged.
    """
    here = Path(where)
    safe = not allow_pickle or (any(here.glob("*.safetensors")) if here.is_dir() else None)
    options: dict[str, Any] = {"use_safetensors": safe, "output_loading_info": True}
    if variant is not None:
        options["variant"] = variant
    if kind.__module__.startswith("transformers."):
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}  # told below, by name
    else:
        options[dtype_option()] = dtype
    with told(owner), without_reports():
        network, report = kind.from_pretrained(where, **options)
    lacking = {*report["missing_keys"], *(name for name, weight in network.state_dict().items() if weight.is_meta)}
    lacking |= {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    if lacking:
        raise ValueError(
            f"{owner} is damaged or another network's: {len(lacking)} weights of {kind.__name__} are missing or of "
            f"another shape, {min(lacking)} among them; fetch it again"
        )
    return network.eval()


def dtype_option() -> str:
    """What diffusers calls the dtype of what it loads: renamed in 0.42, where the older name warns."""
    import diffusers

    return "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


@contextmanager
def told(owner: str) -> Iterator[None]:
    """Say in one line what could not be loaded: damaged files fail in many ways.

    Raises:
        FileNotFoundError: for an error of the system.
        ValueError: for any other.
    """
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds more than tensors, and no code of a file is run"
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{owner} could not be loaded: {reason}") from None

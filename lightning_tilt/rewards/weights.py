"""Find a network's weights, on disk or on the Hub, and read them so that nothing but tensors can come in.

A `.safetensors` file is preferred: one beside the named file, with the same stem, is taken in its place.  Pickles
(`.pt`, `.pth`, `.bin`) are read by torch's weights-only unpickler, which builds tensors and plain containers and
refuses all else; there is no switch that turns it off.  `sha256` pins the content of the file that is read.

Weights that do not fit are refused: each weight of the network has to be there, in its shape, and none is left over.
"""

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tilt.assets import locate
from lightning_tilt.interfaces.reports import first_line
from lightning_tilt.interfaces.skeleton import skeleton_device

__all__ = ["check_fit", "check_sha256", "find_file", "first_line", "is_local", "only_prefixed", "read_weights"]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def is_local(path: str) -> bool:
    """Whether `path` can only mean a file or folder, not `organisation/name` on the Hub.

    Example:
        >>> is_local("xswu/HPSv2"), is_local("weights/HPS_v2.1_compressed.pt"), is_local("/models/clip")
        (False, True, True)
    """
    here = locate(path)
    return here.exists() or path.startswith(("/", ".", "~")) or here.suffix in _SUFFIXES or len(here.parts) > 2


def find_file(owner: str, path: str, name: str, *, as_named: bool = False) -> Path:
    """Where the weights are; inside `without_weights` nothing is fetched from the Hub.

    Args:
        owner: whose message it is.
        path: the file itself, a folder that has the file `name`, or the name of a Hub repository that has it.
        name: as it is called where it is published; `.safetensors` in place of its suffix is looked for first.
        as_named: take no `.safetensors` in its place.

    Raises:
        FileNotFoundError: if it is not there, or the Hub cannot be reached.
    """
    here = locate(path)
    if not is_local(path):
        if skeleton_device() is not None:
            return here / name
        return _fetch(owner, path, [name] if as_named else [str(Path(name).with_suffix(".safetensors")), name])
    wanted = here / name if here.is_dir() else here
    safe = wanted.with_suffix(".safetensors")
    if safe.is_file() and not as_named:
        return safe
    if not wanted.is_file():
        raise FileNotFoundError(
            f"{owner} found no file {str(wanted)!r}; give the path of {name} (or of its .safetensors), the folder that "
            "holds it, or a Hub name"
        )
    return wanted


def _fetch(owner: str, repository: str, names: list[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # The last error is the one about the file that is published, or the first that kept us from the Hub.
    reached, reason = True, ""
    for name in names:
        try:  # each call tries for long: where the Hub is out of reach, the others look at what was fetched before
            return Path(hf_hub_download(repository, name, local_files_only=not reached))
        except (OSError, ValueError, EntryNotFoundError) as error:
            reason = first_line(error) if reached else reason
            absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            reached = reached and absent
    raise FileNotFoundError(
        f"{owner} could not fetch {name} of {repository!r} from the Hub; check the name and the connection, or give "
        f"the path of a local file ({reason})"
    )


def check_sha256(owner: str, file: Path, sha256: str | None) -> None:
    """Refuse a file of another content.

    Args:
        owner: whose message it is.
        file: what is about to be read.
        sha256: 64 hexadecimal digits; None: no check.

    Raises:
        ValueError: if the checksum differs, or is none.
    """
    if sha256 is None:
        return
    wanted = sha256.strip().lower()
    if len(wanted) != 64 or not set(wanted) <= set("0123456789abcdef"):
        raise ValueError(f"{owner}: sha256 must be 64 hexadecimal digits, not {sha256!r}; `sha256sum FILE` prints them")
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != wanted:
        raise ValueError(
            f"{owner}: {str(file)!r} has the sha256 {digest.hexdigest()}, not {wanted}; fetch the file again, or mend "
            "sha256 if another file is meant"
        )


def read_weights(owner: str, file: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names, on the CPU; none inside `without_weights`.

    Args:
        owner: whose message it is.
        file: `.safetensors`, or a pickle; of a training checkpoint its `state_dict` is taken.
        sha256: of the file.

    Raises:
        ValueError: if the file is truncated, holds more than tensors and plain data, or has another checksum.
    """
    if skeleton_device() is not None:
        return {}
    check_sha256(owner, file, sha256)
    state = _read_safetensors(owner, file) if file.suffix == ".safetensors" else _read_pickle(owner, file)
    while isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    named = isinstance(state, Mapping) and all(isinstance(k, str) for k in state)
    if not named or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{owner}: {str(file)!r} is no checkpoint: it holds no names with tensors; give another file")
    return {k.removeprefix("module."): v for k, v in state.items()}


def _read_safetensors(owner: str, file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(_unreadable(owner, file, error)) from None


def _read_pickle(owner: str, file: Path) -> Any:
    with file.open("rb") as content:
        start = content.read(20)
    if start and start[:1] not in b"P\x80":  # an archive of torch's, or a pickle
        text = start.decode(errors="replace").split("\n")[0]
        raise ValueError(_unreadable(owner, file, ValueError(f"it begins with {text!r}")))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what it may not read is told below
            # Only files in torch's present format can be mapped.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "weights" not in str(error).lower():  # torch's own refusals name the weights-only unpickler
            raise ValueError(_unreadable(owner, file, error)) from None
        raise ValueError(
            f"{owner}: {str(file)!r} is refused: the pickle holds more than tensors, which could be any code, and none "
            "of it was run; where you trust it, save its state dict as .safetensors and give that"
        ) from None
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(_unreadable(owner, file, error)) from None


def _unreadable(owner: str, file: Path, error: Exception) -> str:
    return (
        f"{owner}: {str(file)!r} cannot be read, it is truncated or no checkpoint; fetch it again ({first_line(error)})"
    )


def only_prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def check_fit(owner: str, source: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of the network.

    Args:
        owner: whose message it is.
        source: where they come from, for the message.
        state: weights by name.
        wanted: the network's own; only their shapes are looked at.

    Raises:
        ValueError: if a weight is missing, left over, or of another shape.
    """
    missing, left = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
    other = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    told = [
        f"{_some(names)} {what}"
        for names, what in ((missing, "missing"), (left, "left over"), (other, "of another shape"))
        if names
    ]
    if told:
        raise ValueError(f"{owner}: {source!r} is a checkpoint of another network: {', '.join(told)}")


def _some(names: Collection[str]) -> str:
    """The first two of them, and how many more."""
    shown = ", ".join(list(names)[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown

"""Embeddings of prompts: the newest in memory, all of them in a folder where one is given.

    (prompt, identity of the text encoders)  -- SHA-256 -->  <folder>/<hash>.safetensors

A prompt's embedding depends on nothing but the prompt and the text encoders, and these are most of SD 3's weights.
With all prompts in the folder, the encoders need not be in memory at all.

A file is written under a temporary name and renamed, so that several processes can share a folder; it names its prompt
and its encoders, so that a foreign, cut or damaged one is recognised and made again.
"""

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["PromptEmbeddings", "identity_of"]

_BLOCK = 1 << 24  # bytes read at a time


class PromptEmbeddings:
    """The embeddings of prompts by one set of text encoders.

    Args:
        limit: prompts whose embeddings stay in memory; the least recently used go first.
        folder: where all of them are kept; None keeps none on disk.
        identity: what the embeddings depend on beside the prompt and the dtype, plain JSON.

    Raises:
        ValueError: if the folder is a file.
    """

    def __init__(self, limit: int, folder: str | Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"embeddings {str(folder)!r} is a file; give a folder for the embeddings of prompts")
        self.identity = dict(identity or {})
        self.limit = limit
        self._known: dict[tuple[str, torch.dtype], dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """How many are in memory."""
        return len(self._known)

    def find(self, prompt: str, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """The embeddings of `prompt` by encoders of `dtype`, on the CPU, or None."""
        found = self._known.pop((prompt, dtype), None)
        if found is None and self.folder is not None:
            found = self._read(prompt, dtype)
        if found is not None:
            self._remember(prompt, dtype, found)
        return found

    def add(self, prompt: str, dtype: torch.dtype, embedding: Mapping[str, Tensor]) -> None:
        """Remember the embeddings of `prompt`, and write them where there is a folder.

        Raises:
            OSError: if the folder cannot be written to.
        """
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in embedding.items()}
        if self.folder is not None:
            self._write(prompt, dtype, kept)
        self._remember(prompt, dtype, kept)

    def forget(self) -> None:
        """Drop what is in memory; files stay."""
        self._known.clear()

    def file(self, prompt: str, dtype: torch.dtype) -> Path:
        """Where the embeddings of `prompt` are kept; the prompt is no part of the name but for its hash."""
        if self.folder is None:
            raise ValueError("these embeddings have no folder")
        key = hashlib.sha256(self._label(prompt, dtype).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def _label(self, prompt: str, dtype: torch.dtype) -> str:
        return json.dumps({**self.identity, "prompt": prompt, "dtype": str(dtype)}, sort_keys=True)

    def _remember(self, prompt: str, dtype: torch.dtype, embedding: dict[str, Tensor]) -> None:
        self._known.pop((prompt, dtype), None)
        self._known[prompt, dtype] = embedding
        while len(self._known) > self.limit:
            self._known.pop(next(iter(self._known)))

    def _read(self, prompt: str, dtype: torch.dtype) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError, safe_open

        file = self.file(prompt, dtype)
        if not file.is_file():
            return None
        try:
            with torch.inference_mode(False), safe_open(file, framework="pt") as stored:
                if (stored.metadata() or {}).get("label") != self._label(prompt, dtype):
                    raise ValueError("it belongs to another prompt or other text encoders")
                return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"the embedding in {file} cannot be used ({reason}); it is made again", stacklevel=2)
            return None

    def _write(self, prompt: str, dtype: torch.dtype, embedding: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        file = self.file(prompt, dtype)
        draft = file.with_name(f".{file.stem}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(save(embedding, metadata={"label": self._label(prompt, dtype)}))
            draft.replace(file)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise OSError(f"embeddings cannot be written to {str(self.folder)!r}: {error}") from error


def identity_of(
    path: str | Path, parts: Iterable[str], *, revision: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """What the text encoders are, in a few hundred bytes.

    A Hub repository is its name and revision.  A folder is what its files hold, all of their bytes, so that it may be
    moved, and any other weight is another encoder; T5's 9 GB take some fifteen seconds.

    Args:
        path: folder of a pipeline, or a name on the Hub.
        parts: the sub-folders of encoders and tokenizers.
        revision: of the Hub repository.
        variant: of the weight files.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return {"path": str(path), "revision": revision, "variant": variant}
    content = hashlib.sha256()
    for part in sorted(parts):
        for file in sorted(p for p in (folder / part).glob("*") if p.is_file()):
            size = file.stat().st_size
            content.update(json.dumps([part, file.name, size]).encode())
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    content.update(block)
    return {"content": content.hexdigest(), "variant": variant}

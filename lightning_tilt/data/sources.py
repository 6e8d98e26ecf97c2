"""Where prompts come from: a list, a text file, a column of a table, a list in JSON, a data set on the Hub.

    prompts.txt                        one a line; blank lines and lines that begin with # are skipped
    prompts.csv   prompts.tsv          the column `prompt`
    prompts.json                       a list of strings, or of objects with the key `prompt`
    prompts.jsonl                      a string or an object a line
    prompts.csv:caption                another column or key
    hf://owner/name:split:column       of a data set on the Hub (library `datasets`); `train` and `prompt` if left out,
                                       `hf://owner/name/config@revision:train[:100]:caption` with everything

Files are UTF-8, with or without a byte-order mark.  They are read as data and nothing else; a prompt is whatever the
text is, without white space around it, up to 10,000 characters.  A malformed file is refused with the line, and never
half read.
"""

import csv
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_tilt.assets import locate
from lightning_tilt.condition import quoted

__all__ = ["PromptSource", "read_prompts"]

PromptSource = str | Path | list[str]
"""Where prompts are (see the module), or the prompts themselves."""

_TABLE = re.compile(r"(?P<file>.+\.(?:csv|tsv|json|jsonl|ndjson))(?::(?P<column>[^/\\]*))?", re.IGNORECASE | re.DOTALL)
_HUB = re.compile(
    r"hf://(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[^:]+))?"
    r"(?::(?P<split>[^:\[]+(?:\[[^\]]*\])?))?(?::(?P<column>.+))?"
)
_MEND = "give a text file with one prompt a line"
_LONGEST = 10_000  # characters of a prompt: encoders read a few hundred, and reports show every one
_PATH = 1_000  # characters of a path that a message shows: what is longer is hardly one
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FOREIGN = (
    ".arrow", ".bz2", ".feather", ".gz", ".htm", ".html", ".npy", ".npz", ".ods", ".parquet", ".pickle", ".pkl",
    ".toml", ".xls", ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst",
)  # fmt: skip


def read_prompts(source: PromptSource) -> list[str]:
    """The prompts of a file, of a data set on the Hub, or of a list.

    Args:
        source: see the module.

    Raises:
        FileNotFoundError: if there is no such file, or the Hub or the data set cannot be reached.
        ModuleNotFoundError: if a data set is asked for and `datasets` is not installed.
        ValueError: if it is a folder, no text, malformed, or holds no prompt.
    """
    if not isinstance(source, (str, Path)):
        if not source or not all(isinstance(prompt, str) for prompt in source):
            raise ValueError(f"prompts must be a file or a list of at least one string, not {quoted(source)}")
        return [_checked(prompt, f"prompts, entry {i}") for i, prompt in enumerate(source, 1)]
    if not str(source).strip():
        raise ValueError(f"prompts: there is no name of a file in {str(source)!r}; {_MEND}")
    if str(source).startswith("hf:"):
        return _hub(str(source))
    column, path = "prompt", str(source)
    table = _TABLE.fullmatch(path)
    try:
        if table is not None and not locate(path).exists():
            path, column = table["file"], column if table["column"] is None else table["column"]
        file = locate(path)
        text = _text(file, str(source))
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # a prompt in place of a file, a home that nobody has
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"there is no prompt file {quoted(source, _PATH)} ({reason[:80]}); {_MEND}") from None
    reader = _READERS.get(file.suffix.lower(), _lines)
    prompts = [_checked(value, f"prompt file {path!r}, {where}") for where, value in reader(text, path, column)]
    if not prompts:
        mends = {".csv": "write one a row", ".tsv": "write one a row", ".json": "write a list of them"}
        raise ValueError(f"prompt file {path!r} holds no prompt; {mends.get(file.suffix.lower(), 'write one a line')}")
    return prompts


def _text(file: Path, source: str) -> str:
    if file.is_dir():
        raise ValueError(f"prompts {source!r} is a folder; {_MEND}")
    if not file.is_file():
        plain = source.rpartition(":")[0]
        mend = f"only tables have columns: give {plain}" if plain and locate(plain).is_file() else _MEND
        raise FileNotFoundError(f"there is no prompt file {quoted(source, _PATH)}; {mend}")
    if file.suffix.lower() in _FOREIGN:
        raise ValueError(f"prompt file {source!r}: no {file.suffix} is read, but .txt, .csv, .tsv, .json and .jsonl")
    try:
        text = file.read_bytes().decode("utf-8-sig")  # bytes: line ends within a cell or a string are its own
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"prompt file {source!r} is no UTF-8 text; {_MEND}")
    return text


def _checked(value: object, where: str) -> str:
    """A prompt without white space around it."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: a prompt is a string, not {quoted(value)}")
    prompt = value.strip()
    if not prompt:
        raise ValueError(f"{where}: the prompt is empty; remove it, or write one")
    if len(prompt) > _LONGEST:
        raise ValueError(f"{where}: the prompt has {len(prompt):,} characters, and at most {_LONGEST:,} are read")
    if _CONTROL.search(prompt) or any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError(f"{where}: the prompt has a character that is no text (a control, or half a surrogate pair)")
    return prompt


_Found = Iterable[tuple[str, object]]


def _lines(text: str, path: str, column: str) -> _Found:
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip() and not line.strip().startswith("#"):
            yield f"line {number}", line


def _delimited(delimiter: str) -> Callable[[str, str, str], _Found]:
    def rows(text: str, path: str, column: str) -> _Found:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        last = 0
        try:
            for cells in reader:
                line, last = last + 1, reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                if header is None:
                    header = [name.strip() for name in cells]
                    place = _place(header, column, path)
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"prompt file {path!r}, line {line}: {len(cells)} cells where the header has {len(header)}; "
                        "put a prompt with commas, quotes or line ends in double quotes"
                    )
                yield f"line {line}", cells[place]
        except csv.Error as error:
            reason = f"a cell is too long: a prompt has at most {_LONGEST:,} characters"
            reason = reason if "field larger" in str(error) else str(error)
            raise ValueError(f"prompt file {path!r}, line {last + 1}: {reason}") from None

    return rows


def _place(header: list[str], column: str, path: str) -> int:
    if header.count(column) != 1:
        found = "has several columns" if column in header else "has no column"
        if len(header) == 1 and ";" in header[0]:
            raise ValueError(f"prompt file {path!r} parts its cells by semicolons; write commas, or tabs in a .tsv")
        raise ValueError(
            f"prompt file {path!r} {found} {column!r}; its first line names {', '.join(map(quoted, header[:20]))}: "
            f"give {path}:COLUMN"
        )
    return header.index(column)


def _json(text: str, path: str, column: str) -> _Found:
    content = _parsed(text, f"prompt file {path!r}")
    if not isinstance(content, list):
        inner = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
        mend = f": write the list under {quoted(inner[0])} alone" if inner else ""
        raise ValueError(f"prompt file {path!r} holds {quoted(content)}, where a list of prompts should be{mend}")
    for number, entry in enumerate(content, 1):
        yield f"entry {number}", _entry(entry, f"prompt file {path!r}, entry {number}", path, column)


def _json_lines(text: str, path: str, column: str) -> _Found:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"prompt file {path!r}, line {number}"
            yield f"line {number}", _entry(_parsed(line, where), where, path, column)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from None


def _entry(entry: object, where: str, path: str, key: str) -> object:
    if not isinstance(entry, dict):
        return entry
    if key not in entry:
        raise ValueError(
            f"{where} has no key {key!r}; it has {', '.join(map(quoted, list(entry)[:20])) or 'none'}: give {path}:KEY"
        )
    return entry[key]


_READERS: dict[str, Callable[[str, str, str], _Found]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}


def _hub(source: str) -> list[str]:
    """A column of a data set on the Hub, without running any code of it."""
    match = _HUB.fullmatch(source)
    if match is None:
        raise ValueError(f"prompts {source!r}: a data set is hf://owner/name:split:column")
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"prompts {source!r} need the library datasets: pip install 'lightning-tilt[hub]'"
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:  # older ones may run a data set's own script
        raise ValueError(f"prompts {source!r} need datasets >= 4, and {datasets.__version__} is installed")
    split, column = match["split"] or "train", match["column"] or "prompt"
    try:
        table = datasets.load_dataset(match["name"], match["config"], split=split, revision=match["revision"])
    except Exception as error:  # of the network, the Hub, the files, the name of the split: many classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"prompts {source!r} could not be loaded: {reason}; check the name, the split, the connection and, for a "
            "gated data set, `hf auth login`"
        ) from None
    if column not in table.column_names:
        raise ValueError(f"prompts {source!r}: no column {column!r}; it has {', '.join(table.column_names)}")
    values = table.select_columns([column])[column]
    prompts = [_checked(value, f"prompts {source!r}, row {i}") for i, value in enumerate(values)]
    if not prompts:
        raise ValueError(f"prompts {source!r}: the split holds no row")
    return prompts

"""Prompts from tables, JSON and data sets: what is read, and what a malformed file is told."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_tilt.data import PromptDataModule, read_prompts

WANTED = ["a seven", 'a "quoted", one', "two\nlines", "数字 🎲", "# kept"]
ROWS = 'id,prompt,caption\n1, a seven ,A\n2,"a ""quoted"", one",B\n\n3,"two\nlines",C\n4,数字 🎲,D\n5,# kept,E\n'


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def make(name: str, content: str | bytes) -> Path:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", ROWS),
        ("b.CSV", "\ufeff" + ROWS.replace("\n", "\r\n").replace("two\r\nlines", "two\nlines")),
        ("c.tsv", ROWS.replace(",", "\t").replace('""quoted""\t one', '""quoted"", one')),
        ("d.json", json.dumps(WANTED)),
        ("e.json", json.dumps([{"prompt": p, "caption": "x"} for p in WANTED], ensure_ascii=False)),
        ("f.jsonl", "\n".join(json.dumps({"prompt": p}) for p in WANTED) + "\n\n"),
        ("g.ndjson", "\r\n".join(json.dumps(p) for p in WANTED)),
    ],
)
def test_formats(name: str, content: str, write: Any) -> None:
    file = write(name, content)
    assert read_prompts(file) == read_prompts(str(file)) == read_prompts(f"{file}:prompt") == WANTED
    assert PromptDataModule(["x"], test_prompts=str(file)).test_prompts == WANTED


def test_another_column(write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = write("a.csv", ROWS)
    assert read_prompts(f"{table}:caption") == list("ABCDE")
    assert read_prompts(f"{write('b.json', json.dumps([{'my text': 'x'}]))}:my text") == ["x"]
    # A file whose name has a colon is that file.
    assert read_prompts(write("c.csv:d.csv", "prompt\ny\n")) == ["y"]
    monkeypatch.chdir(tmp_path)
    assert read_prompts("a.csv:caption") == list("ABCDE")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "number,text\n1,x\n", r"a\.csv' has no column 'prompt'; its first line names 'number', 'text': give"),
        ("a.csv", "prompt,prompt\nx,y\n", "several columns 'prompt'"),
        ("a.csv", "prompt,n\nx,1\na seven, please,2\n", "line 3: 3 cells where the header has 2"),
        ("a.csv", 'n,prompt\n1,"a\nb"\n2\n', "line 4: 1 cells"),
        ("a.csv", 'prompt\n"a" b\n', "line 2: "),
        ("a.csv", 'prompt\n"never closed\n', "line 2: "),
        ("a.csv", 'prompt,n\n"  ",1\n', "line 2: the prompt is empty"),
        ("a.csv", "prompt\n" + "x" * 200_000, "line 2: a cell is too long: a prompt has at most 10,000 characters"),
        ("a.csv", "prompt;n\nx;1\n", "parts its cells by semicolons; write commas"),
        ("a.csv", "", "holds no prompt; write one a row"),
        ("a.csv", "prompt\n", "holds no prompt; write one a row"),
        ("a.txt", "# nothing\n", "holds no prompt; write one a line"),
        ("a.txt", "x\n" + "y" * 10_001, "line 2: the prompt has 10,001 characters, and at most 10,000 are read"),
        ("a.txt", "x\na \x1b[31mred\n", "line 2: the prompt has a character that is no text"),
        ("a.yaml", "- a\n- b\n", r"no \.yaml is read, but \.txt, \.csv, \.tsv, \.json and \.jsonl"),
        ("a.PARQUET", "PAR1 that decodes", r"no \.PARQUET is read"),
        ("a.csv", b"prompt\n\xff\xfe", "no UTF-8 text"),
        ("a.json", "", "is no JSON: Expecting value at line 1, column 1"),
        ("a.json", '["a",\n"b"', "is no JSON: .* at line 2"),
        ("a.json", "[]", "holds no prompt; write a list of them"),
        ("a.json", '{"prompts": ["a"]}', "where a list of prompts should be: write the list under 'prompts' alone"),
        ("a.json", '{"a": 3}', "where a list of prompts should be$"),
        ("a.json", '["a", 3]', "entry 2: a prompt is a string, not 3"),
        ("a.json", '["a", {"text": "b"}]', "entry 2 has no key 'prompt'; it has 'text': give"),
        ("a.json", '[{"prompt": null}]', "entry 1: a prompt is a string, not None"),
        ("a.json", '["\\ud800"]', "entry 1: the prompt has a character that is no text"),
        ("a.json", '["\\u0000"]', "entry 1: the prompt has a character that is no text"),
        ("a.json", "[" * 100_000, "cannot be read as JSON"),
        ("a.json", "[" + "9" * 5000 + "]", "cannot be read as JSON|a prompt is a string"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        ("a.jsonl", '{"prompt": "a"}\n\n["b"]', r"line 3: a prompt is a string, not \['b'\]"),
    ],
)
def test_malformed_files_are_refused_with_the_place(name: str, content: str | bytes, message: str, write: Any) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(name, content))


def test_missing_files(tmp_path: Path) -> None:
    for name in ("no.csv", "no.csv:column", "no.json", "a/b:c"):
        with pytest.raises(FileNotFoundError, match="there is no prompt file"):
            read_prompts(str(tmp_path / name))


class Table:
    column_names = ("text", "Prompt")

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def select_columns(self, names: list[str]) -> dict[str, list[Any]]:
        return {names[0]: self._rows}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the library `datasets`: what was asked for, and a table of two rows."""
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Table:
        asked.append((name, config, split, revision))
        if name == "gone/away":
            raise ConnectionError("no route to the Hub\nsecond line")
        return Table(["a seven", 3] if name == "bad/rows" else ["a seven ", "two"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="4.2.0", load_dataset=load_dataset))
    return asked


def test_data_sets_of_the_hub(hub: list[Any]) -> None:
    assert read_prompts("hf://me/parti:train:Prompt") == ["a seven", "two"]
    assert read_prompts("hf://me/parti/en@v1:test[:10]:Prompt") == ["a seven", "two"]
    assert hub == [("me/parti", None, "train", None), ("me/parti", "en", "test[:10]", "v1")]
    with pytest.raises(ValueError, match="no column 'prompt'; it has text, Prompt"):
        read_prompts("hf://me/parti")
    with pytest.raises(ValueError, match="row 1: a prompt is a string, not 3"):
        read_prompts("hf://bad/rows:train:text")
    with pytest.raises(FileNotFoundError, match=r"could not be loaded: no route to the Hub; check the name") as error:
        read_prompts("hf://gone/away")
    assert "\n" not in str(error.value)
    for wrong in ("hf://", "hf:me/parti", "hf://a b"):
        with pytest.raises(ValueError, match="hf://owner/name:split:column"):
            read_prompts(wrong)


def test_the_library_of_data_sets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"need the library datasets: pip install 'lightning-tilt\[hub\]'"):
        read_prompts("hf://me/parti")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="2.19.0"))
    with pytest.raises(ValueError, match=r"need datasets >= 4, and 2\.19\.0 is installed"):
        read_prompts("hf://me/parti")


@pytest.mark.parametrize("source", ["a prompt in place of a file " * 20, "~nobody-has-this-home/prompts.txt"])
def test_what_is_no_path_is_no_file(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no prompt file"):
        read_prompts(source)


def test_columns_are_of_tables(write: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"only tables have columns: give .*a\.txt$"):
        read_prompts(f"{write('a.txt', 'seven')}:prompt")


@pytest.mark.parametrize("source", ["", "  "])
def test_no_name_is_no_folder(source: str) -> None:
    with pytest.raises(ValueError, match="there is no name of a file in"):
        read_prompts(source)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("\ud800", "a character that is no text"), ("\x07", "a character that is no text"), ("", "the prompt is empty"),
     (" \n", "the prompt is empty"), ("x" * 10_001, "the prompt has 10,001 characters")],
)  # fmt: skip
def test_prompts_of_a_list_are_checked_as_those_of_a_file(wrong: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"prompts, entry 2: .*{told}"):
        read_prompts(["seven", wrong])
    assert read_prompts([" seven\n", "x" * 10_000, "a\tb\nc"]) == ["seven", "x" * 10_000, "a\tb\nc"]

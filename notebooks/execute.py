"""Execute the notebooks: `NN_name.py` becomes `NN_name.ipynb`, with all that it printed and drew.

    python notebooks/execute.py            all of them
    python notebooks/execute.py 01 04      those whose name begins so

The script is the source; times, identifiers and what went to stderr are left out, so that a second execution on the
same machine writes the same file.
"""

import resource
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(script: Path) -> Path:
    """Run a script cell by cell in a kernel of its own, and write the notebook beside it."""
    notebook = jupytext.read(script, fmt="py:percent")
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and o.get("text", "shown").strip()]
    written = script.with_suffix(".ipynb")
    nbformat.write(notebook, written)
    return written


def _cpu_seconds() -> float:
    """Of all kernels so far, and of what they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Execute what the command line names."""
    scripts = sorted(HERE.glob("[0-9]*.py"))
    for script in scripts:
        if len(sys.argv) == 1 or script.name.startswith(tuple(sys.argv[1:])):
            before = _cpu_seconds()
            written = execute(script)
            size, seconds = written.stat().st_size / 1000, _cpu_seconds() - before
            print(f"{written.relative_to(HERE.parent)}: {size:.0f} kB, {seconds:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()

# Two commands: `make demo` and `make test`.  Each makes .venv if it is missing and installs what constraints.txt pins.
#
#   make demo    tune a small text-to-image model towards a reward; CONFIG=... another one, ARGS="..." more flags
#   make test    linters, types, unit tests, doctests and every small config; PYTEST_ARGS="..." more flags
#   make test-slow   the tests that take longer than a minute
#   make faults  the table of what killed runs come back from
#   make lint    ruff and mypy alone         make models   train the embedded models again
#   make clean   remove what the tools leave (not .venv, not runs/)

PYTHON ?= python3
CONFIG ?= configs/digits/sd15_adjoint_matching.yaml
ARGS ?=
PYTEST_ARGS ?=

BIN := .venv/bin
# What is installed is named by what asked for it, so that a second call installs nothing and a changed pin does.
HASH := $(shell (pwd; cat pyproject.toml constraints.txt) | cksum | cut -d' ' -f1)
BASE := .venv/.installed-$(HASH)
DEV := .venv/.installed-dev-$(HASH)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow faults models lint install clean
.DELETE_ON_ERROR:

demo: $(BASE)
	$(BIN)/lightning-tilt fit --config $(CONFIG) $(ARGS)
	@ls -t runs/*/before_after.png 2>/dev/null | head -n 1 | sed 's/^/Before and after: /'

# Many small tensors: one thread a worker is faster than many threads in one.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 $(PYTEST_ARGS)

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

faults: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/runs.py

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy -p lightning_tilt

models: $(DEV)
	$(BIN)/python -m lightning_tilt.assets.training all

install: $(DEV)

.venv/pyvenv.cfg:
	$(PYTHON) -m venv .venv

# torch comes first and alone: it is most of the download, and the one worth a progress bar.
$(BASE): | .venv/pyvenv.cfg
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --quiet --editable .
	@touch $@

$(DEV): $(BASE)
	$(PIP_INSTALL) --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

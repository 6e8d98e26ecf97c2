# Two commands: `make demo` and `make test`.  Each makes .venv if it is missing and installs what constraints.txt pins.
#
#   make demo    tune a small text-to-image model towards a reward; CONFIG=... another one, ARGS="..." more flags
#   make test    linters, types, unit tests, doctests and every small config; PYTEST_ARGS="..." more flags
#   make test-slow   the tests that take longer than a minute
#   make test-parity   rewards against open_clip and hpsv2 themselves, in an environment of their own, .venv-parity
#   make test-oldest, test-newest   the unit tests in environments of their own, .venv-oldest with the lowest versions that
#                pyproject.toml allows (on Python 3.10: PYTHON=python3.10), .venv-newest with today's newest
#   make test-wheel   the wheel among nothing but what its metadata ask for, installed anew
#   make test-extras  that pip finds versions for the extras, or says where they exclude each other; installs none
#   make bench   benchmarks/RESULTS.md anew; ONLY="names ..." some of its sections, ARGS=--quick a size that shows it runs
#   make faults  the table of what killed runs come back from
#   make notebooks   execute the notebooks and keep what they show; NOTEBOOKS="01 04" some of them
#   make docs    the site, strictly, into build/docs   make docs-pictures   the losses' pictures again, half an hour
#   make lint    ruff and mypy alone         make models   train the embedded models again
#   make release VERSION=0.2.0   what a release would do; ARGS=--yes does it
#   make clean   remove what the tools leave (not .venv*, not runs/)

PYTHON ?= python3
CONFIG ?= configs/digits/sd15_adjoint_matching.yaml
ARGS ?=
ONLY ?=
PYTEST_ARGS ?=
NOTEBOOKS ?=
VENV := .venv
CONSTRAINTS := constraints.txt
VERSION :=

BIN := $(VENV)/bin
# What is installed is named by what asked for it, so that a second call installs nothing and a changed pin does.
# Without pins the day asks: the newest of yesterday is not today's.
HASH := $(shell (pwd; cat pyproject.toml $(CONSTRAINTS); $(if $(CONSTRAINTS),,date +%F)) | cksum | cut -d' ' -f1)
BASE := $(VENV)/.installed-$(HASH)
DEV := $(VENV)/.installed-dev-$(HASH)
KERNEL := $(VENV)/.installed-notebooks-$(HASH)
DOCS := $(VENV)/.installed-docs-$(HASH)
PARITY := .venv-parity/.installed-$(HASH)
PARITY_INSTALL := .venv-parity/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt
PINS := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS),--upgrade --upgrade-strategy eager)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PINS)

.PHONY: demo test unit test-slow test-parity test-oldest test-newest test-wheel test-extras faults notebooks docs
.PHONY: docs-pictures models bench lint install release clean
.DELETE_ON_ERROR:

demo: $(BASE)
	$(BIN)/lightning-tilt fit --config $(CONFIG) $(ARGS)
	@ls -t runs/*/before_after.png 2>/dev/null | head -n 1 | sed 's/^/Before and after: /'

# With the documentation's own requirements, so that its tests are not skipped.
test: lint $(DOCS) unit

# Many small tensors: one thread a worker is faster than many threads in one.
unit: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 $(PYTEST_ARGS)

test-slow: $(DEV) $(DOCS)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Warnings of pip about hpsv2 are right: it pins an old pytest, so what it needs is installed by name, without its pins,
# and its wheel lacks the vocabulary, which open_clip has.
$(PARITY):
	$(PYTHON) -m venv .venv-parity
	$(PARITY_INSTALL) torch
	$(PARITY_INSTALL) --quiet --editable . pytest scikit-learn
	$(PARITY_INSTALL) --quiet torchvision "open-clip-torch>=3.0" clint requests
	$(PARITY_INSTALL) --quiet --no-deps "hpsv2>=1.2"
	cd .venv-parity/lib/python*/site-packages && cp open_clip/bpe_simple_vocab_16e6.txt.gz hpsv2/src/open_clip/
	@touch $@

# Memory for two CLIP ViT-H/14 in float32 is needed: 16 GB.  PYTEST_ARGS="-m 'not slow'" leaves them out.
test-parity: $(PARITY)
	OMP_NUM_THREADS=1 .venv-parity/bin/python -m pytest tests/parity -m "slow or not slow" $(PYTEST_ARGS)

# Linters and types are a matter of the pinned versions alone; what old libraries are warned of, of themselves.
test-oldest:
	$(MAKE) unit VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt PYTEST_ARGS="-W default $(PYTEST_ARGS)"

test-newest:
	$(MAKE) unit VENV=.venv-newest CONSTRAINTS=

test-wheel: $(DEV)
	$(BIN)/python -m pytest tests/test_wheel.py -m "slow or not slow" --with-dependencies $(PYTEST_ARGS)

# Without pins, as a user would.  docs/rewards.md says that hpsv2 wants an environment of its own: when it no longer does,
# the last line fails, and the page has to say so.
DRY_RUN := .venv-extras/bin/python -m pip install --disable-pip-version-check --quiet --dry-run
test-extras:
	$(PYTHON) -m venv .venv-extras
	$(DRY_RUN) ".[openclip,hub]"
	$(DRY_RUN) ".[hpsv2]"
	$(DRY_RUN) ".[hpsv2,dev]" 2>&1 | grep ResolutionImpossible

bench: $(BASE)
	$(BIN)/python benchmarks/bench.py $(ONLY) $(ARGS)

faults: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/runs.py

notebooks: $(KERNEL)
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py $(NOTEBOOKS)

# -W: whatever Sphinx would warn of fails the build, once all of it has been said.
docs: $(DOCS)
	$(BIN)/python -m sphinx -W --keep-going --fresh-env --quiet docs build/docs
	@echo "The site: build/docs/index.html"

docs-pictures: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python docs/_ext/pictures.py

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy -p lightning_tilt

models: $(DEV)
	$(BIN)/python -m lightning_tilt.assets.training all

install: $(DEV)

release: $(DEV)
	$(BIN)/python scripts/release.py "$(VERSION)" $(ARGS)

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: it is most of the download, and the one worth a progress bar.
$(BASE): | $(VENV)/pyvenv.cfg
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --quiet --editable .
	@touch $@

$(DEV): $(BASE)
	$(PIP_INSTALL) --quiet --editable ".[dev]"
	@touch $@

$(KERNEL): $(BASE)
	$(PIP_INSTALL) --quiet --editable ".[notebooks]"
	@touch $@

$(DOCS): $(BASE)
	$(PIP_INSTALL) --quiet --editable ".[docs]"
	@touch $@

clean:
	rm -rf build dist docs/generated *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

# `make demo` shows FedMira at work, `make test` is what CI runs; CONTRIBUTING.md explains the rest.
PYTHON ?= python3
BIN := .venv/bin
# PYENV_VERSION: a Python of pyenv answers to its name only where it is the one chosen.
NEWEST_PYTHON ?= $(firstword $(foreach minor,15 14 13 12 11,$(shell PYENV_VERSION=3.$(minor) python3.$(minor) -c 'import sys; print(sys.executable)' 2>/dev/null)) $(PYTHON))
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Tests never reach a model hub, and two workers with one thread each do not fight for the cores.
# Compiled modules are kept: the tests start some hundred processes, which would compile the package again.
QUIET_HUB := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

.PHONY: install install-base demo demo-federation check test test-slow test-pythons test-newest test-oldest pretrain docs bench bench-full bench-large clean

install: .venv/.installed-dev

install-base: .venv/.installed-base

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The stamps depend on the venv only by order: its own time stamp says nothing about what is installed in it.
# Not compiled: of 17,000 modules the tests use a fifth, which Python compiles when it first imports them.
.venv/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --no-compile -e ".[dev]"
	touch .venv/.installed-base .venv/.installed-dev

.venv/.installed-base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch .venv/.installed-base

# Any earlier installation will do here and in pretrain: a demo must not download because a file was touched.
demo:
	@test -e .venv/.installed-base || $(MAKE) --no-print-directory install-base
	$(BIN)/fedmira run demo --overwrite

demo-federation: .venv/.installed-deploy
	$(BIN)/python examples/federation.py

.venv/.installed-deploy: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[deploy]"
	touch .venv/.installed-base .venv/.installed-deploy

# Installs nothing; pytest comes last so that its summary is the last line. A `type: ignore` that one version of torch
# needs, another does not: so other versions than the pins are checked without a word on those.
check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	MYPY_NUM_WORKERS=2 $(BIN)/mypy $(MYPY_FLAGS)
	$(QUIET_HUB) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test:
	@$(MAKE) --no-print-directory install
	@$(MAKE) --no-print-directory check

# The other versions of Python that pyproject.toml names, with the pinned versions, each in an environment made anew.
# There pip takes torch with CUDA, gigabytes; for its CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHONS ?= 3.12 3.13
test-pythons:
	@for version in $(PYTHONS); do \
	  rm -rf .venv-$$version && PYENV_VERSION=$$version python$$version -m venv .venv-$$version && \
	  .venv-$$version/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]" && \
	  $(MAKE) --no-print-directory check BIN=.venv-$$version/bin MYPY_FLAGS=--no-warn-unused-ignores || exit 1; \
	done

# The newest Python at hand with the newest versions that pip finds, in a separate environment that is made anew each
# time: what a seed decides must be the same there (tests/data/test_seeds.py). torch comes with CUDA and takes gigabytes; for its CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-newest
test-newest:
	rm -rf .venv-newest
	$(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python --version
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	.venv-newest/bin/python -m pip list | grep -iE "^(torch|transformers|peft|datasets|numpy) "
	@$(MAKE) --no-print-directory check BIN=.venv-newest/bin MYPY_FLAGS=--no-warn-unused-ignores

# The lower bounds of pyproject.toml, on this Python, in a separate environment that is made anew each time.
test-oldest:
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	sed -n '/^dependencies/,/^]/s/^ *"\([A-Za-z0-9_-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -c .venv-oldest/constraints.txt -e ".[dev]"
	@$(MAKE) --no-print-directory check BIN=.venv-oldest/bin MYPY_FLAGS=--no-warn-unused-ignores

test-slow:
	@test -e .venv/.installed-dev || $(MAKE) --no-print-directory install
	$(QUIET_HUB) $(BIN)/python -m pytest -m slow

pretrain:
	@test -e .venv/.installed-base || $(MAKE) --no-print-directory install-base
	$(BIN)/python -m fedmira.bundled.pretrain

# The pages of the methods and the list of `fedmira methods`, from docstrings and settings; a test fails while stale.
docs:
	$(BIN)/python docs/make_methods.py

# Speed on the CPU, row by row: stores benchmarks/results/*.json and writes docs/results/speed.md from them.
bench:
	@test -e .venv/.installed-base || $(MAKE) --no-print-directory install-base
	$(BIN)/python benchmarks/bench.py core

# The rows that are too slow for `bench`, and those of a GPU: takes long and much disk, so let it run in the background
# (make bench-full > bench.log 2>&1 &).
bench-full:
	@test -e .venv/.installed-base || $(MAKE) --no-print-directory install-base
	$(BIN)/python benchmarks/bench.py full

# Bases of 0.5 and 1.5 billion parameters, which are made in runs/large (4 GB): what is not in
# benchmarks/results/large-TYPE.json yet is measured, about an hour in all, and docs/results/large.md is written.
# --device cuda measures on a GPU.
bench-large:
	@test -e .venv/.installed-dev || $(MAKE) --no-print-directory install
	$(BIN)/python benchmarks/large/measure.py
	$(BIN)/python benchmarks/large/page.py

# Leaves .venv/ and runs/ alone: one is slow to make, the other is yours.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

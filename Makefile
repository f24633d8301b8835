# Each target does all of its own set-up: Python, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test lint format bench ci clean

demo: $(VENV)/.demo
	$(BIN)/negmerge demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Prints a table and appends to bench/results/; needs 6 GB of memory and 6 GB of disk for a while.
bench: $(VENV)/.test
	$(BIN)/python bench/reference.py
	$(BIN)/python bench/checkpoints.py

ci:
	.ci/run

clean:
	git clean -xfd

# The package and its kernels are built once; what a target needs comes on top.
$(VENV)/.package: $(VENV)/bin/python pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PIP) -e .
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(VENV)/.package
	$(PIP) 'negmerge_fast[$*]'
	@touch $@

# mypy looks into the packages that the code imports.
$(VENV)/.lint: $(VENV)/.demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

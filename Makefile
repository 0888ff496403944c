# make help lists the targets. Each one sets up what it needs: a virtual environment in .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The package index that torch comes from; empty: pip's own (on Linux, builds for NVIDIA GPUs).
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     a much smaller download, for CPUs
TORCH_INDEX ?=
TORCH_VERSION ?= 2.13.0
PROTOS := $(wildcard protos/*.proto)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench protos clean

help:  ## Show this list
	@echo "make TARGET [PYTHON=python3.12] [TORCH_INDEX=url]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run  ## Start a small split cluster, ask it one question, show the timing
	@$(BIN)/pdserve demo

test: $(VENV)/.dev  ## Run all tests (CPU)
	@echo "[test] the demo model"
	@$(BIN)/pdserve model fetch demo
	@echo "[test] all tests; those with the real cluster take a few minutes"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: $(VENV)/.dev  ## Run the tests that take minutes each: routers, ranks, pools, pods and nodes that come and go
	@$(BIN)/pdserve model fetch demo
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## Lint, types, import floors, generated code
	@echo "[check] ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "[check] mypy --strict"
	@$(BIN)/mypy
	@echo "[check] import floors"
	@$(BIN)/lint-imports
	@echo "[check] generated code"
	@$(BIN)/python -m tools.protos --check

bench: $(VENV)/.run  ## Load a running cluster (start it with: .venv/bin/pdserve up)
	@$(BIN)/pdserve bench

protos: $(VENV)/.dev  ## Generate the Python code of protos/*.proto
	@$(BIN)/python -m tools.protos

clean:  ## Remove the virtual environment and all caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: as long as pyproject.toml does not change, nothing is installed again.
$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || { echo "[setup] virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[setup] torch $(TORCH_VERSION) $(if $(TORCH_INDEX),from $(TORCH_INDEX))"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "torch==$(TORCH_VERSION)"
	@touch $@

$(VENV)/.run: $(VENV)/.base
	@echo "[setup] pdserve and what it needs"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "[setup] pdserve, what it needs, and the tools for tests and checks"
	@$(PIP) install -e ".[dev]"
	@touch $@ $(VENV)/.run

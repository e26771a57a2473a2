# Everything a newcomer or CI runs: `make demo` and `make test` first. Two house rules: nothing is installed outside
# .venv, .venv-peers, .venv-torch and .venv-ray, and nothing is downloaded again while pyproject.toml and the constraints files stay the same.
SHELL := /bin/sh
PYTHON ?= python3
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := .venv/bin
PEERS := .venv-peers/bin
TORCH := .venv-torch/bin
RAY := .venv-ray/bin
PIP_OPTIONS := -qq --disable-pip-version-check --no-input
# hatchling comes pinned from the constraints file and builds in the environment itself, so no build is left unpinned.
BUILD_TOOLS := pip hatchling editables
PEER_TOOLS := nvitop gpustat py3nvml zeus lowtime nvidia-ml-py
TORCH_TOOLS := torch==2.13.0 lightning transformers accelerate megatron-core deepspeed
RAY_TOOLS := 'ray[serve]' grpcio grpcio-tools

# The same tests run in the same way everywhere: two workers, tests that must share one worker marked xdist_group.
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)
FAST := not long and not slow and not peers and not torch and not ray and not real

.PHONY: help demo test check test-long bench bench-perseus bench-dynamollm constraints preflight clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install into .venv and run the main job on a simulated node"
	@echo "make test       install what the tests need and run them all (at most 20 minutes on two cores)"
	@echo "make check      formatting, lint, types, import contracts and the fast tests"
	@echo "make test-long  the long campaigns"
	@echo "make bench      the benchmarks"
	@echo "make bench-perseus  Perseus beside published figures and beside lowtime (BENCH_ARGS=--write keeps them)"
	@echo "make bench-dynamollm  DynamoLLM beside its baselines (BENCH_ARGS=--write keeps them, --quick takes a minute)"

preflight:
	@.ci/preflight "$(PYTHON)"

demo: .venv/.installed
	@$(BIN)/python -m powerd.demo

check: .venv/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import-linter
	$(PYTEST) -m "$(FAST)"

test: .venv/.installed-dev .venv-peers/.installed .venv-torch/.installed .venv-ray/.installed
	$(PYTEST) -m "not long"

test-long: .venv/.installed-dev .venv-peers/.installed .venv-torch/.installed .venv-ray/.installed
	$(BIN)/python -m pytest -m long --timeout 7200 $(PYTEST_ARGS)

bench: .venv/.installed-dev
	$(BIN)/python -m benchmarks

bench-perseus: .venv/.installed-dev .venv-peers/.installed
	$(BIN)/python -m benchmarks.perseus $(BENCH_ARGS)

bench-dynamollm: .venv/.installed-dev
	nice -n 5 $(BIN)/python -m benchmarks.dynamollm $(BENCH_ARGS)

# What users run: the project, editable, with all that a node needs.
.venv/.installed: pyproject.toml constraints.txt
	@.ci/preflight "$(PYTHON)"
	@echo "Installing powerd into .venv (about a minute) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt $(BUILD_TOOLS)
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt --no-build-isolation -e '.[all]'
	@touch $@

# What its developers add.
.venv/.installed-dev: .venv/.installed
	@echo "Installing the development tools into .venv ..."
	@$(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt --group dev
	@touch $@

# The tools we are compared with, each unmodified, in an environment of their own (docs/dependencies.md says why),
# and powerd's client without any extra, as in a user's training image.
.venv-peers/.installed: pyproject.toml constraints-peers.txt
	@.ci/preflight "$(PYTHON)"
	@echo "Installing the peer tools into .venv-peers (about a minute) ..."
	@$(PYTHON) -m venv .venv-peers
	@$(PEERS)/python -m pip install $(PIP_OPTIONS) -c constraints-peers.txt $(BUILD_TOOLS)
	@$(PEERS)/python -m pip install $(PIP_OPTIONS) -c constraints-peers.txt $(PEER_TOOLS)
	@$(PEERS)/python -m pip install $(PIP_OPTIONS) -c constraints-peers.txt --no-build-isolation -e .
	@touch $@

# The frameworks that the integrations plug into, and powerd beside them as in a training image that plans by itself.
.venv-torch/.installed: pyproject.toml constraints-torch.txt
	@.ci/preflight "$(PYTHON)"
	@echo "Installing the training frameworks into .venv-torch (some minutes) ..."
	@$(PYTHON) -m venv .venv-torch
	@$(TORCH)/python -m pip install $(PIP_OPTIONS) -c constraints-torch.txt $(BUILD_TOOLS)
	@DS_BUILD_OPS=0 $(TORCH)/python -m pip install $(PIP_OPTIONS) -c constraints-torch.txt $(TORCH_TOOLS)
	@$(TORCH)/python -m pip install $(PIP_OPTIONS) -c constraints-torch.txt --no-build-isolation -e '.[plan]'
	@touch $@

# Ray Serve and gRPC, and powerd beside them as in a service's image.
.venv-ray/.installed: pyproject.toml constraints-ray.txt
	@.ci/preflight "$(PYTHON)"
	@echo "Installing Ray Serve into .venv-ray (about a minute) ..."
	@$(PYTHON) -m venv .venv-ray
	@$(RAY)/python -m pip install $(PIP_OPTIONS) -c constraints-ray.txt $(BUILD_TOOLS)
	@$(RAY)/python -m pip install $(PIP_OPTIONS) -c constraints-ray.txt $(RAY_TOOLS)
	@$(RAY)/python -m pip install $(PIP_OPTIONS) -c constraints-ray.txt --no-build-isolation -e '.[ray,keda]'
	@touch $@

# Resolves the environments anew from pyproject.toml and writes what was found into the constraints files.
constraints:
	@.ci/preflight "$(PYTHON)"
	@$(PYTHON) .ci/pin.py $(PEER_TOOLS)

clean:
	rm -rf .venv .venv-peers .venv-torch .venv-ray .cache build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

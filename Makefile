# `make demo` talks to a model; `make test` checks everything. Both set up what they need.

PYTHON ?= python3
VENV ?= .venv
# Where pip finds torch's CPU build, if not where it looks anyway, for example
#   make demo TORCH_ARGS="--index-url <the index of PyTorch's CPU wheels>"
TORCH_ARGS ?=
# Of benchmarks/compare_cpu.py, for example make bench-cpu BENCH_ARGS=--quick
BENCH_ARGS ?=

PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint ci/constraints.txt
BIN := $(VENV)/bin
NATIVE := $(shell find csrc_cpu csrc_cuda csrc_rocm -type f 2>/dev/null)

.PHONY: demo install install-dev tpu model test-models browser check lint types layers test bench bench-cpu bench-xla clean

demo: install model
	$(BIN)/portalm generate
	@echo
	@echo "Next:  . $(VENV)/bin/activate"
	@echo "       portalm chat                 talk to it"
	@echo "       portalm serve                serve it: OpenAI's API on http://127.0.0.1:8000"
	@echo "       portalm devices              what else could run here"

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "PortaLM needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that nothing resolves it to a build of many gigabytes
$(VENV)/.torch: ci/constraints.txt | $(VENV)/bin/pip
	$(PIP) $(TORCH_ARGS) torch
	$(PIP) scikit-build-core nanobind ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(NATIVE)
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# XLA: JAX, and what compiles for TPUs; runs on its CPU client where there is no TPU
tpu: $(VENV)/.installed-tpu

$(VENV)/.installed-tpu: $(VENV)/.installed-dev
	$(PIP) --no-build-isolation --editable '.[dev,tpu]'
	@touch $@

model: install
	$(BIN)/portalm pull

# what tests need beside the default model
test-models: install-dev model
	$(BIN)/portalm pull sentence-transformers/all-MiniLM-L6-v2

# for the tests of the page; where it cannot be installed they are skipped and say so
browser:
	@command -v chromedriver >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
	    chromium chromium-driver >/dev/null; } || echo "no chromium: the tests of the page are skipped"

# what to run before a push: `make test` runs the same
check: test

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install-dev
	@mkdir -p build/types && ln -sfn ../../backends build/types/portalm_backends
	$(BIN)/mypy

layers: install-dev
	$(BIN)/lint-imports

test: lint types layers test-models browser
	$(BIN)/pytest

bench: install-dev model
	$(BIN)/python benchmarks/engine/against_transformers.py

# against other engines, which it installs (gigabytes, llama.cpp is built); an hour and more
bench-cpu: install-dev model
	$(BIN)/python benchmarks/compare_cpu.py $(if $(TORCH_ARGS),--torch-args="$(TORCH_ARGS)") $(BENCH_ARGS)

# XLA's CPU client against torch eager, and its first start against its second
bench-xla: tpu model
	$(BIN)/python benchmarks/engine/xla_against_eager.py
	$(BIN)/python benchmarks/engine/xla_starts.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

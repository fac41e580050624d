# `make demo` answers a prompt, `make test` checks everything, `make quick` most of it in minutes.
# Each sets up what it needs.

PYTHON ?= python3
VENV ?= .venv
# Where pip finds torch's CPU build, if not in its default index, for example
#   make demo TORCH_ARGS="--index-url <the index of PyTorch's CPU wheels>"
TORCH_ARGS ?=
# Arguments of benchmarks/compare_cpu.py, for example make bench-cpu BENCH_ARGS=--quick
BENCH_ARGS ?=

PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint ci/constraints.txt
BIN := $(VENV)/bin
# Folders whose tests use one thread each run in parallel; the others start servers, measure time or
# compute with all cores. tests/xla needs JAX: the job tpu of ci/matrix.yml runs it.
PARALLEL_TESTS := tests/architecture tests/unit tests/models tests/conformance tests/gpu
SERIAL_TESTS := tests/docs tests/engine tests/server
PYTEST_PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
NATIVE := $(shell find csrc_cpu csrc_cuda csrc_rocm -type f 2>/dev/null)
NATIVE_CODE := $(filter %.h %.cpp %.cuh %.cu %.hip,$(NATIVE) $(wildcard tests/gpu/emulator/*))
NATIVE_CPU := $(shell find csrc_cpu -type f 2>/dev/null)

.PHONY: demo install install-dev emulated tpu model test-models browser check lint types layers quick test bench bench-cpu bench-xla clean

demo: install model
	$(BIN)/portalm generate
	@echo
	@echo "Next:  . $(VENV)/bin/activate"
	@echo "       portalm chat                 chat in the terminal"
	@echo "       portalm serve                serve OpenAI's API on http://127.0.0.1:8000"
	@echo "       portalm devices              list the devices that PortaLM can use here"

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "PortaLM needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that nothing resolves it to a build of many gigabytes
$(VENV)/.torch: ci/constraints.txt | $(VENV)/bin/pip
	$(PIP) $(TORCH_ARGS) torch
	$(PIP) scikit-build-core nanobind ninja $$(command -v cmake >/dev/null || echo cmake)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(NATIVE)
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# A second native module, which only tests use and which is not installed: the code for AVX-512 and
# AMX in plain vectors (csrc_cpu/module.cmake). Built once, and again when csrc_cpu changes.
emulated: build/emulated/.built

build/emulated/.built: $(VENV)/.installed-dev CMakeLists.txt $(NATIVE_CPU)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/emulated -G Ninja --log-level=WARNING \
	  -DPORTALM_MODULES=cpu_emulated -DPython_EXECUTABLE="$(abspath $(BIN))/python" $(EMULATED_ARGS)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/emulated -- --quiet
	@touch $@

# JAX and the TPU compiler; without a TPU the backend runs on XLA's CPU client
tpu: $(VENV)/.installed-tpu

$(VENV)/.installed-tpu: $(VENV)/.installed-dev
	$(PIP) --no-build-isolation --editable '.[dev,tpu]'
	@touch $@

model: install
	$(BIN)/portalm pull

# the models that tests use
test-models: install-dev model
	$(BIN)/portalm pull sentence-transformers/all-MiniLM-L6-v2

# Chromium for the tests of the web page, which are skipped where it cannot be installed
browser:
	@command -v chromedriver >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
	    chromium chromium-driver >/dev/null; } || echo "no chromium: the tests of the web page are skipped"

check: test

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_CODE)

types: install-dev
	@mkdir -p build/types && ln -sfn ../../backends build/types/portalm_backends
	$(BIN)/mypy

layers: install-dev
	$(BIN)/lint-imports

# under four minutes on two cores: lint, types, import rules, unit tests, one answer of a real model
quick: lint types layers emulated model
	$(PYTEST_PARALLEL) -q tests/architecture tests/unit
	$(BIN)/portalm generate --raw --temperature 0 --max-tokens 8 "The capital of France is" | grep Paris

test: lint types layers emulated test-models browser
	$(PYTEST_PARALLEL) $(PARALLEL_TESTS)
	$(BIN)/pytest $(SERIAL_TESTS)

bench: install-dev model
	$(BIN)/python benchmarks/engine/against_transformers.py

# against other engines, which it installs (gigabytes; llama.cpp is compiled): over an hour
bench-cpu: install-dev model
	$(BIN)/python benchmarks/compare_cpu.py $(if $(TORCH_ARGS),--torch-args="$(TORCH_ARGS)") $(BENCH_ARGS)

# XLA's CPU client against torch eager, and its second start against its first
bench-xla: tpu model
	$(BIN)/python benchmarks/engine/xla_against_eager.py
	$(BIN)/python benchmarks/engine/xla_starts.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

#!/usr/bin/env bash
# The thread team under ThreadSanitizer; the kernels under AddressSanitizer and UBSan, on every
# instruction set that this machine can run.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p build
g++ -std=gnu++20 -g -O1 -fsanitize=thread csrc_cpu/tests/thread_team_stress.cpp \
  csrc_cpu/thread_team.cpp -o build/thread_team_stress -lpthread
build/thread_team_stress

# only what this machine can run is built: instrumented kernels take minutes to compile
isas="baseline"
has() { grep -qw "$1" /proc/cpuinfo; }
if has avx2; then isas+=";avx2"; fi
if has avx_vnni; then isas+=";avxvnni"; fi
if has avx512bw; then isas+=";avx512"; fi
if has avx512_bf16; then isas+=";avx512bf16"; fi

make --no-print-directory install-dev
# Instrumented modules replace the release builds; the trap restores the installed one and makes
# `make emulated` build the other one again.
trap '.venv/bin/pip install --quiet --no-build-isolation --no-deps --editable .
  rm -rf build/emulated' EXIT
.venv/bin/pip install --quiet --no-build-isolation --no-deps --editable . \
  -C cmake.define.PORTALM_SANITIZE=address,undefined -C cmake.define.PORTALM_ISAS="$isas" \
  -C build-dir=build/sanitize
rm -rf build/emulated
make --no-print-directory emulated EMULATED_ARGS=-DPORTALM_SANITIZE=address,undefined

# Python itself is not instrumented: the runtimes are loaded first, and its leaks are not reported
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# -s: a sanitizer reports right before it ends the process, so captured output would be lost
.venv/bin/pytest -q -s tests/unit/test_cpu_kernels.py tests/unit/test_cpu_linear.py \
  tests/unit/test_cpu_program.py tests/unit/test_cpu_arguments.py

#!/usr/bin/env bash
# The thread team under ThreadSanitizer; the kernels under AddressSanitizer and UBSan, on every
# instruction set this machine runs.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p build
g++ -std=gnu++20 -g -O1 -fsanitize=thread csrc_cpu/tests/thread_team_stress.cpp \
  csrc_cpu/thread_team.cpp -o build/thread_team_stress -lpthread
build/thread_team_stress

# only what can be executed here is built: instrumented kernels take minutes to compile
isas="baseline"
has() { grep -qw "$1" /proc/cpuinfo; }
if has avx2; then isas+=";avx2;emulated512"; fi
if has avx_vnni; then isas+=";avxvnni"; fi
if has avx512bw; then isas+=";avx512"; fi
if has avx512_bf16; then isas+=";avx512bf16"; fi

make --no-print-directory install-dev
# over the release build, which the trap puts back
trap '.venv/bin/pip install --quiet --no-build-isolation --no-deps --editable .' EXIT
.venv/bin/pip install --quiet --no-build-isolation --no-deps --editable . \
  -C cmake.define.PORTALM_SANITIZE=address,undefined -C cmake.define.PORTALM_ISAS="$isas" \
  -C build-dir=build/sanitize

# Python itself is not instrumented: the runtimes come first, and its own leaks are its own
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# uncaptured: what a sanitizer finds it says right before it ends the process
.venv/bin/pytest -q -s tests/unit/test_cpu_kernels.py tests/unit/test_cpu_linear.py \
  tests/unit/test_cpu_program.py

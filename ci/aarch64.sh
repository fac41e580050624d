#!/usr/bin/env bash
# The kernels for aarch64: cross-compiled, with their linear layers run under an emulator.
# Needs g++-aarch64-linux-gnu and qemu-user.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p build
aarch64-linux-gnu-g++ -static -std=gnu++20 -O2 -DPORTALM_ISA=baseline -DPORTALM_LANES=4 \
  -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wno-psabi -Wno-maybe-uninitialized \
  csrc_cpu/tests/linear_check.cpp csrc_cpu/kernels.cpp csrc_cpu/thread_team.cpp -pthread \
  -o build/linear_check_aarch64
qemu-aarch64 build/linear_check_aarch64

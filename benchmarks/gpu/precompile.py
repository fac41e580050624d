"""Compile the kernels of the conformance kit into Triton's cache, on a dry GPU.

    python -m gpu.precompile sm_90 3/16      the fourth of 16 pieces of L0, L1 and L2

A process compiles one kernel at a time, so gpu_run.py starts one per core before the kit runs.
"""

from __future__ import annotations

import sys

from gpu.dry import backend_for, dry_gpu
from gpu.dry_backend import launch_cases
from portalm.conformance import laws, layers, operations
from portalm.conformance.subject import Subject


def main() -> int:
    """Launch this process's share of the cases; return 1 if one fails before it would compute."""
    target, share = sys.argv[1:]
    index, count = (int(number) for number in share.split("/"))
    checks = (*operations.CHECKS, *layers.CHECKS, *laws.CHECKS)
    # neighbors in the list share kernels: each process gets a contiguous piece
    items = [item for check in checks for item in check.items()]
    piece = items[index * len(items) // count : (index + 1) * len(items) // count]
    with dry_gpu(target) as gpu:
        errors = list(launch_cases(Subject(backend_for(gpu)), piece))
        print(*errors, sep="\n")
        print(f"compiled {len(gpu.take().compiles)} kernels in {len(piece)} cases")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

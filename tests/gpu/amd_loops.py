"""Count the instructions of the inner loops of kernels compiled for AMD GPUs.

`python -m tests.gpu.amd_loops --targets gfx942 --only "attention, prefill"` prints, for the first
of a kernel's innermost loops in order of length (its bulk, without masks), the cycles of a SIMD
that one wave needs for matrix and for vector instructions. Two waves of a SIMD can overlap them;
one wave hardly does, because a tile's softmax needs its products. Nothing is run on a GPU.

Sources: AMD CDNA 2, 3 and 4 instruction set guides and their peak rates: a vector instruction takes
4 cycles (16 lanes of 64 at a time), a transcendental one 16, a matrix instruction its
multiplications over the SIMD's rate.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass

from tests.gpu.kernel_budgets import launches

TARGETS = ("gfx90a", "gfx942", "gfx950")

_RATE = {"gfx90a": 256, "gfx942": 512, "gfx950": 1024}
"""16-bit floating-point operations per cycle and SIMD."""

_KINDS = {
    "matrix": "v_mfma",
    "transcendental": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "accumulator move": "v_accvgpr",
    "spill": "scratch_",
    "vector": "v_",
    "shared read": "ds_read",
    "shared write": "ds_write",
    "global load": r"(global|buffer|flat)_load",
    "barrier": "s_barrier",
    "wait": "s_wait",
}
"""Patterns of instruction names; the first that matches counts."""


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop of a kernel."""

    instructions: list[str]
    """Names, in order."""

    def counts(self) -> Counter[str]:
        """Number of instructions of each kind of `_KINDS`."""
        kinds = (
            next((kind for kind, text in _KINDS.items() if re.match(text, name)), "other")
            for name in self.instructions
        )
        return Counter(kinds)

    def matrix_cycles(self, target: str) -> int:
        """Cycles of a SIMD for the matrix instructions of one wave, with 16-bit operands."""
        shapes = (re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)_?b?f", n) for n in self.instructions)
        products = (2 * int(s[1]) * int(s[2]) * int(s[3]) for s in shapes if s)
        return sum(products) // _RATE[target]

    def vector_cycles(self) -> int:
        """Cycles of a SIMD for the vector instructions of one wave."""
        counts = self.counts()
        simple = counts["vector"] + counts["accumulator move"]
        return 4 * simple + 16 * counts["transcendental"]


def inner_loops(assembly: str) -> list[Loop]:
    """Innermost loops of a kernel's GCN assembly, shortest first."""
    lines = [line.strip() for line in assembly.splitlines()]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    ends = {}
    for i, line in enumerate(lines):
        branch = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        if branch and labels.get(branch[1], i) < i:
            ends[labels[branch[1]]] = i
    inner = [
        (start, end)
        for start, end in ends.items()
        if not any(start < other < end for other in ends)
    ]
    found = [
        Loop([line.split()[0] for line in lines[start:end] if re.match(r"[a-z]\w+\s", line)])
        for start, end in inner
    ]
    return sorted(found, key=lambda loop: len(loop.instructions))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    arguments = parser.parse_args()
    for target in arguments.targets:
        for name, launch in launches(target).items():
            if arguments.only not in name:
                continue
            compiled = launch(target).compile(target)
            loop = inner_loops(compiled.assembly)[0]
            tile = launch(target).constants.get("TILE", "")
            taken = compiled.resources
            loads = Counter(n for n in loop.instructions if "_load_" in n)
            print(
                f"{target} {name}: tile {tile}, matrix {loop.matrix_cycles(target)}, vector "
                f"{loop.vector_cycles()} cycles; {taken.registers} registers, {taken.spills} "
                f"spills, {taken.occupancy} programs; {dict(loop.counts())} {dict(loads)}",
                flush=True,
            )


if __name__ == "__main__":
    main()

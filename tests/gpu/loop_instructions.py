"""Count the instructions of a kernel's main loop, and predict the time of a decode's tile.

`python -m tests.gpu.loop_instructions` prints, for decodes and prompts over caches of bfloat16,
int8 and float8 on sm_90, the instructions of a warp per 64 tokens of context, and for decodes the
time of 64 tokens on one multiprocessor of an H200: that of their bytes, and that of issuing their
instructions. A tile takes at least the longer of the two. Nothing is run on a GPU.
"""

from __future__ import annotations

import re

from portalm_backends.gpu_common.kernels.kv_codes import FP8, INT8
from tests.gpu import kernel_budgets

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")

CACHES = {"bf16": 0, "int8": INT8, "fp8": FP8}

_BYTES_PER_US = 4.3e6 / 132
"""Bytes of device memory per microsecond and multiprocessor; 4.3 TB/s is what copies reach."""

_ISSUES_PER_US = 4 * 1755
"""Instructions per microsecond and multiprocessor: four schedulers at the base clock."""

_HALF_RATE = ("F2FP", "MUFU", "I2FP")
"""Instructions that take two or more cycles of a scheduler; counted twice."""


def main_loop(sass: str) -> list[str]:
    """Instructions of the shortest loop with matrix instructions: the one without masks.

    Instructions that a branch inside the loop skips are included.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
            branch = _BRANCH.search(found[1])
            if branch and branch[1] in labels:
                loops.append(instructions[labels[branch[1]] :])
    return min((loop for loop in loops if any("MMA" in each for each in loop)), key=len)


def per_64_tokens(kind: str, cache: str, target: str = "sm_90") -> tuple[float, float]:
    """Instructions and issue cycles of a program's warps per 64 tokens of context.

    Args:
        kind: narrow or wide.
        cache: a key of `CACHES`.
        target: an NVIDIA architecture.
    """
    launch = kernel_budgets.attention(target, kind, codes=CACHES[cache])
    loop = main_loop(launch.compile(target).assembly)
    slow = sum(any(name in each for name in _HALF_RATE) for each in loop)
    scale = 64 / launch.constants["TILE"] * launch.num_warps
    return len(loop) * scale, (len(loop) + slow) * scale


def decode_times(cache: str, issue_cycles: float, head_size: int = 128) -> tuple[float, float]:
    """Microseconds of 64 tokens of one KV head: of their bytes, and of issuing instructions."""
    vector = 2 * head_size if cache == "bf16" else head_size + 2
    return 64 * 2 * vector / _BYTES_PER_US, issue_cycles / _ISSUES_PER_US


def main() -> None:
    """Run the command line."""
    for kind in ("narrow", "wide"):
        for cache in CACHES:
            instructions, cycles = per_64_tokens(kind, cache)
            line = f"{kind:7} {cache:5} {instructions:6.0f} instructions, {cycles:6.0f} cycles"
            if kind == "narrow":
                of_bytes, of_issue = decode_times(cache, cycles)
                line += f", {of_bytes:.2f} us of bytes, {of_issue:.2f} us of issue"
            print(line, flush=True)


if __name__ == "__main__":
    main()

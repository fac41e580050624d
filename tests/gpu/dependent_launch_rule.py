"""Check compiled kernels against the rule of kernels/dependent_launch.py.

`python -m tests.gpu.dependent_launch_rule TARGET...` compiles kernels that break the rule on
purpose and prints what `faults` finds in each. Nothing is run on a GPU.
"""

from __future__ import annotations

import re
import sys

import triton
import triton.language as tl

from portalm_backends.gpu_common.kernels.dependent_launch import wait_for_inputs

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\d+\s+)?([A-Z][\w.]*)")
_WAIT, _ALLOW = "ACQBULK", "PREEXIT"
"""SASS of griddepcontrol.wait and griddepcontrol.launch_dependents."""
_MEMORY = re.compile(
    r"(LDG|LDGSTS|STG|LD|ST|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKPF|UTMALDG|UTMASTG|UTMAREDG|UTMAPF"
    r"|CCTL|CCTLL)(\.|$)"
)
"""Accesses to global memory, prefetches included."""
_JUMP = re.compile(r"(BRA|BRX|JMP|EXIT|RET|CALL)(\.|$)")


def faults(assembly: str, *, is_dependent: bool) -> list[str]:
    """List violations in a kernel's assembly: SASS, or AMD's, which has none of these names.

    Args:
        assembly: of the whole kernel, in the order of its addresses.
        is_dependent: the kernel is launched with `launch_pdl`.
    """
    codes = [match[1] for match in _INSTRUCTION.finditer(assembly)]
    waits = [i for i, code in enumerate(codes) if code == _WAIT]
    allows = [i for i, code in enumerate(codes) if code == _ALLOW]
    if not is_dependent:
        return ["it waits, but is not a dependent launch"] if waits or allows else []
    if len(waits) != 1:
        return [f"{len(waits)} waits instead of one"]
    found = []
    for i, code in enumerate(codes[: waits[0]]):
        if _MEMORY.match(code):
            found.append(f"instruction {i}, {code}, accesses memory before the wait")
        if _JUMP.match(code):
            found.append(f"instruction {i}, {code}, may bypass the wait")
    if not allows:
        found.append("it never allows the next kernel to start")
    elif allows[0] < waits[0]:
        found.append("it allows the next kernel to start before its own wait")
    return found


@triton.jit
def _loads_first(x_ptr, out_ptr, WAITS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 128))
    wait_for_inputs(WAITS)
    tl.store(out_ptr + tl.arange(0, 128), x)


@triton.jit
def _stores_first(x_ptr, out_ptr, WAITS: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 128), 1.0)
    wait_for_inputs(WAITS)


@triton.jit
def _leaves_first(x_ptr, out_ptr, count, WAITS: tl.constexpr):
    if tl.program_id(0) >= count:
        return
    wait_for_inputs(WAITS)
    tl.store(out_ptr + tl.arange(0, 128), tl.load(x_ptr + tl.arange(0, 128)))


@triton.jit
def _never_waits(x_ptr, out_ptr, WAITS: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 128), tl.load(x_ptr + tl.arange(0, 128)))


@triton.jit
def _waits_first(x_ptr, out_ptr, WAITS: tl.constexpr):
    wait_for_inputs(WAITS)
    tl.store(out_ptr + tl.arange(0, 128), tl.load(x_ptr + tl.arange(0, 128)))


def main() -> None:
    """Print the faults of each planted kernel on each target."""
    from tests.gpu.triton_targets import compile_for

    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}
    for target in sys.argv[1:]:
        for kernel in (_loads_first, _stores_first, _leaves_first, _never_waits, _waits_first):
            compiled = compile_for(kernel, signature, {}, target)
            found = faults(compiled.assembly, is_dependent=compiled.is_dependent)
            print(f"{target} {kernel.fn.__name__}: {'; '.join(found) or 'none'}")


if __name__ == "__main__":
    main()

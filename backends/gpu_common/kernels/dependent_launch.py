"""Programmatic dependent launch: start a kernel while its predecessor on the stream still runs.

NVIDIA GPUs have it from sm_90 on. A kernel launched with `options` may start as soon as every
program of the kernel before it has called `wait_for_inputs` or ended, so its launch, its prologue
and the tail of its predecessor overlap. Elsewhere both functions change nothing.

The rule, which tests/gpu checks in the compiled code of every kernel: `wait_for_inputs` is the
first statement of a kernel, and every program executes it, also one without work. Before it,
nothing may be loaded or stored:

- inputs: the predecessor may still write them
- outputs: the predecessor may still read that memory. The caller need not have written to one of
  its inputs in place: torch's allocator reuses memory as soon as its tensor is deleted on the host
- weights: a caller may have computed them on the device just before

A kernel allows the next one to start only after its own wait, that is, when all kernels before it
are complete. So waiting for one predecessor is waiting for all of them. A kernel that is launched
without the option, such as those of torch and cuBLAS, starts when its predecessor is complete, as
ever; a kernel with the option after such a kernel starts when all its programs have ended.

Source: CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA,
"griddepcontrol". Stream capture records the option as a programmatic edge of the graph.
"""

import functools
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

_LEAST_CAPABILITY = 90
"""First compute capability with programmatic dependent launch."""


@triton.jit
def wait_for_inputs(WAITS: tl.constexpr):
    """Wait until all kernels before this one are complete; then allow the next one to start."""
    if WAITS:
        gdc_wait()
        gdc_launch_dependents()


def options() -> dict[str, Any]:
    """Arguments for the launch of a kernel that calls `wait_for_inputs(WAITS)`."""
    if triton.knobs.runtime.interpret:
        return {"WAITS": False}
    return _options(driver.active)


@functools.lru_cache(maxsize=1)  # of the process's one driver: the target is not free to look up
def _options(active: Any) -> dict[str, Any]:
    return options_for(active.get_current_target())


def options_for(target: Any) -> dict[str, Any]:
    """`options` for a `GPUTarget`."""
    if target.backend == "cuda" and target.arch >= _LEAST_CAPABILITY:
        return {"WAITS": True, "launch_pdl": True}
    return {"WAITS": False}

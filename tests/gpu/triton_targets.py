"""Compile Triton kernels for GPUs that are not present, and report the resources they need.

Nothing is run. `TRITON_INTERPRET` must be off: a process either interprets kernels or compiles
them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from portalm_backends.gpu_common.archs import CUDA, ROCM
from portalm_backends.gpu_common.kernels import dependent_launch, kv_codes

ARCHS = CUDA | ROCM

TARGETS = {
    name: GPUTarget("cuda", int(name[3:]), 32)
    if name in CUDA
    else GPUTarget("hip", name, arch.warp_size)
    for name, arch in ARCHS.items()
}
"""All supported architectures."""

SHARED_LIMIT = {name: arch.shared_bytes for name, arch in ARCHS.items()}
"""Most bytes of shared memory (LDS) per program."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one program of a compiled kernel."""

    registers: int
    """32-bit registers per thread; on AMD vector registers, including accumulation registers."""
    shared: int
    """Bytes of shared memory (LDS)."""
    spills: int
    """Registers per thread that are spilled to memory. AMD scalar registers that are spilled to
    lanes of vector registers are not counted."""
    occupancy: int
    """Programs that fit on a multiprocessor (CU, or WGP on RDNA) by these limits."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel compiled for one target."""

    resources: Resources
    assembly: str
    """SASS on NVIDIA, GCN or RDNA on AMD."""
    stages: dict[str, Any]
    """Text of every stage: ttir, ttgir, llir, ptx or amdgcn."""
    is_dependent: bool
    """It is launched before its predecessor is complete (kernels/dependent_launch.py)."""


def compile_for(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    **options: Any,
) -> Compiled:
    """Compile a Triton kernel for one of `TARGETS`, on a machine without a GPU.

    Args:
        kernel: a function decorated with `triton.jit`.
        signature: Triton type of each argument that is not constant ("*bf16", "i32", "fp32").
            Pointers are assumed to be aligned to 16 bytes, as torch's are, and, like Triton's
            launcher does on AMD, to tensors of less than 2 GiB unless they end in ":large".
            "i32:16" is an integer that is a multiple of 16.
        constants: values of the `tl.constexpr` arguments, and of others that are None.
        target: a key of `TARGETS`.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        options: further options of the target's compiler (waves_per_eu, maxnreg).
    """
    if "DECODER" in kernel.arg_names:
        constants = constants | kv_codes.options_for(TARGETS[target])
    if "WAITS" in kernel.arg_names:
        given = dependent_launch.options_for(TARGETS[target])
        constants = constants | {"WAITS": given.pop("WAITS")}
        options |= given
    source = source_of(kernel, signature, constants, TARGETS[target])
    compiled = triton.compile(
        source,
        target=TARGETS[target],
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "enable_fp_fusion": True,
            **options,
        },
    )
    shared = int(compiled.metadata.shared)
    if target.startswith("sm_"):
        return _nvidia(compiled, target, num_warps, shared)
    return _amd(compiled, target, num_warps, shared)


def source_of(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> ASTSource:
    """A kernel with the types and constants of its arguments, see `compile_for`."""
    types: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        types[name], _, mark = signature[name].partition(":")
        is_pointer = types[name].startswith("*")
        if is_pointer or mark == "16":
            aligned[(i,)] = [["tt.divisibility", 16]]
        if is_pointer and mark != "large" and target.backend == "hip":
            aligned[(i,)].append(["tt.pointer_range", 32])
    return ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )


def _nvidia(compiled: Any, target: str, num_warps: int, shared: int) -> Compiled:
    """Get resources from cuobjdump and SASS from nvdisasm, which Triton includes."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", path)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", path)
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    # spills are stores to local memory, of 1, 2 or 4 registers per instruction
    widths = re.findall(r"\bSTL(?:\.(64|128))?\b", sass)
    spills = sum(int(width or 32) // 32 for width in widths)
    per_sm = 65536 // (-(-registers // 8) * 8 * 32 * num_warps)
    by_shared = (SHARED_LIMIT[target] + 1024) // (shared + 1024)
    resources = Resources(registers, shared, spills, min(per_sm, by_shared, 64 // num_warps))
    return Compiled(resources, sass, dict(compiled.asm), bool(compiled.metadata.launch_pdl))


def _amd(compiled: Any, target: str, num_warps: int, shared: int) -> Compiled:
    """Get resources from the metadata in the assembly."""
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    registers = number("vgpr_count")
    spills = number("vgpr_spill_count")
    if not target.startswith("gfx9"):
        # RDNA: a WGP has 4 SIMDs with 1,536 registers of 32 lanes, and 128 KiB of LDS
        waves, lds = 4 * min(16, 1536 // (-(-registers // 24) * 24)), 128 * 1024
    else:  # CDNA: a CU has 4 SIMDs with 512 registers of 64 lanes
        waves, lds = 4 * min(8, 512 // (-(-registers // 8) * 8)), SHARED_LIMIT[target]
    by_shared = lds // shared if shared else waves
    return Compiled(
        Resources(registers, shared, spills, min(waves // num_warps, by_shared)),
        text,
        dict(compiled.asm),
        is_dependent=False,
    )


def _output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout

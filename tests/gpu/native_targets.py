"""Compiles the native kernels for GPUs that are not here, and says what they would take of one.

Nothing is run. `python -m tests.gpu.native_targets` writes native_budgets.json anew.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("native_budgets.json")

NVCC = shutil.which("nvcc")
CLANG = shutil.which("clang-19")

CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
ROCM_TARGETS = ("gfx90a", "gfx942", "gfx1100", "gfx1201")

_SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
"""Bytes of shared memory of a multiprocessor; 1 KiB of it goes to each block."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes of one target."""

    registers: int
    """Of a thread, 32 bits each; on AMD vector registers."""
    shared: int
    """Bytes of shared memory (LDS) of a block."""
    spills: int
    """Bytes of memory that a thread has for lack of registers."""
    waves: int
    """That a multiprocessor of NVIDIA, or a SIMD of AMD, holds at once, by these limits alone."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """All kernels, for one target."""

    resources: dict[str, Resources]
    """By kernel."""
    assembly: dict[str, str]
    """Its instructions, by kernel."""


def compile_for(target: str) -> Compiled:
    """The kernels of csrc_cuda or csrc_rocm for one target."""
    with tempfile.TemporaryDirectory() as folder:
        if target.startswith("sm_"):
            return _compile_cuda(target, Path(folder) / "kernels.cubin")
        return _compile_rocm(target, Path(folder) / "kernels.s")


def _compile_cuda(target: str, cubin: Path) -> Compiled:
    source = ROOT / "csrc_cuda/kernels.cu"
    report = _output(
        [str(NVCC), "-std=c++17", f"-arch={target}", "-cubin", "-Xptxas", "-v", source, "-o", cubin]
    )
    resources = {}
    for entry in report.split("Compiling entry function '")[1:]:
        name = entry.split("'")[0].removeprefix("portalm_")
        registers = _number(r"Used (\d+) registers", entry)
        shared = _number(r"(\d+) bytes smem", entry)
        spills = _number(r"(\d+) bytes stack frame", entry)
        resources[name] = Resources(
            registers, shared, spills, _cuda_waves(target, name, registers, shared)
        )
    sass = _output([knobs.nvidia.cuobjdump.path, "-sass", cubin])  # it comes with Triton
    assembly = {
        part.split("\n")[0].strip().removeprefix("portalm_"): part
        for part in sass.split("Function : ")[1:]
    }
    return Compiled(resources, assembly)


def _cuda_waves(target: str, kernel: str, registers: int, shared: int) -> int:
    """Waves of a multiprocessor: of 64 Ki registers, given to waves in 256s, of 2,048 threads."""
    threads = threads_of(kernel)
    waves = threads // 32
    of_wave = -(-registers * 32 // 256) * 256
    blocks = min(65536 // of_wave // waves, 2048 // threads, 32, _SHARED[target] // (shared + 1024))
    return blocks * waves


def threads_of(kernel: str) -> int:
    """Threads of a block (csrc_cuda/arguments.h)."""
    header = (ROOT / "csrc_cuda/arguments.h").read_text()
    name = {"kv_copy": "kCopyThreads", "sample": "kSampleThreads"}.get(
        kernel, "kWriteThreads" if kernel.startswith("kv_write") else "kDecodeThreads"
    )
    return _number(rf"{name} = (\d+)", header)


def _compile_rocm(target: str, listing: Path) -> Compiled:
    report = _output(
        [
            str(CLANG), "-std=c++17", "-O3", "-x", "hip", "--cuda-device-only",
            "--no-gpu-bundle-output", "-nogpulib", "-nogpuinc", f"--offload-arch={target}",
            f"-I{ROOT / 'csrc_cuda'}", "-Rpass-analysis=kernel-resource-usage", "-S",
            ROOT / "csrc_rocm/kernels.hip", "-o", listing,
        ]
    )  # fmt: skip
    resources = {}
    for entry in report.split("Function Name: portalm_")[1:]:
        resources[entry.split(" ")[0]] = Resources(
            registers=_number(r" VGPRs: (\d+)", entry) + _number(r" AGPRs: (\d+)", entry),
            shared=_number(r"LDS Size \[bytes/block\]: (\d+)", entry),
            spills=_number(r"ScratchSize \[bytes/lane\]: (\d+)", entry),
            waves=_number(r"Occupancy \[waves/SIMD\]: (\d+)", entry),
        )
    parts = re.split(r"^portalm_(\w+):", listing.read_text(), flags=re.MULTILINE)[1:]
    assembly = dict(zip(parts[::2], parts[1::2], strict=True))
    return Compiled(resources, assembly)


def _output(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stderr + done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def main() -> None:
    """Writes what every kernel takes of every target."""
    targets = (*CUDA_TARGETS, *ROCM_TARGETS)
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_for, targets))
    table = {
        target: {name: dataclasses.asdict(r) for name, r in sorted(c.resources.items())}
        for target, c in zip(targets, compiled, strict=True)
    }
    lines = (
        f"  {json.dumps(target)}: {{\n"
        + ",\n".join(f"    {json.dumps(n)}: {json.dumps(r)}" for n, r in kernels.items())
        + "\n  }"
        for target, kernels in table.items()
    )
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

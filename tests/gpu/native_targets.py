"""Compiles the native kernels for GPUs without running them, and reports the resources they use.

`python -m tests.gpu.native_targets` rewrites native_budgets.json.
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
"""Bytes of shared memory per multiprocessor; each block uses 1 KiB more than it asks for."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources that a kernel uses on one target."""

    registers: int
    """32-bit registers per thread; vector registers on AMD."""
    shared: int
    """Bytes of shared memory (LDS) per block."""
    spills: int
    """Bytes of memory per thread that replace missing registers."""
    waves: int
    """Waves that fit an NVIDIA multiprocessor or an AMD SIMD at once, by these limits alone."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """All kernels, compiled for one target."""

    resources: dict[str, Resources]
    """By name of kernel."""
    assembly: dict[str, str]
    """Instructions, by name of kernel."""


def compile_for(target: str) -> Compiled:
    """Compile the kernels of csrc_cuda or csrc_rocm for one target."""
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
            registers, shared, spills, _cuda_waves(target, registers, shared)
        )
    sass = _output([knobs.nvidia.cuobjdump.path, "-sass", cubin])  # cuobjdump is part of Triton
    assembly = {
        part.split("\n")[0].strip().removeprefix("portalm_"): part
        for part in sass.split("Function : ")[1:]
    }
    return Compiled(resources, assembly)


def _cuda_waves(target: str, registers: int, shared: int) -> int:
    """Waves per multiprocessor: 64 Ki registers, allocated per wave by 256, and 2,048 threads."""
    threads = num_threads()
    waves = threads // 32
    of_wave = -(-registers * 32 // 256) * 256
    blocks = min(65536 // of_wave // waves, 2048 // threads, 32, _SHARED[target] // (shared + 1024))
    return blocks * waves


def num_threads() -> int:
    """Threads per block of the kernels, read from csrc_cuda/arguments.h."""
    header = (ROOT / "csrc_cuda/arguments.h").read_text()
    return _number(r"kDecodeThreads = (\d+)", header)


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
    """Write the resources of every kernel, on every target that a compiler here supports."""
    targets = (*(CUDA_TARGETS if NVCC else ()), *(ROCM_TARGETS if CLANG else ()))
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_for, targets))
    table = json.loads(BUDGETS.read_text()) | {
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

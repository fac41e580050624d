"""Collect what a GPU machine without network lacks into one folder, for `gpu_run.py --pack`.

    python benchmarks/gpu/pack.py --out PACK --python python3.12 --triton 3.6.0

The GPU machine needs torch, Triton, transformers, numpy, safetensors, tokenizers and nvcc. The pack
adds, for one version of Python:

- wheels/: PortaLM's other dependencies, with the versions of ci/constraints.txt, from pip's index
- native/: the native CUDA module, where that Python, with its headers, and nvcc are installed here
- triton/: kernels compiled for the target by the dry GPU (dry.py), and their launchers
- pack.json: what was collected and what was not, with the reason

It runs in the development environment (make install-dev).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.environment import ROOT, normal, requirements
from gpu.pack_kernels import collect_kernels

ON_THE_MACHINE = frozenset(
    (
        *("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers"),
        *("huggingface-hub", "hf-xet"),  # of transformers, which fixes their versions
    )
)
"""Distributions that the pack does not bring."""

UNUSED = frozenset(("xgrammar", "apache-tvm-ffi"))
"""Dependencies that no stage uses: none asks for a grammar."""


def distributions(python_version: str) -> list[str]:
    """Names of the distributions to bring: PortaLM's dependencies and theirs."""
    there = {"extra": "", "python_version": python_version, "python_full_version": python_version}
    found: list[str] = []
    todo = [normal(name) for name in requirements()]
    while todo:
        name = todo.pop()
        if name in found or name in ON_THE_MACHINE or name in UNUSED:
            continue
        found.append(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(there):
                todo.append(normal(requirement.name))
    return sorted(found)


def pinned(names: Iterable[str]) -> list[str]:
    """The requirements `name==version` of ci/constraints.txt.

    Raises:
        SystemExit: a name has no version there.
    """
    versions = {}
    for line in (ROOT / "ci/constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version:
            versions[normal(name)] = version.strip()
    if missing := [name for name in names if name not in versions]:
        raise SystemExit(f"ci/constraints.txt has no version of {', '.join(missing)}: add them")
    return [f"{name}=={versions[name]}" for name in names]


def collect_wheels(folder: Path, python: str) -> dict[str, Any]:
    """Download the wheels for a version of Python, such as "3.12"."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    download += ["--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
    subprocess.run([*download, *pinned(distributions(python))], check=True)
    wheels = sorted(folder.glob("*.whl"))
    return {
        "wheels": [wheel.name for wheel in wheels],
        "wheel_bytes": sum(wheel.stat().st_size for wheel in wheels),
    }


def build_native(folder: Path, python: str) -> dict[str, Any]:
    """Build the native CUDA module for the interpreter `python`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if shutil.which("nvcc") is None or cmake is None:
        return {"native": [], "native_missing": "no nvcc or no cmake was found here"}
    nanobind = [sys.executable, "-m", "nanobind", "--cmake_dir"]
    found = subprocess.run(nanobind, check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="portalm-pack-") as build:
        configure = [cmake, "-S", str(ROOT), "-B", build, "--log-level=WARNING"]
        configure += ["-DPORTALM_MODULES=cuda", f"-DPython_EXECUTABLE={python}"]
        configure += [f"-Dnanobind_DIR={found}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += ["-DCMAKE_MODULE_LINKER_FLAGS=-static-libstdc++ -static-libgcc"]
        for command in (configure, [cmake, "--build", build]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                text = (done.stdout + done.stderr)[-1500:]
                return {"native": [], "native_missing": f"{' '.join(command)} failed: {text}"}
        for module in Path(build).glob("_cuda*.so"):
            shutil.copy(module, folder)
    return {"native": [module.name for module in folder.iterdir()]}


def main() -> None:
    """Write the pack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pack to")
    parser.add_argument(
        "--python",
        default="python3.12",
        help="interpreter of the GPU machine's version, for the native module and the Triton cache "
        "(default: python3.12)",
    )
    parser.add_argument(
        "--python-version", default="3.12", help="version that wheels are for (default: 3.12)"
    )
    parser.add_argument(
        "--triton", default="3.6.0", help="release on the GPU machine (default: 3.6.0)"
    )
    parser.add_argument(
        "--target", default="sm_90", help="GPU to compile kernels for (default: sm_90)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=3600,
        help="seconds for compiling kernels (default: 3600; 2 cores need about 1200)",
    )
    parser.add_argument(
        "--stages",
        default="smoke,engine,kernels,numerics",
        help="stages of gpu_run.py to compile kernels for (default: all that launch any)",
    )
    parser.add_argument(
        "--skip",
        default="",
        help="comma-separated parts to leave as they are: wheels, native, triton",
    )
    arguments = parser.parse_args()
    skipped = arguments.skip.split(",")
    arguments.out.mkdir(parents=True, exist_ok=True)
    index = arguments.out / "pack.json"
    content: dict[str, Any] = json.loads(index.read_text()) if index.exists() else {}
    content["python"] = arguments.python_version
    if "wheels" not in skipped:
        content |= collect_wheels(arguments.out / "wheels", arguments.python_version)
    if "native" not in skipped:
        content |= build_native(arguments.out / "native", arguments.python)
    if "triton" not in skipped:
        content |= collect_kernels(
            arguments.out / "triton",
            python=arguments.python,
            python_version=arguments.python_version,
            triton=arguments.triton,
            target=arguments.target,
            stages=arguments.stages,
            limit_s=arguments.limit,
        )
    index.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

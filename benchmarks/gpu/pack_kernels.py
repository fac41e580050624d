"""The part of a pack that Triton needs: compiled kernels and their launchers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.environment import ROOT
from gpu.pack_backend import KEY, LAUNCHERS

KEPT = (".json", ".cubin", ".so")
"""Files of Triton's cache that a launch reads; the others are for debugging."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the cache depends on in the GPU machine's Python."""

    key: str
    """`triton_key()`: a hash of Triton's files."""
    suffix: str
    """Of native modules: .cpython-312-x86_64-linux-gnu.so"""
    include: str
    """Folder of Python.h."""


_FACTS = """
import json, sys, sysconfig
sys.path.insert(0, sys.argv[1])
from triton.runtime.cache import triton_key
print(json.dumps([triton_key(), sysconfig.get_config_var("EXT_SUFFIX"),
                  sysconfig.get_paths()["include"]]))
"""


def collect_kernels(
    folder: Path,
    *,
    python: str,
    python_version: str,
    triton: str,
    target: str,
    stages: str,
    limit_s: float,
) -> dict[str, Any]:
    """Fill `folder` with the kernels that gpu_run.py launches, for one release of Triton.

    Args:
        folder: becomes a part of Triton's cache.
        python: interpreter of the GPU machine's version.
        python_version: its version: "3.12".
        triton: release of Triton on the GPU machine.
        target: GPU to compile for: "sm_90".
        stages: the stages to run, as gpu_run.py takes them.
        limit_s: time limit of the dry run that compiles.
    """
    with tempfile.TemporaryDirectory(prefix="portalm-pack-") as name:
        work = Path(name)
        own_version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        own = _triton(work, triton, own_version)
        theirs = own if python_version == own_version else _triton(work, triton, python_version)
        done = subprocess.run(
            [python, "-c", _FACTS, str(theirs)], check=True, capture_output=True, text=True
        )
        facts = Facts(*json.loads(done.stdout))
        sources = work / "launchers"
        sources.mkdir()
        (work / "key").write_text(facts.key)
        environment = {
            KEY: str(work / "key"),
            LAUNCHERS: str(sources),
            "PORTALM_DRY_TARGET": target,
        }
        command = [sys.executable, str(ROOT / "benchmarks/gpu_run.py"), "--device", "dry-pack"]
        command += ["--out", str(work / "run"), "--packages", str(own), "--limit", str(limit_s)]
        status = subprocess.run(
            [*command, "--stages", stages, "--go-on"],
            env={**os.environ, **environment},
            check=False,
        ).returncode
        shutil.rmtree(folder, ignore_errors=True)
        num_kernels = _keep(work / "run/triton-cache", folder)
        num_launchers = _launchers(folder, sources, own, facts)
    return {
        "triton": triton,
        "target": target,
        "kernels": num_kernels,
        "launchers": num_launchers,
        "dry_run": "passed" if status == 0 else "failed in part: some kernels are missing",
    }


def _triton(work: Path, triton: str, python_version: str) -> Path:
    """Download and extract a release of Triton for a version of Python."""
    wheels, folder = work / f"wheel-{python_version}", work / f"triton-{python_version}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    download += ["--only-binary=:all:", "--python-version", python_version, "--dest", str(wheels)]
    subprocess.run([*download, f"triton=={triton}"], check=True)
    [wheel] = wheels.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(folder)], check=True)
    for tool in (folder / "triton/backends/nvidia/bin").iterdir():
        tool.chmod(0o755)  # zipfile does not restore permissions
    return folder


def _keep(cache: Path, folder: Path) -> int:
    """Copy the files that a launch reads; return the number of kernels."""
    for path in cache.glob("*/*"):
        if path.suffix in KEPT:
            copied = folder / path.relative_to(cache)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied)
    return len(list(folder.glob("*/*.cubin")))


def _launchers(folder: Path, sources: Path, triton: Path, facts: Facts) -> int:
    """Compile the launchers as Triton does, into the place in its cache where it looks for them."""
    nvidia = triton / "triton/backends/nvidia"
    modules = {path.read_text(): "__triton_launcher" for path in sources.glob("*.c")}
    if not modules:
        return 0
    modules[(nvidia / "driver.c").read_text()] = "cuda_utils"
    # there may be no driver here: a library of its name is enough to link
    stub = sources / "stub"
    stub.mkdir()
    (stub / "empty.c").write_text("")
    link = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", str(stub / "empty.c")]
    subprocess.run([*link, "-o", str(stub / "libcuda.so.1")], check=True)
    for text, name in modules.items():
        source, module = sources / f"{name}.c", sources / f"{name}{facts.suffix}"
        source.write_text(text)
        command = ["gcc", str(source), "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", str(module)]
        command += ["-Wl,--no-as-needed", f"-L{stub}", "-l:libcuda.so.1"]
        command += [f"-I{nvidia / 'include'}", f"-I{facts.include}"]
        subprocess.run(command, check=True)
        for machine in _PLATFORMS:
            place = folder / _base32(hashlib.sha256((text + machine).encode()).hexdigest())
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(module, place / module.name)
    return len(modules)


_PLATFORMS = ("x86_64,Linux,64bit,ELF", "x86_64,Linux,64bit,")
"""Triton's `platform_key()` where the program `file` is installed, and where it is not."""


def _base32(key: str) -> str:
    from triton.runtime.cache import _base32 as base32

    name: str = base32(key)
    return name

"""What a machine lacks: packages, the native module and compiled kernels from a pack (pack.py).

Nothing is installed, and pip is not needed: everything goes into the folder of the results.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

DRY = (
    "dry = gpu.dry_backend:DryCudaBackend",
    "dry-rocm = gpu.dry_backend:DryRocmBackend",
    "dry-pack = gpu.pack_backend:PackingCudaBackend",
)
"""Entry points of backends that only this harness has."""


@dataclass(slots=True)
class Environment:
    """Environment variables of the parts, and remarks for the record."""

    variables: dict[str, str]
    notes: list[str] = field(default_factory=list)


def prepare(out: Path, pack: Path | None, packages: str) -> Environment:
    """Make this source tree, and what a pack adds, importable in subprocesses.

    Args:
        out: folder of the results; subfolders are created in it.
        pack: folder that pack.py wrote, or None.
        packages: further folders of packages, separated like PYTHONPATH.
    """
    notes: list[str] = []
    folders = [str(_source_tree(out / "source", pack, notes)), str(ROOT / "benchmarks")]
    if packages:
        folders.append(packages)
    if pack is not None:
        folders.append(str(_unpack(out / "packages", pack, notes)))
    variables = {
        "PYTHONPATH": os.pathsep.join(folders),
        "TRITON_CACHE_DIR": str(_triton_cache(out / "triton-cache", pack, notes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    return Environment(variables, notes)


def _source_tree(folder: Path, pack: Path | None, notes: list[str]) -> Path:
    """Create a folder from which this source tree can be imported as if it were installed."""
    shutil.rmtree(folder, ignore_errors=True)
    backends = folder / "portalm_backends"
    backends.mkdir(parents=True)
    for entry in (ROOT / "backends").iterdir():
        (backends / entry.name).symlink_to(entry)
    (folder / "portalm").symlink_to(ROOT / "portalm")
    info = folder / "portalm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: portalm\nVersion: 0\n")
    lines = ["[portalm.backends]", *_entry_points(), *DRY]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for module in (
        sorted((pack / "native").iterdir()) if pack and (pack / "native").exists() else ()
    ):
        if not module.name.endswith((sysconfig.get_config_var("EXT_SUFFIX"), ".abi3.so")):
            notes.append(f"{module.name} is for another Python than this one: not used")
            continue
        (backends / module.name).unlink(missing_ok=True)
        (backends / module.name).symlink_to(module.resolve())
    return folder


def _entry_points() -> list[str]:
    """The lines of pyproject.toml that name the backends; Python 3.10 has no TOML parser."""
    text = (ROOT / "pyproject.toml").read_text()
    table = text.partition('"portalm.backends"]\n')[2].partition("\n\n")[0]
    return table.replace('"', "").splitlines()


def requirements() -> list[str]:
    """Names of the distributions that pyproject.toml requires."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    return re.findall(r'^  "([A-Za-z0-9_-]+)', listed, re.MULTILINE)


def not_installed(environment: Environment) -> list[str]:
    """PortaLM's requirements that neither this Python nor the pack has."""
    path = [*environment.variables["PYTHONPATH"].split(os.pathsep), *sys.path]
    found = {normal(d.name) for d in importlib.metadata.distributions(path=path)}
    return [name for name in requirements() if normal(name) not in found]


def normal(name: str) -> str:
    """A distribution's name in the form that compares equal (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


# -- packs ------------------------------------------------------------------------------------


def _unpack(folder: Path, pack: Path, notes: list[str]) -> Path:
    """Extract the wheels that this Python lacks, or has in an older version."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for wheel in sorted((pack / "wheels").glob("*.whl")):
        name, version, *_, python, abi, _ = wheel.stem.split("-")
        if not _fits(python, abi):
            notes.append(f"{wheel.name} is for another Python than this one: not used")
            continue
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = ""
        if here and _order(here) >= _order(version):
            continue
        if here:
            notes.append(f"{name} {version} from the pack replaces {here}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        for data in folder.glob("*.data"):  # files that pip would move next to the others
            for part in ("purelib", "platlib"):
                if (data / part).exists():
                    shutil.copytree(data / part, folder, dirs_exist_ok=True)
            shutil.rmtree(data)
    return folder


def _fits(python: str, abi: str) -> bool:
    """True if a wheel with these tags runs on this Python."""
    major, minor = sys.version_info[:2]
    if abi == "abi3":
        lowest = re.search(r"cp3(\d+)", python)
        return lowest is not None and int(lowest.group(1)) <= minor
    return f"cp{major}{minor}" in python.split(".") or "py3" in python.split(".")


def _order(version: str) -> tuple[int, ...]:
    """The numbers of a release, for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


def _triton_cache(folder: Path, pack: Path | None, notes: list[str]) -> Path:
    """Create a writable Triton cache with the pack's compiled kernels.

    Triton finds a kernel by a hash of its source, the options and Triton itself: kernels that were
    compiled by another Triton are ignored, never used by mistake.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if pack is None or not (pack / "triton").exists():
        return folder
    made_for = json.loads((pack / "pack.json").read_text())["triton"]
    try:
        here = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        here = "none"
    if here != made_for:
        notes.append(f"the pack's kernels are for Triton {made_for}, this is {here}: not used")
        return folder
    shutil.copytree(pack / "triton", folder, dirs_exist_ok=True)
    for group in folder.glob("*/__grp__*.json"):  # lists a kernel's files by absolute path
        files = json.loads(group.read_text())["child_paths"]
        moved = {name: str(group.parent / name) for name in files}
        group.write_text(json.dumps({"child_paths": moved}))
    return folder


# -- preflight --------------------------------------------------------------------------------

_PROBE = """
import importlib, json, platform, sys
found = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"
versions = {"python": platform.python_version()}
for name in ("torch", "triton", "transformers", "numpy"):
    if name in sys.modules:
        versions[name] = sys.modules[name].__version__
print("PROBE " + json.dumps([found, versions]))
"""


def preflight(
    modules: Iterable[str], environment: Environment
) -> tuple[dict[str, str], dict[str, str]]:
    """Import `modules` in a subprocess.

    Returns:
        The error of each module that cannot be imported, and versions of the main packages.
    """
    names = list(dict.fromkeys(modules))
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps(names)],
        env={**os.environ, **environment.variables},
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("PROBE "):
            errors, versions = json.loads(line.removeprefix("PROBE "))
            return errors, versions
    text = f"the process ended with status {done.returncode}: {done.stderr[-2000:]}"
    return dict.fromkeys(names, text), {}

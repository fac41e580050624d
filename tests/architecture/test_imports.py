"""Rules of the source tree that import-linter does not check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVICE_NAMES = re.compile(
    r"torch\.cuda|torch\.xpu|torch_xla|\bimport jax\b|\bfrom jax\b|is_cuda\b|is_rocm\b|is_xla\b"
)
HOME_FOLDERS = re.compile(r"(?<![\w.])/(home|root|Users|mnt)/\w")


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.strip()


def sources(*folders: str) -> list[Path]:
    return [p for f in folders for p in (ROOT / f).rglob("*.py")]


def test_importing_portalm_imports_no_torch() -> None:
    loaded = python("import sys, portalm; print([m for m in sys.modules if m in "
                    "('torch', 'numpy', 'transformers', 'fastapi', 'zmq')])")  # fmt: skip

    assert loaded == "[]"


def test_importing_portalm_takes_less_than_300_ms_of_cpu_time() -> None:
    code = "import time; t = time.process_time(); import portalm; print(time.process_time() - t)"

    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_help_imports_no_torch() -> None:
    loaded = python(
        "import sys\nfrom portalm.cli.main import build_parser\nbuild_parser().format_help()\n"
        "print('torch' in sys.modules)"
    )

    assert loaded == "False"


def test_importing_the_server_imports_no_grammar_library() -> None:
    loaded = python(
        "import sys\nimport portalm.llm, portalm.server.run\n"
        "print([m for m in ('xgrammar', 'tvm_ffi', 'transformers') if m in sys.modules])"
    )

    assert loaded == "[]"


def test_the_core_imports_neither_torch_nor_numpy() -> None:
    loaded = python(
        "import sys\nfrom portalm.core import block_manager, plan, prefix_cache, request, "
        "scheduler, stop\nprint([m for m in ('torch', 'numpy') if m in sys.modules])"
    )

    assert loaded == "[]"


def test_importing_llm_imports_no_transformers() -> None:
    loaded = python("import sys, portalm.llm\nprint('transformers' in sys.modules)")

    assert loaded == "False"


@pytest.mark.parametrize("path", sources("portalm"), ids=lambda p: str(p.relative_to(ROOT)))
def test_portalm_names_no_device(path: Path) -> None:
    assert DEVICE_NAMES.search(path.read_text()) is None


def test_sources_contain_no_absolute_path_of_a_machine() -> None:
    here = str(ROOT)
    found = [
        str(path.relative_to(ROOT))
        for path in sources("portalm", "backends", "benchmarks", "ci")
        if HOME_FOLDERS.search(text := path.read_text()) or (len(ROOT.parts) > 2 and here in text)
    ]

    assert found == []


def test_csrc_cpu_includes_no_torch_header() -> None:
    files = [path for path in (ROOT / "csrc_cpu").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert "torch/" not in path.read_text(), path


def test_every_backend_readme_says_how_it_is_tested() -> None:
    for path in (ROOT / "backends").iterdir():
        if (path / "backend.py").exists() and path.name != "portable":
            assert "tested by" in (path / "README.md").read_text(), path

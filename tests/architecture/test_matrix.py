"""ci/matrix.yml is the one list of CI jobs, and `make test` runs every folder of tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MATRIX = yaml.safe_load((ROOT / "ci/matrix.yml").read_text())


def matrix(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "ci/matrix.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_job_states_how_it_is_checked() -> None:
    for name, job in MATRIX["jobs"].items():
        assert job["checked"] in ("run", "emulated", "interpreted", "compiled only"), name
        assert {"device", "image", "extra", "minutes"} <= set(job), name


def test_every_job_has_either_a_command_or_markers() -> None:
    for name, job in MATRIX["jobs"].items():
        assert ("command" in job) != ("markers" in job), name


def test_jobs_use_registered_markers_only() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    for job in MATRIX["jobs"].values():
        for word in job.get("markers", "").replace("not ", "").split(" or "):
            assert not word or f'"{word}:' in settings, word


def test_the_github_workflow_runs_the_jobs_of_the_matrix() -> None:
    jobs = json.loads(matrix("github").stdout)["include"]

    assert [job["job"] for job in jobs] == [
        n for n, j in MATRIX["jobs"].items() if "needs" not in j
    ]
    assert "ci/matrix.py github" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_gpu_jobs_name_the_hardware_they_need() -> None:
    for device in ("cuda", "rocm"):
        assert "GPU" in MATRIX["jobs"][device]["needs"]


def test_an_unknown_job_is_refused_with_the_known_names() -> None:
    done = matrix("shell", "vax")

    assert done.returncode == 1
    assert "cpu-slow" in done.stderr


def test_make_test_runs_every_folder_of_tests() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lists = re.findall(r"^(?:PARALLEL|SERIAL)_TESTS := (.*)$", makefile, re.MULTILINE)

    folders = {str(p.parent.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py")}

    assert len(lists) == 2
    assert sorted(" ".join(lists).split()) == sorted(folders - {"tests/xla"})  # needs JAX
    assert "pytest -m xla" in MATRIX["jobs"]["tpu"]["command"]

"""ci/matrix.yml is the one list of CI jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
HOW = ("run", "emulated", "interpreted", "compiled only")
MATRIX = yaml.safe_load((ROOT / "ci/matrix.yml").read_text())


def matrix(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "ci/matrix.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_job_says_how_it_was_checked() -> None:
    for name, job in MATRIX["jobs"].items():
        assert job["checked"] in ("run", "emulated", "interpreted", "compiled only"), name
        assert {"device", "image", "extra", "minutes"} <= set(job), name


def test_every_job_has_one_way_to_run() -> None:
    for name, job in MATRIX["jobs"].items():
        assert ("command" in job) != ("markers" in job), name


def test_markers_are_those_that_pytest_knows() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    for job in MATRIX["jobs"].values():
        for word in job.get("markers", "").replace("not ", "").split(" or "):
            assert not word or f'"{word}:' in settings, word


def test_the_workflow_reads_the_matrix() -> None:
    jobs = json.loads(matrix("github").stdout)["include"]

    assert [job["job"] for job in jobs] == [
        n for n, j in MATRIX["jobs"].items() if "needs" not in j
    ]
    assert "ci/matrix.py github" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_what_needs_a_device_of_its_own_says_which() -> None:
    for device in ("cuda", "rocm"):
        assert "GPU" in MATRIX["jobs"][device]["needs"]


def test_an_unknown_job_names_those_there_are() -> None:
    done = matrix("shell", "vax")

    assert done.returncode == 1
    assert "cpu-slow" in done.stderr

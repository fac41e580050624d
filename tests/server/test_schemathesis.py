"""Requests generated from the server's OpenAPI schema never cause a server error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import RunningServer


@pytest.mark.parametrize(
    ("phases", "num_examples"),
    [("fuzzing", 8), pytest.param("examples,coverage,fuzzing", 100, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_requests_allowed_by_the_schema_cause_no_server_error(
    null_server: RunningServer, tmp_path: Path, phases: str, num_examples: int
) -> None:
    command = [
        Path(sys.executable).parent / "schemathesis", "run", f"{null_server.url}/openapi.json",
        "--checks", "not_a_server_error", "--max-examples", str(num_examples), "--seed", "1",
        "--phases", phases, "--request-timeout", "30", "--no-color",
    ]  # fmt: skip

    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path
    )

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    with null_server.client() as http:
        assert http.get("/health/ready").status_code == 200

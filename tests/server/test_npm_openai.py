"""The npm openai SDK with the default model."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.conftest import running_server

pytestmark = [pytest.mark.network, pytest.mark.model]

TOUR = Path(__file__).parent / "npm"


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node 20 or newer and npm")
def test_npm_sdk_tour(tmp_path: Path, default_model: Path, default_encoder: Path) -> None:
    for name in ("package.json", "package-lock.json", "tour.mjs"):
        shutil.copy(TOUR / name, tmp_path)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=tmp_path, check=True, timeout=300)

    with (
        running_server("--max-model-len", "2k", "--api-key", "secret") as server,
        running_server(str(default_encoder), "--served-model-name", "encoder") as encoder,
    ):
        done = subprocess.run(
            ["node", "--test", "tour.mjs"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
            env={
                **os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "secret",
                "EMBEDDINGS_BASE_URL": f"{encoder.url}/v1",
            },
        )  # fmt: skip
        server.wait_for("num_requests_running", 0)  # includes the canceled stream

    assert done.returncode == 0, done.stdout

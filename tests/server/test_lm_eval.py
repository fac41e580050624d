"""lm-evaluation-harness (local-completions) on the default model; docs/serving.md, Clients."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.conftest import running_server

pytestmark = [pytest.mark.network, pytest.mark.model]

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    shutil.which("lm_eval") is None, reason="needs lm_eval: pip install lm-eval[api]"
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_local_task_is_scored(tmp_path: Path, default_model: Path, batch_size: int) -> None:
    flags = ("--max-model-len", "2k", "--api-key", "secret", "--served-model-name", "small")
    with running_server(*flags) as server:
        model = f"model=small,base_url={server.url}/v1/completions,auth_token=secret"
        command = [
            "lm_eval", "--model", "local-completions", "--model_args", model,
            "--include_path", "tests/server/lm_eval", "--tasks", "capitals,capitals_said",
            "--batch_size", str(batch_size), "--output_path", str(tmp_path),
        ]  # fmt: skip
        environment = {**os.environ, "OPENAI_API_KEY": "secret"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)

    [written] = tmp_path.rglob("results*.json")
    results = json.loads(written.read_text())["results"]
    assert results["capitals"]["acc,none"] >= 0.75  # chance is 0.25
    assert results["capitals_said"]["exact_match,word"] >= 0.5

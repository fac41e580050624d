"""benchmarks/gpu_run.py runs on a machine without a GPU; its figures mean nothing there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks/gpu_run.py")
STAGES = ("calib", "numerics", "kernels", "engine", "serve", "profile")


def gpu_run(folder: Path, *arguments: str, limit: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--out", str(folder), "--limit", str(limit), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def results(folder: Path) -> dict[str, dict[str, object]]:
    return {r["name"]: r for r in json.loads((folder / "gpu-run.json").read_text())["results"]}


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "benchmarks",
    )
    return done.stdout.strip()


def test_predictions_are_written_before_anything_is_measured(tmp_path: Path) -> None:
    gpu_run(tmp_path, "--stages", "calib", "--device", "none", limit=20)

    record = json.loads((tmp_path / "gpu-run.json").read_text())
    assert record["predictions"]["8b: decode, 256 x 1024"]["goal"] == 17_500
    assert [r["name"] for r in record["results"]] == ["FAILED calib"]
    assert "'none'" in record["results"][0]["message"]


def test_a_stage_is_stopped_at_its_time_limit(tmp_path: Path) -> None:
    done = gpu_run(tmp_path, "--stages", "calib", "--device", "reference", "--tiny", limit=1)

    assert done.returncode == 1
    assert "time limit of 1 s" in str(results(tmp_path)["FAILED calib"]["message"])


def test_the_thousand_requests_have_the_published_total_lengths() -> None:
    totals = python(
        "from gpu.engine import lengths_like_sharegpt as f\n"
        "print(*[sum(pair[i] for pair in f(1000)) for i in (0, 1)])"
    )

    assert totals == "215196 198001"


@pytest.mark.gpu_interpreted
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_on_any_machine(tmp_path: Path, stage: str) -> None:
    done = gpu_run(tmp_path, "--stages", stage, "--device", "reference", "--tiny")

    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path)

"""`portalm bench throughput`, `latency` and `startup`: on the null device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portalm.cli.main import main
from tests.server.conftest import make_model_folder


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_model_folder(tmp_path_factory.mktemp("bench") / "tiny")
    return ["--model", str(folder), "--device", "null", "--load-format", "dummy"]


def measure(folder: Path, kind: str, *flags: str) -> dict[str, Any]:
    result = folder / "result.json"
    assert main(["bench", kind, "--result-json", str(result), *flags]) == 0
    return json.loads(result.read_text())


def test_throughput_counts_the_requested_tokens(tmp_path: Path, flags: list[str]) -> None:
    lengths = ["--num-prompts", "12", "--input-len", "30", "--output-len", "9", "--fixed-lengths"]

    figures = measure(tmp_path, "throughput", *lengths, *flags)

    assert (figures["prompt_tokens"], figures["generated_tokens"]) == (12 * 30, 12 * 9)
    assert figures["output_throughput"] == pytest.approx(12 * 9 / figures["duration_s"])


def test_varying_lengths_fit_the_model(tmp_path: Path, flags: list[str]) -> None:
    lengths = ["--num-prompts", "40", "--input-len", "300", "--output-len", "200"]

    figures = measure(tmp_path, "throughput", *lengths, *flags)

    assert figures["num_prompts"] == 40
    assert figures["prompt_tokens"] != 40 * 300


def test_latency_is_measured_per_batch(tmp_path: Path, flags: list[str]) -> None:
    batch = ["--batch-size", "3", "--num-iters", "4", "--output-len", "10"]

    figures = measure(tmp_path, "latency", *batch, *flags)

    assert figures["num_iters"] == 4
    assert figures["mean_token_ms"] == pytest.approx(figures["mean_latency_ms"] / 10)
    assert figures["p50_latency_ms"] <= figures["p99_latency_ms"]


def test_startup_measures_a_real_server(tmp_path: Path, flags: list[str]) -> None:
    overrides = ["--hf-overrides", '{"rope_theta": 5.0}']

    figures = measure(tmp_path, "startup", "--num-iters", "1", *overrides, *flags)

    listening, ready, first = (
        figures[f"median_{name}_s"] for name in ("listening", "ready", "first_token")
    )
    assert 0 < listening <= ready < first
    assert figures["median_engine_load_s"] > 0


@pytest.mark.parametrize(
    ("kind", "more", "problem"),
    [
        ("throughput", ["--num-prompts", "0"], "--num-prompts must be at least 1"),
        ("throughput", ["--input-len", "500"], "add up to 620 tokens, more than --max-model-len"),
        ("latency", ["--output-len", "0"], "--output-len must be at least 1"),
        ("startup", ["--num-iters", "0"], "--num-iters must be at least 1"),
        ("startup", ["--block-size", "0"], "the server exited: portalm: block_size must be"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(
    flags: list[str], kind: str, more: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", kind, *flags, *more]) == 2
    assert problem in capsys.readouterr().err

"""`portalm bench serve`: its requests and its statistics."""

from __future__ import annotations

import argparse
import json
import statistics

import pytest

from portalm.cli.bench import figures
from portalm.cli.bench import serve as bench
from portalm.cli.bench.serve import BenchAnswer
from portalm.cli.main import build_parser, main
from portalm.errors import ConfigError
from tests.server.conftest import make_model_folder, running_server


def arguments(*flags: str) -> argparse.Namespace:
    return build_parser().parse_args(["bench", "serve", *flags])


def test_the_same_seed_gives_the_same_requests() -> None:
    one = bench.make_requests(arguments("--request-rate", "5"))

    assert one == bench.make_requests(arguments("--request-rate", "5"))
    assert one != bench.make_requests(arguments("--request-rate", "5", "--seed", "1"))


def test_lengths_vary_around_their_mean() -> None:
    planned = bench.make_requests(arguments("--num-prompts", "4000"))
    lengths = [len(one.prompt.split()) for one in planned]

    assert statistics.mean(lengths) == pytest.approx(200, rel=0.05)
    assert statistics.stdev(lengths) > 80
    assert statistics.mean(one.num_out for one in planned) == pytest.approx(120, rel=0.05)


def test_requests_arrive_at_the_given_rate() -> None:
    planned = bench.make_requests(arguments("--num-prompts", "4000", "--request-rate", "8"))

    assert planned[-1].start_s == pytest.approx(500, rel=0.1)


def test_percentiles_interpolate() -> None:
    assert figures.percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert figures.percentile([7.0], 99) == 7.0


def test_a_summary_counts_only_answered_requests() -> None:
    answers = [
        BenchAnswer(ttft=0.1, gaps=[0.02, 0.04], e2el=1.0, num_in=10, num_out=3),
        BenchAnswer(ttft=0.3, gaps=[0.06], e2el=3.0, num_in=10, num_out=2),
        BenchAnswer(error="429: full"),
    ]

    summary = bench.summarize(answers, 2.0, bench.parse_goodput(["ttft:200", "itl:50"]))

    assert (summary["completed"], summary["failed"], summary["errors"]) == (2, 1, ["429: full"])
    assert summary["output_throughput"] == 2.5
    assert summary["total_token_throughput"] == 12.5
    assert summary["mean_itl_ms"] == pytest.approx(40)
    assert summary["p50_ttft_ms"] == pytest.approx(200)
    assert summary["request_goodput"] == 0.5


@pytest.mark.parametrize("limit", ["ttft", "ttft:fast", "speed:3"])
def test_an_invalid_goodput_limit_is_refused(limit: str) -> None:
    with pytest.raises(ConfigError, match="NAME:MS"):
        bench.parse_goodput([limit])


def test_bench_serve_measures_a_running_server(tmp_path, capsys) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    result = tmp_path / "result.json"
    flags = (
        "--num-prompts",
        "20",
        "--input-len",
        "8",
        "--output-len",
        "6",
        "--max-concurrency",
        "4",
    )
    with running_server(str(folder), "--device", "null", "--load-format", "dummy") as server:
        command = ["bench", "serve", "--base-url", server.url, *flags]
        status = main([*command, "--result-json", str(result)])
        metric = server.metric("generation_tokens_total")

    summary = json.loads(result.read_text())
    assert status == 0
    assert summary["completed"] == 20
    assert summary["output_throughput"] * summary["duration_s"] == pytest.approx(metric)
    assert "p99_ttft_ms" in capsys.readouterr().out


def test_a_missing_server_is_reported_in_one_line(capsys) -> None:
    status = main(["bench", "serve", "--base-url", "http://127.0.0.1:9", "--num-prompts", "1"])

    assert status == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err

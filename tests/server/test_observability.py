"""Metrics that add up, traces, and logs without secrets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from portalm.outputs import RequestMetrics
from portalm.sampling_params import SamplingParams
from portalm.server.observability import tracing
from portalm.server.observability.watch import RequestRecord
from tests.server.collector import Collector, running_collector
from tests.server.conftest import RunningServer, make_model_folder, running_server

KEY = "sk-very-secret"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"prompt": "w5 w6 w7", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def server(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = make_model_folder(tmp_path_factory.mktemp("watched") / "tiny")
    flags = (
        "--device", "null", "--load-format", "dummy", "--served-model-name", "tiny",
        "--api-key", KEY, "--log-format", "json", "--otlp-traces-endpoint", collector.url,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # ms until spans are sent
        with running_server(str(folder), *flags) as running:
            yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def log_line(server: RunningServer, **wanted: object) -> dict[str, object]:
    """Wait for a log line with these values and return it."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for text in list(server.output):
            line = json.loads(text)
            if wanted.items() <= line.items():
                return line
        time.sleep(0.02)
    raise AssertionError(f"no line with {wanted} in {server.output}")


# -- metrics ----------------------------------------------------------------------------------

NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_params_n_bucket",
    "request_params_max_tokens_bucket",
    "iteration_tokens_total_bucket",
    "cache_config_info",
    "startup_seconds",
}


@pytest.mark.parametrize("prefix", ["portalm:", "vllm:"])
def test_metrics_have_vllm_names(http: httpx.Client, prefix: str) -> None:
    assert http.post("/v1/completions", json=BODY).status_code == 200

    families = text_string_to_metric_families(http.get("/metrics").text)

    names = {sample.name for family in families for sample in family.samples}
    assert {prefix + name for name in NAMES} <= names


def test_metrics_add_up(http: httpx.Client) -> None:
    def read() -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {s.name.removeprefix("portalm:"): s.value for f in families for s in f.samples}

    before = read()
    http.post("/v1/completions", json={**BODY, "n": 2})
    http.post("/v1/completions", json={**BODY, "max_tokens": 300})
    after = read()

    grown = {name: after[name] - before.get(name, 0) for name in after}
    for part in ("queue", "prefill", "decode"):
        assert grown[f"request_{part}_time_seconds_count"] == 2
    parts = sum(grown[f"request_{p}_time_seconds_sum"] for p in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(grown["e2e_request_latency_seconds_sum"], rel=0.3, abs=0.1)
    assert grown["request_decode_time_seconds_sum"] > grown["request_prefill_time_seconds_sum"]
    assert grown["request_params_n_sum"] == 3
    assert grown["request_params_max_tokens_sum"] == 304
    assert grown["iteration_tokens_total_count"] == grown["engine_steps_total"]
    # the last sampled token of an answer is never computed
    computed = grown["prompt_tokens_total"] + 2 * (4 - 1) + (300 - 1)
    assert grown["iteration_tokens_total_sum"] == computed


def test_responses_are_counted_by_endpoint_and_status(http: httpx.Client) -> None:
    def count(handler: str, status: int) -> float:
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                labels = sample.labels
                if sample.name == "portalm:http_requests_total" and (
                    (labels["handler"], labels["status"]) == (handler, str(status))
                ):
                    return sample.value
        return 0.0

    asked = [("/v1/completions", 400), ("other", 404), ("other", 401)]
    before = [count(*one) for one in asked]
    http.post("/v1/completions", json={**BODY, "n": 0})
    http.get("/no/such/path/17")
    http.get("/v1/models", headers={"Authorization": "Bearer wrong"})

    assert [count(*one) for one in asked] == [n + 1 for n in before]


def promtool(text: str) -> list[str]:
    """Remarks of `promtool check metrics`."""
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed: it is in Debian's package prometheus")
    done = subprocess.run(
        [path, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr  # 3: valid, with remarks about style
    return done.stderr.splitlines()


def test_promtool_complains_only_about_vllm_names(http: httpx.Client) -> None:
    http.post("/v1/completions", json=BODY)
    text = http.get("/metrics").text

    remarks = promtool(text)
    without_colons = promtool(text.replace("portalm:", "portalm_").replace("vllm:", "vllm_"))

    assert all("should not contain ':'" in one for one in remarks if "iteration" not in one)
    assert without_colons == [
        f'{prefix}_iteration_tokens_total non-counter metrics should not have "_total" suffix'
        for prefix in ("portalm", "vllm")
    ]


# -- traces -----------------------------------------------------------------------------------


def test_request_is_a_span_in_the_callers_trace(http: httpx.Client, collector: Collector) -> None:
    body = {**BODY, "request_id": "traced", "n": 2, "temperature": 0.5, "max_tokens": 40}
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    before = time.time_ns()
    http.post("/v1/completions", json=body, headers=headers).raise_for_status()

    span, children = collector.trace_of("traced")

    assert (span.trace_id, span.parent_id) == (TRACE_ID, PARENT_ID)
    assert (span.name, span.kind, span.is_error) == ("text_completion tiny", "SERVER", False)
    times = [span.start_ns]
    assert list(children) == ["queue", "prefill", "decode"]
    for phase in children.values():
        assert phase.trace_id == TRACE_ID
        times += [phase.start_ns, phase.end_ns]
    times = [before, *times, span.end_ns, time.time_ns()]
    assert times == sorted(times)
    assert span.attributes["gen_ai.latency.time_in_queue"] == pytest.approx(
        (children["queue"].end_ns - children["queue"].start_ns) / 1e9, abs=1e-6
    )
    for name, value in {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 40,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 80,
        "gen_ai.response.finish_reasons": ["length", "length"],
    }.items():
        assert span.attributes[name] == value, name
    assert collector.resources[0]["service.name"] == "portalm"


def test_chat_without_a_callers_trace_starts_one(http: httpx.Client, collector: Collector) -> None:
    body = {"messages": [{"role": "user", "content": "w9 w8"}], "request_id": "root",
            "max_tokens": 3, "stream": True}  # fmt: skip
    http.post("/v1/chat/completions", json=body).raise_for_status()

    span, children = collector.trace_of("root")

    assert span.name == "chat tiny"
    assert span.parent_id == ""
    assert set(children) == {"queue", "prefill", "decode"}


def test_unsampled_trace_is_not_sent(http: httpx.Client, collector: Collector) -> None:
    for request_id, sampled in (("unsampled", "00"), ("sampled", "01")):
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{sampled}"}
        http.post("/v1/completions", json={**BODY, "request_id": request_id}, headers=headers)

    collector.trace_of("sampled")
    assert not [s for s in collector.spans if "unsampled" in s.attributes.values()]


def test_span_of_a_disconnected_client_is_aborted(
    http: httpx.Client, collector: Collector, server: RunningServer
) -> None:
    body = {**BODY, "max_tokens": 500, "stream": True, "request_id": "left"}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())

    span, children = collector.trace_of("left")

    assert span.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert set(children) == {"queue", "prefill", "decode"}
    assert children["decode"].end_ns == span.end_ns
    assert log_line(server, id="left")["finish_reason"] == "abort"
    # the engine's report of an abort does not count as a step
    assert server.metric("iteration_tokens_total_count") == server.metric("engine_steps_total")


def test_traces_without_the_extra_or_with_an_invalid_url_fail_at_startup() -> None:
    def refusal(url: str, *, before: str = "") -> str:
        script = f"import sys\n{before}\nfrom portalm.cli.main import main\nsys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", script, "serve", "--otlp-traces-endpoint", url],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        return done.stderr

    missing = refusal("http://localhost:4318", before="sys.modules['opentelemetry.sdk'] = None")
    not_http = refusal("grpc://localhost:4317")

    assert "pip install 'portalm[otel]'" in missing
    assert "must be an http or https URL, not 'grpc://localhost:4317'" in not_http


def test_unreachable_collector_is_warned_about_once(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not retried for a while; when it is back, the log says how many spans were lost."""
    times = RequestMetrics(1.0, finished_time=2.0)
    record = RequestRecord(
        request_id="x", tenant="", params=SamplingParams(), num_prompt_tokens=1,
        num_generated_tokens=0, num_cached_tokens=None, finish_reasons=["abort"], error=None,
        times=times, origin=None, final=None,
    )  # fmt: skip
    tracer = tracing.Tracer(collector.url, "tiny")

    def send() -> list[str]:
        tracer.ended(record)
        tracer._provider.force_flush()
        return [
            one.message
            for one in caplog.records
            if one.name == "portalm.server.observability.tracing"
        ]

    collector.is_down, collector.num_refused = True, 0
    for _ in range(3):
        [warning] = send()
    assert f"cannot be sent to {collector.url}/v1/traces" in warning
    assert collector.num_refused == 1

    monkeypatch.setattr(tracing, "_RETRY_AFTER_S", 0.0)
    tracer._exporter._retry_time = 0.0
    assert send() == [warning]
    collector.is_down = False
    assert send() == [warning, "traces can be sent again; 8 spans were lost"]
    span, children = collector.trace_of("x")
    assert (list(children), span.end_ns) == (["queue"], 2_000_000_000)
    tracer.close()


# -- logs -------------------------------------------------------------------------------------


def test_finished_request_is_one_log_line(http: httpx.Client, server: RunningServer) -> None:
    body = {**BODY, "request_id": "logged"}
    http.post("/v1/completions", json=body).raise_for_status()

    line = log_line(server, message="request ended", id="logged")

    for name, value in {
        "level": "info",
        "process": "server",
        "path": "/v1/completions",
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "generated_tokens": 4,
        "finish_reason": "length",
    }.items():
        assert line[name] == value, name
    assert 0 < line["queue_s"] <= line["ttft_s"] <= line["total_s"] < 10
    assert len([text for text in server.output if '"logged"' in text]) == 1


def test_neither_keys_nor_content_are_in_logs_or_traces(
    http: httpx.Client, server: RunningServer, collector: Collector
) -> None:
    body = {**BODY, "prompt": "w301 w302", "stop": "w303", "request_id": "private"}
    answer = http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    span, _ = collector.trace_of("private")
    line = log_line(server, id="private")

    assert line["tenant"] == span.attributes["portalm.tenant"] != ""
    written = "".join(server.output).encode() + b"".join(collector.bodies)
    assert len(answer) > 8
    for secret in (KEY, "w301", "w303", answer):
        assert secret.encode() not in written


def test_content_is_logged_if_enabled_and_an_unreachable_collector_is_warned_about_once(
    tmp_path, monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    folder = make_model_folder(tmp_path / "tiny")
    flags = (
        "--device", "null", "--load-format", "dummy", "--log-format", "json",
        "--enable-log-requests", "--otlp-traces-endpoint", f"{collector.url}/nothing",
    )  # fmt: skip
    with running_server(str(folder), *flags) as server, server.client() as http:
        for i in range(3):
            started = time.monotonic()
            answer = http.post("/v1/completions", json={**BODY, "request_id": f"r-{i}"}).json()
            assert time.monotonic() - started < tracing._TIMEOUT_S
            time.sleep(0.1)

        begun = log_line(server, message="request began", id="r-2")
        ended = log_line(server, message="request ended", id="r-2")
        log_line(server, logger=tracing.__name__, level="warning")
        http.post("/v1/completions", json=BODY).raise_for_status()
        time.sleep(0.3)
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGKILL)
        orphan = log_line(server, process="engine")
        with pytest.raises(ProcessLookupError):
            while time.monotonic() - started < 30:
                os.kill(engine, 0)
                time.sleep(0.1)

    assert begun["prompt"] == "w5 w6 w7"
    assert "max_tokens=4" in begun["params"]
    assert ended["answers"] == [answer["choices"][0]["text"]]
    assert orphan["message"] == "the parent process has exited: shutting down the engine"
    assert "".join(server.output).count("traces cannot be sent") == 1

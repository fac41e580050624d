"""The HTTP API on the null device, which computes nothing."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import RunningServer, make_model_folder, running_server


@pytest.fixture
def http(null_server: RunningServer):
    with null_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def sdk(null_server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{null_server.url}/v1", api_key="none", max_retries=0)


def complete(http: httpx.Client, **body: object) -> httpx.Response:
    settings = {"prompt": "w5 w6", "max_tokens": 4, "ignore_eos": True, **body}
    return http.post("/v1/completions", json=settings)


def events(response: httpx.Response) -> list[dict]:
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# -- completions ------------------------------------------------------------------------------


def test_completion_has_openai_shape_and_exact_usage(http) -> None:
    body = complete(http).json()

    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    [choice] = body["choices"]
    assert choice["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["total_tokens"] == 6


@pytest.mark.parametrize("prompt", ["w5 w6", ["w5 w6"], [5, 6], [[5, 6]]], ids=str)
def test_prompt_has_four_forms(http, prompt: object) -> None:
    text = complete(http).json()["choices"][0]["text"]

    assert complete(http, prompt=prompt).json()["choices"][0]["text"] == text


def test_choices_of_several_prompts_and_answers_are_indexed(http) -> None:
    body = complete(http, prompt=["w5", "w6 w7"], n=2).json()

    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 16


def test_echo_puts_the_prompt_before_the_answer(http) -> None:
    plain = complete(http).json()["choices"][0]["text"]

    assert complete(http, echo=True).json()["choices"][0]["text"] == "w5 w6" + plain


def test_concatenated_stream_equals_the_whole_answer(http) -> None:
    whole = complete(http, max_tokens=20).json()

    chunks = events(
        complete(http, max_tokens=20, stream=True, stream_options={"include_usage": True})
    )

    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == "length"
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-2])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 20


def test_usage_can_be_sent_with_every_chunk(http) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}

    chunks = events(complete(http, stream=True, stream_options=options))

    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 4]


def test_stop_string_across_tokens_is_not_in_the_text(http) -> None:
    text = complete(http, max_tokens=30).json()["choices"][0]["text"]
    words = text.split("w")
    stop = "w" + words[5] + "w" + words[6][:1]

    for stream in (False, True):
        response = complete(http, max_tokens=30, stop=[stop], stream=stream)
        if stream:
            chunks = events(response)
            found = "".join(c["choices"][0]["text"] for c in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            [choice] = response.json()["choices"]
            found, reason = choice["text"], choice["finish_reason"]
        assert found == text[: text.index(stop)]
        assert reason == "stop"


# -- chat -------------------------------------------------------------------------------------


def test_openai_sdk_chats_whole_and_streamed(sdk: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "w5 w6"}]

    whole = sdk.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, logprobs=True, top_logprobs=2
    )
    stream = sdk.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) >= 2
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_text_content_parts_are_accepted(http) -> None:
    parts = [{"type": "text", "text": "w5"}, {"type": "text", "text": "w6"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 2}

    assert http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] == 2


def test_models_and_aliases_are_listed(sdk: openai.OpenAI) -> None:
    assert [m.id for m in sdk.models.list()] == ["tiny", "alias"]
    assert sdk.models.retrieve("alias").id == "alias"


def test_detokenize_inverts_tokenize(http) -> None:
    ids = http.post("/tokenize", json={"prompt": "w5 w6"}).json()["tokens"]

    assert ids == [5, 6]
    assert (
        http.post("/detokenize", json={"tokens": ids}).json()["prompt"].replace(" ", "") == "w5w6"
    )


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"temprature": 1}, 400, "temprature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [5, 512]}, 400, "prompt"),
        ({"prompt": [5] * 600}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"n": 0}, 400, "n"),
        ({"logprobs": 99}, 400, "logprobs"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"stop": [""]}, 400, "stop"),
        ({"logit_bias": {"9999": 1}}, 400, "logit_bias"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_invalid_input_is_an_openai_error_that_names_the_field(http, body, status, param) -> None:
    response = complete(http, **body)

    assert response.status_code == status
    error = response.json()["error"]
    assert param in (error["param"] or "") and error["message"] and error["type"]
    assert complete(http).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [{"content": "w5"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": "w5"}], "tools": [{"type": "function"}]},
        {
            "messages": [{"role": "user", "content": "w5"}],
            "response_format": {"type": "json_object"},
        },
        {"messages": [{"role": "user", "content": "w5"}], "top_logprobs": 2},
    ],
    ids=["none", "no role", "image", "tools", "json", "top_logprobs alone"],
)
def test_invalid_chats_are_rejected(http, body: dict) -> None:
    response = http.post("/v1/chat/completions", json=body)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_body_that_is_not_json_is_rejected(http) -> None:
    response = http.post(
        "/v1/completions", content="{no", headers={"Content-Type": "application/json"}
    )

    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_unknown_paths_are_404(http) -> None:
    assert http.get("/v2/nothing").json()["error"]["type"] == "not_found_error"


# -- operation --------------------------------------------------------------------------------


def test_64_streams_at_once_have_exact_token_counts(null_server: RunningServer) -> None:
    def stream(i: int) -> int:
        with null_server.client() as http:
            options = {"include_usage": True}
            body = {"prompt": [5 + i], "max_tokens": 50 + i, "ignore_eos": True, "stream": True}
            response = http.post("/v1/completions", json={**body, "stream_options": options})
            return int(events(response)[-1]["usage"]["completion_tokens"])

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        counts = list(pool.map(stream, range(64)))

    assert counts == [50 + i for i in range(64)]


def test_client_disconnect_frees_its_blocks(null_server: RunningServer) -> None:
    body = {"prompt": "w5", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        null_server.client() as http,
        http.stream("POST", "/v1/completions", json=body) as response,
    ):
        next(response.iter_lines())

    null_server.wait_for("num_requests_running", 0)
    assert null_server.metric("kv_blocks_used") == 0


def test_metrics_are_valid_and_have_both_prefixes(http) -> None:
    complete(http)

    names = {family.name for family in text_string_to_metric_families(http.get("/metrics").text)}

    for name in ("num_requests_running", "kv_cache_usage_perc", "prefix_cache_hits",
                 "prompt_tokens", "time_to_first_token_seconds", "request_success"):  # fmt: skip
        assert f"portalm:{name}" in names and f"vllm:{name}" in names


def test_health_endpoints_of_a_ready_server_return_200(http) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/version", "/load"):
        assert http.get(path).status_code == 200, path


def test_api_key_is_required_and_checked(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    flags = ("--device", "null", "--load-format", "dummy", "--api-key", "secret")
    with running_server(str(folder), *flags) as server, server.client() as http:
        refused = [
            complete(http).status_code,
            http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code,
        ]
        allowed = http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code
        health = http.get("/health").status_code

    assert (refused, allowed, health) == ([401, 401], 200, 200)


def test_prefix_cache_is_not_shared_between_api_keys(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    flags = ("--device", "null", "--load-format", "dummy", "--api-key", "one", "--api-key", "two")
    body = {"prompt": list(range(3, 67)), "max_tokens": 1}
    cached = []
    with running_server(str(folder), *flags) as server, server.client() as http:
        for key in ("one", "two", "one"):
            answer = http.post(
                "/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}
            )
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached[:2] == [0, 0]
    assert cached[2] >= 32


def test_failed_engine_restart_is_reported_by_health_endpoints(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    flags = ("--device", "null", "--load-format", "dummy")
    with running_server(str(folder), *flags) as server, server.client() as http:
        (folder / "config.json").unlink()
        os.kill(server.engine_pid(), signal.SIGKILL)
        end = time.monotonic() + 20
        while "could not be started" not in http.get("/health").text and time.monotonic() < end:
            time.sleep(0.05)

        assert http.get("/health").status_code == 503
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200
        assert complete(http).status_code == 503


def test_sigterm_shuts_down_the_server_and_its_engine(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    with running_server(str(folder), "--device", "null", "--load-format", "dummy") as server:
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(20)

    assert status == 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def test_invalid_model_file_is_a_one_line_error(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    command = [sys.executable, "-m", "portalm.cli.main", "serve", str(tmp_path / "broken.gguf")]
    done = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 2
    assert "begins with b'not '" in done.stderr
    assert "Traceback" not in done.stderr

"""use_beam_search over HTTP gives the same results as LLM.beam_search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from portalm import LLM, BeamSearchParams
from tests.server.conftest import RunningServer, make_model_folder, running_server

FLAGS = ("--device", "cpu", "--load-format", "dummy", "--dtype", "float32")
PROMPTS = [[5, 6, 7], list(range(10, 40))]
BEAMS = {"use_beam_search": True, "n": 3, "max_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("beams") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with running_server(str(folder), *FLAGS) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_completions_match_offline_beam_search(folder: Path, http: httpx.Client) -> None:
    body = {**BEAMS, "prompt": PROMPTS, "return_token_ids": True, "length_penalty": 0.5}
    choices = http.post("/v1/completions", json=body).json()["choices"]

    llm = LLM(str(folder), device="cpu", load_format="dummy", dtype="float32", use_tqdm=False)
    params = BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=0.5)
    outputs = llm.beam_search(PROMPTS, params)
    expected = [
        sequence.tokens[len(prompt) :]
        for prompt, output in zip(PROMPTS, outputs, strict=True)
        for sequence in output.sequences
    ]
    assert [choice["token_ids"] for choice in choices] == expected
    assert [choice["index"] for choice in choices] == list(range(6))
    assert choices[0]["text"] == outputs[0].sequences[0].text


def test_chat_completions_support_beam_search(http: httpx.Client) -> None:
    body = {**BEAMS, "messages": [{"role": "user", "content": "w5 w6"}]}
    answer = http.post("/v1/chat/completions", json=body).json()

    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(texts) == 3
    assert len(set(texts)) > 1
    assert answer["usage"]["completion_tokens"] <= 24


def test_a_search_counts_as_one_request(server: RunningServer, http: httpx.Client) -> None:
    def num_ended() -> float:
        text = http.get("/metrics").text
        lines = [x for x in text.splitlines() if x.startswith("portalm:request_success_total{")]
        return sum(float(line.split()[-1]) for line in lines)

    before = num_ended()
    http.post("/v1/completions", json={**BEAMS, "prompt": PROMPTS[0]}).raise_for_status()

    assert num_ended() == before + 3  # one for each answer
    assert server.metric("kv_blocks_used") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stream": True}, "stream cannot be combined with use_beam_search"),
        ({"stop": "x"}, "stop cannot be combined with use_beam_search"),
        ({"temperature": 0.7}, "temperature cannot be combined with use_beam_search"),
        ({"n": 12}, "reduce it to 10"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "needs use_beam_search: true"),
        ({"length_penalty": 11.0}, "length_penalty must be a number from -10 to 10"),
    ],
)
def test_parameters_that_beam_search_does_not_support_are_rejected(
    http: httpx.Client, more: dict[str, object], message: str
) -> None:
    answer = http.post("/v1/completions", json={**BEAMS, "prompt": PROMPTS[0], **more})

    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]

"""Embeddings, scores and rankings over HTTP: an encoder, a cross-encoder, a pooled decoder."""

from __future__ import annotations

import base64
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from portalm.config import DEFAULT_ENCODER
from tests.server.conftest import RunningServer, running_server

FOOD, MEAL = "A man is eating food.", "Someone is having a meal."
MARKET = "The stock market fell sharply on Monday."


@pytest.fixture(scope="module")
def encoder(default_encoder: Path) -> Iterator[RunningServer]:
    flags = ("--device", "cpu", "--max-num-batched-tokens", "256", "--max-num-seqs", "64")
    with running_server(DEFAULT_ENCODER, *flags, "--served-model-name", "minilm") as server:
        yield server


@pytest.fixture
def http(encoder: RunningServer) -> Iterator[httpx.Client]:
    with encoder.client() as client:
        yield client


def error(response: httpx.Response) -> dict[str, str]:
    assert response.status_code == 400, response.text
    found: dict[str, str] = response.json()["error"]
    return found


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.model
def test_openai_sdk_embeddings_of_similar_texts_are_close(encoder: RunningServer) -> None:
    sdk = openai.OpenAI(base_url=f"{encoder.url}/v1", api_key="none", max_retries=0)

    answer = sdk.embeddings.create(model="minilm", input=[FOOD, MEAL, MARKET])  # sent as base64

    food, meal, market = (one.embedding for one in answer.data)
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert cosine(food, food) == pytest.approx(1, abs=1e-5)
    assert cosine(food, meal) > 0.6 > 0.2 > cosine(food, market)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 8 + 8 + 10
    assert encoder.metric("generation_tokens_total") == 0


@pytest.mark.model
def test_inputs_have_four_forms_and_vectors_two(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": FOOD}).json()["tokens"]
    bodies: list[dict[str, object]] = [{"input": one} for one in (FOOD, [FOOD], ids, [ids])]

    answers = [http.post("/v1/embeddings", json=body).json() for body in bodies]
    coded = http.post("/v1/embeddings", json={"input": FOOD, "encoding_format": "base64"}).json()

    [first, *others] = [answer["data"][0]["embedding"] for answer in answers]
    assert answers[0]["object"] == "list"
    assert answers[0]["data"][0]["object"] == "embedding"
    assert others == [first] * 3
    data = base64.b64decode(coded["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(first)}f", data)) == first


@pytest.mark.model
def test_vectors_and_texts_can_be_truncated(http: httpx.Client) -> None:
    whole = http.post("/v1/embeddings", json={"input": FOOD}).json()["data"][0]["embedding"]

    cut = http.post("/v1/embeddings", json={"input": FOOD, "dimensions": 8}).json()
    long = {"input": "word " * 400, "truncate_prompt_tokens": -1}
    truncated = http.post("/v1/embeddings", json=long).json()

    length = cosine(whole[:8], whole[:8]) ** 0.5
    assert cut["data"][0]["embedding"] == pytest.approx([x / length for x in whole[:8]], abs=1e-6)
    assert truncated["usage"]["prompt_tokens"] == 256


@pytest.mark.model
@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": []}, "input", "1 to 2048 texts, not 0"),
        ({"input": ["a"] * 2049}, "input", "not 2049"),
        ({"input": ["good", "word " * 400]}, "input", r"input[1]: the prompt has 402 tokens"),
        ({"input": [[5], [40000]]}, "input", "input[1]: prompt contains token id 40000"),
        ({"input": [[5], []]}, "input", "input[1]: the prompt is empty"),
        ({"input": "a", "dimensions": 385}, "dimensions", "the model's vectors (384)"),
        ({"input": "a", "dimensions": 0}, "dimensions", "at least 1"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "stream": True}, "stream", "unknown field"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_invalid_input_is_rejected_naming_its_place(
    http: httpx.Client, body: dict[str, object], param: str, message: str
) -> None:
    found = error(http.post("/v1/embeddings", json=body))

    assert message in found["message"]
    assert found["param"] == param


@pytest.mark.model
def test_generation_with_an_encoder_is_rejected(http: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}]}

    for path, body in (("chat/completions", chat), ("completions", {"prompt": "Hello"})):
        message = error(http.post(f"/v1/{path}", json=body))["message"]
        assert "does not generate text; it embeds text: use /v1/embeddings" in message
    assert http.get("/health/ready").status_code == 200


@pytest.mark.model
def test_pairs_are_scored_by_cosine_similarity(http: httpx.Client) -> None:
    one_to_many = {"text_1": FOOD, "text_2": [MEAL, MARKET]}
    one_to_one = {"queries": [FOOD, FOOD], "documents": [MEAL, MARKET]}

    answer = http.post("/score", json=one_to_many).json()

    near, far = (one["score"] for one in answer["data"])
    assert near > 0.6 > 0.2 > far
    assert [(one["index"], one["object"]) for one in answer["data"]] == [(0, "score"), (1, "score")]
    assert answer["usage"]["total_tokens"] == 8 + 8 + 10  # a repeated text counts once
    for path in ("/score", "/v1/score"):
        again = http.post(path, json=one_to_one).json()["data"]
        assert [one["score"] for one in again] == pytest.approx([near, far], abs=1e-6)


@pytest.mark.model
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1 has 2 texts and text_2 has 3"),
        ({"text_1": "a"}, "send either text_1 and text_2, or queries and documents"),
        ({"text_1": "a", "documents": "b"}, "send either text_1 and text_2"),
        ({"text_1": "a", "text_2": []}, "text_2 must not be empty"),
        ({"text_1": "a", "text_2": ["b", "word " * 400]}, "text_2[1]: the prompt has 402 tokens"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_texts_that_do_not_form_pairs_are_rejected(
    http: httpx.Client, body: dict[str, object], message: str
) -> None:
    assert message in error(http.post("/score", json=body))["message"]


@pytest.mark.model
def test_documents_are_ranked_best_first(http: httpx.Client) -> None:
    body = {"query": FOOD, "documents": [MARKET, {"text": MEAL}, "The weather is fine."]}

    for path in ("/rerank", "/v1/rerank"):
        results = http.post(path, json=body).json()["results"]
        assert results[0]["index"] == 1
        assert results[0]["document"] == {"text": MEAL}
        scores = [one["relevance_score"] for one in results]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 3
    [best] = http.post("/rerank", json={**body, "top_n": 1, "return_documents": False}).json()[
        "results"
    ]
    assert set(best) == {"index", "relevance_score"}
    assert "top_n" in error(http.post("/rerank", json={**body, "top_n": 0}))["message"]


@pytest.mark.model
def test_embeddings_survive_an_engine_crash(encoder: RunningServer) -> None:
    texts = [f"{i} " + "word " * 150 for i in range(16)]  # one text per step
    with encoder.client() as http:
        undisturbed = http.post("/v1/embeddings", json={"input": texts}).json()
        restarts = encoder.metric("engine_restarts_total")
        steps = encoder.metric("engine_steps_total")

        def kill_at_work() -> None:
            while encoder.metric("engine_steps_total") < steps + 2:
                time.sleep(0.01)
            os.kill(encoder.engine_pid(), signal.SIGKILL)

        killer = threading.Thread(target=kill_at_work)
        killer.start()

        disturbed = http.post("/v1/embeddings", json={"input": texts}).json()

        killer.join()
        assert encoder.metric("engine_restarts_total") == restarts + 1
        assert disturbed == undisturbed
        assert http.get("/health").status_code == 200


@pytest.mark.model
def test_client_disconnect_aborts_its_prompts(encoder: RunningServer) -> None:
    texts = [f"{i} " + "word " * 200 for i in range(100)]
    aborted = 'request_success_total{finished_reason="abort",model_name="minilm"}'
    with pytest.raises(httpx.ReadTimeout), encoder.client() as http:
        http.post("/v1/embeddings", json={"input": texts}, timeout=0.5)

    encoder.wait_for("num_requests_running", 0)
    with encoder.client() as http:
        end = time.monotonic() + 10
        while http.get("/load").json() != {"server_load": 0}:
            assert time.monotonic() < end
            time.sleep(0.05)
        metrics = http.get("/metrics").text
    [num_aborted] = re.findall(rf"^portalm:{re.escape(aborted)} (\S+)$", metrics, re.MULTILINE)
    assert float(num_aborted) > 0


# -- a cross-encoder, and a decoder -------------------------------------------------------------


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cross-encoder with random weights and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cross-encoder")
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, **{f"w{i}": i for i in range(3, 50)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32}
    config = BertConfig(
        vocab_size=50, num_hidden_layers=2, num_attention_heads=4, num_labels=1, **sizes
    )
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    return folder


def test_cross_encoder_scores_match_transformers(cross_encoder: Path) -> None:
    import torch
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(cross_encoder).eval()
    query, documents = "w3 w4", ["w5", "w6 w7 w8", " ".join(["w9"] * 40)]
    rows = [[1, 3, 4, 2, 5, 2], [1, 3, 4, 2, 6, 7, 8, 2], [1, 3, 4, 2, *[9] * 27, 2]]
    expected = []
    for row in rows:
        types = torch.tensor([[0] * 4 + [1] * (len(row) - 4)])
        with torch.inference_mode():
            logit = model(torch.tensor([row]), token_type_ids=types).logits[0, 0]
        expected.append(float(logit.sigmoid()))

    with running_server(str(cross_encoder), "--device", "cpu") as server, server.client() as http:
        body = {"text_1": query, "text_2": documents}
        too_long = error(http.post("/score", json=body))["message"]
        scored = http.post("/score", json={**body, "truncate_prompt_tokens": -1}).json()
        ranked = http.post("/rerank", json={"query": query, "documents": documents[:2]}).json()
        refused = error(http.post("/v1/embeddings", json={"input": "w3"}))["message"]

    assert "text_2[2]: the prompt has 45 tokens" in too_long
    assert [one["score"] for one in scored["data"]] == pytest.approx(expected, abs=1e-6)
    assert ranked["results"][0]["relevance_score"] == pytest.approx(max(expected[:2]), abs=1e-6)
    assert "does not embed text; it scores pairs of texts" in refused


def test_decoder_can_embed_as_well_as_generate(null_server: RunningServer) -> None:
    """The null device's hidden states begin with the token's id and position."""
    with null_server.client() as http:
        body = {"input": ["w5 w7", "w9"], "pooling": "mean", "normalize": False}

        vectors = [x["embedding"] for x in http.post("/v1/embeddings", json=body).json()["data"]]
        last = http.post("/v1/embeddings", json={**body, "pooling": "last"}).json()["data"]

        assert [vector[:2] for vector in vectors] == [[6, 0.5], [9, 0]]
        assert [one["embedding"][:2] for one in last] == [[7, 1], [9, 0]]
        assert http.post("/v1/completions", json={"prompt": "w5"}).status_code == 200
        assert null_server.metric("kv_blocks_used") == 0

"""Chunks of a completion: the prompt's chunk is sent first, in whatever order deltas arrive."""

from __future__ import annotations

from pathlib import Path

from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.outputs import Logprob, RequestMetrics
from portalm.server.replies.completion_choice import ChoiceShape
from portalm.server.replies.completion_stream import CompletionStream
from portalm.server.schemas.completions import CompletionRequest
from portalm.text import load_tokenizer
from tests.server.conftest import BYTE_0, make_byte_model_folder


def test_deltas_wait_for_the_prompt_logprobs(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_byte_model_folder(tmp_path / "tiny"))
    body = CompletionRequest(prompt="xy", n=2, echo=True, logprobs=0, stream=True)
    shape = ChoiceShape(body=body, params=body.params(), tokenizer=tokenizer)
    x, y, a = (BYTE_0 + ord(c) for c in "xya")
    one = ProcessedInput(request_id="r", prompt="xy", prompt_token_ids=[x, y], requests=[])
    stream = CompletionStream(shape, {}, [one])

    def delta(index: int, **more: object) -> AnswerDelta:
        logprobs = [{a: Logprob(-1.0, 1)}]
        return AnswerDelta(
            request_id="r", index=index, text="a", token_ids=[a], logprobs=logprobs,
            metrics=RequestMetrics(arrival_time=0.0), **more,
        )  # fmt: skip

    early = list(stream.chunks(0, delta(1)))
    late = list(stream.chunks(0, delta(0, prompt_logprobs=[None, {y: Logprob(-2.0, 1)}])))

    choices = [(c["index"], c["text"]) for chunk in late for c in chunk["choices"]]
    assert early == []
    assert choices == [(0, "xy"), (0, "a"), (1, "xy"), (1, "a")]
    for first in (late[0], late[2]):
        assert first["choices"][0]["logprobs"]["token_logprobs"] == [None, -2.0]

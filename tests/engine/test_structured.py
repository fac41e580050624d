"""Random weights whose answers must match a grammar, in batches and despite failures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from portalm import LLM, SamplingParams
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest
from portalm.errors import BackendError, InvalidRequest
from portalm.sampling_params import StructuredOutputs
from portalm.structured.messages import LoadGrammar
from tests.tiny import add_byte_tokenizer, make_config_folder, run, tokens

PHONE = r"\d{3}-\d{4}"
PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["a", "b", "yes"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["age", "kind", "flags"],
}


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["age", "kind", "flags"]
        and 0 <= person["age"] <= 999
        and person["kind"] in ("a", "b", "yes")
        and all(isinstance(flag, bool) for flag in person["flags"])
    )


CHECKS: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {
    "json": ({"json": PERSON}, is_person),
    "regex": ({"regex": PHONE}, lambda text: re.fullmatch(PHONE, text)),
    "choice": ({"choice": ("yes", "no", "true")}, lambda text: text in ("yes", "no", "true")),
    "grammar": (
        {"grammar": 'root ::= "(" root ")" | [0-9]'},
        lambda text: re.fullmatch(r"(\(*)\d(\)*)", text) and text.count("(") == text.count(")"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_byte_tokenizer(make_config_folder(tmp_path_factory.mktemp("structured") / "tiny"))


def make_llm(folder: Path, **settings: Any) -> LLM:
    return LLM(
        str(folder), load_format="dummy", max_num_seqs=16, max_num_batched_tokens=64,
        use_tqdm=False, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    yield make_llm(folder)


def params(name: str | None, seed: int, **more: Any) -> SamplingParams:
    asked = None if name is None else StructuredOutputs(**CHECKS[name][0])
    return SamplingParams(**{"max_tokens": 64, "seed": seed, "structured_outputs": asked, **more})


MIXED = [(name, seed) for seed in range(6) for name in (*CHECKS, None)]
PROMPTS = [f"number {i}" for i in range(len(MIXED))]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """The answer to each of the mixed requests when nothing else runs."""
    return [
        llm.generate(prompt, params(*one), use_tqdm=False)[0].outputs[0].token_ids
        for prompt, one in zip(PROMPTS, MIXED, strict=True)
    ]


def test_every_answer_matches_and_is_the_same_alone_and_in_a_mixed_batch(llm, alone) -> None:
    outputs = llm.generate(PROMPTS, [params(*one) for one in MIXED], use_tqdm=False)

    for (name, _), output in zip(MIXED, outputs, strict=True):
        [answer] = output.outputs
        if name is not None and answer.finish_reason == "stop":
            assert CHECKS[name][1](answer.text), (name, answer.text)
    finished = [o.outputs[0].finish_reason for o, (n, _) in zip(outputs, MIXED, strict=True) if n]
    assert finished.count("stop") > 0.8 * len(finished)  # a grammar may allow long answers
    assert [output.outputs[0].token_ids for output in outputs] == alone


def test_preemption_changes_no_token(folder: Path, llm: LLM, alone: list[list[int]]) -> None:
    small = make_llm(
        folder, max_model_len=160, num_gpu_blocks_override=13, enable_prefix_caching=False
    )

    outputs = small.generate(PROMPTS, [params(*one) for one in MIXED], use_tqdm=False)

    assert small.get_metrics().preemptions_total > 0
    assert [output.outputs[0].token_ids for output in outputs] == alone


def add(llm: LLM, index: int, **changes: Any) -> AddRequest:
    """Add one of the mixed requests to the engine, as a client would."""
    wanted = params(*MIXED[index])
    assert wanted.structured_outputs is not None
    grammar = llm._compiler.compile(wanted.structured_outputs).result()
    processed = llm._inputs.process(str(index), PROMPTS[index], wanted, grammar=grammar)
    vocabulary = llm._compiler.vocabulary
    llm.engine.load_grammar(
        LoadGrammar(key=grammar.key, data=grammar.data, vocabulary=vocabulary, forget=[])
    )
    message = msgspec.structs.replace(processed.requests[0], **changes)
    llm.engine.add(message)
    return message


def test_a_resumed_answer_continues_after_its_tokens(llm: LLM, alone: list[list[int]]) -> None:
    for index in (0, 1, 2):
        for cut in range(1, len(alone[index])):
            add(llm, index, output_token_ids=alone[index][:cut])

            assert tokens(run(llm.engine)) == {str(index): alone[index][cut:]}


def test_a_step_that_fails_changes_no_token_of_the_others(
    llm: LLM, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch, num_steps = llm.engine.runner.dispatch, 0

    def failing(plan):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 6:
            raise BackendError("kernel", "planted")
        return dispatch(plan)

    monkeypatch.setattr(llm.engine.runner, "dispatch", failing)
    for index in (0, 1, 5):
        add(llm, index)

    outputs = run(llm.engine)

    sampled = tokens(outputs)
    failed = [name for name, many in outputs.items() if many[-1].finish_reason == "error"]
    assert len(failed) == 1
    for name in sampled.keys() - set(failed):
        assert sampled[name] == alone[int(name)]


def test_the_end_of_a_grammar_ends_an_answer_that_ignores_eos(llm: LLM) -> None:
    asked = params("regex", 1, ignore_eos=True, min_tokens=30)

    [answer] = llm.generate("x", asked, use_tqdm=False)[0].outputs

    assert re.fullmatch(PHONE, answer.text)
    assert answer.finish_reason == "stop"


def test_a_request_without_an_allowed_token_fails_alone(llm: LLM) -> None:
    impossible = params("regex", 1, allowed_token_ids=[100])

    bad, good = llm.generate(["x", "y"], [impossible, params("regex", 1)], use_tqdm=False)

    assert bad.outputs[0].finish_reason == "error"
    assert bad.error is not None and "no token is left" in bad.error
    assert re.fullmatch(PHONE, good.outputs[0].text)


def test_answers_to_one_prompt_differ_and_all_match(llm: LLM) -> None:
    [output] = llm.generate("x", params("regex", 7, n=4), use_tqdm=False)

    texts = {answer.text for answer in output.outputs}
    assert len(texts) > 1
    assert all(re.fullmatch(PHONE, text) for text in texts)


def test_a_bad_grammar_is_refused_before_anything_runs(llm: LLM) -> None:
    bad = SamplingParams(structured_outputs=StructuredOutputs(regex="(a"))

    with pytest.raises(InvalidRequest, match="parenthesis"):
        llm.generate(["x", "y"], [params("regex", 0), bad], use_tqdm=False)
    assert not llm.engine.has_work()


def test_a_request_that_waits_for_its_grammar_can_be_aborted(llm: LLM) -> None:
    engine: Engine = llm.engine
    add(llm, 0)
    assert engine.stats().num_waiting == 1

    [output] = engine.abort(["0"])

    assert output.finish_reason == "abort"
    assert not engine.has_work()

"""Beam search compared with transformers, on a tiny checkpoint that transformers saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from portalm import LLM, BeamSearchParams
from portalm.engine.beam_search import Beam, BeamSearch
from portalm.errors import InvalidRequest
from tests.tiny import VOCAB_SIZE, add_byte_tokenizer

EOS = 2
PROMPTS = [[5, 6, 7], list(range(10, 50)), [300]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint folder and the model in transformers; its answers sometimes end early."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.lm_head.weight.data[EOS] *= 2.5
    folder = tmp_path_factory.mktemp("beams")
    model.save_pretrained(folder)
    return add_byte_tokenizer(folder), model


@pytest.fixture(scope="module")
def llm(model: tuple[Path, Any]) -> Iterator[LLM]:
    yield LLM(str(model[0]), device="cpu", dtype="float32", use_tqdm=False)


def beams_of_transformers(model: Any, prompt: list[int], **settings: Any) -> list[tuple]:
    width = settings["num_beams"]
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, num_return_sequences=width,
        return_dict_in_generate=True, output_scores=True, **settings,
    )  # fmt: skip
    found = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        tokens = row[len(prompt) :]
        end = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        found.append((tokens[:end], score))
    return found


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("width", "length_penalty"), [(2, 1.0), (5, 1.0), (3, 2.5), (3, -1.0)])
def test_beams_equal_those_of_transformers(
    llm: LLM, model: tuple[Path, Any], width: int, length_penalty: float, early_stopping: Any
) -> None:
    settings = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    params = BeamSearchParams(beam_width=width, max_tokens=12, **settings)

    outputs = llm.beam_search(PROMPTS, params)

    reasons = set()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = beams_of_transformers(
            model[1], prompt, num_beams=width, max_new_tokens=12, **settings
        )
        assert [s.tokens[len(prompt) :] for s in output.sequences] == [e[0] for e in expected]
        for sequence, (_, score) in zip(output.sequences, expected, strict=True):
            assert sequence.score == pytest.approx(score, rel=1e-4)
            reasons.add(sequence.finish_reason)
    assert "stop" in reasons


def test_one_beam_is_greedy(llm: LLM, model: tuple[Path, Any]) -> None:
    [output] = llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=1, max_tokens=6))

    greedy = model[1].generate(torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=6)[0]
    [only] = output.sequences
    assert only.tokens == greedy.tolist()
    assert only.text == llm.get_tokenizer().decode(only.tokens[3:])


def test_end_of_sequence_may_be_ignored(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)

    [output] = llm.beam_search(PROMPTS[1], params)

    assert {s.finish_reason for s in output.sequences} == {"length"}
    assert all(len(s.tokens) == len(PROMPTS[1]) + 12 for s in output.sequences)


def test_max_model_len_ends_beams(llm: LLM) -> None:
    prompt = [5] * 253
    [output] = llm.beam_search(
        [prompt], BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True)
    )

    assert [len(s.tokens) for s in output.sequences] == [256, 256]


def test_beams_leak_no_blocks(llm: LLM) -> None:
    llm.beam_search(PROMPTS, BeamSearchParams(beam_width=4, max_tokens=20))

    assert llm.get_metrics().num_used_blocks == 0
    assert llm.get_metrics().prefix_hits_total > 0


def test_a_finished_beam_is_replaced_only_by_a_better_one() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=5), {9}, room=100)
    search.advance([[(9, -0.1), (1, -1.0), (2, -2.0), (3, -3.0)]])
    search.advance([[(9, -0.1), (4, -0.2)], [(5, -9.0), (6, -9.5)]])

    assert [b.token_ids for b in search.best()] == [(9,), (1, 9)]
    assert search.running == []  # -1.2 / 2 is worse than both


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beam_width": 0}, "beam_width must be an integer of at least 1"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens must be"),
        ({"beam_width": 2, "length_penalty": "x"}, "length_penalty must be a number"),
        ({"beam_width": 2, "early_stopping": "soon"}, "early_stopping must be"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        BeamSearchParams(**values)


def test_more_beams_than_likely_tokens_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"needs the 22 most likely tokens .* reduce it to 10"):
        llm.beam_search([[5]], BeamSearchParams(beam_width=11))


def test_a_search_starts_with_only_the_prompt() -> None:
    assert BeamSearch(BeamSearchParams(beam_width=3), (), room=100).running == [Beam()]

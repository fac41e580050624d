"""ci/model_sweep.py distinguishes matches, refusals and wrong answers."""

from __future__ import annotations

import json

import pytest

from ci.model_sweep import BEGIN, CONFIGS, END, PAGE, Result, architectures, sweep, table
from portalm.models.gpt_neox import GPTNeoX


@pytest.mark.parametrize(
    ("name", "detail"), [("LlamaForCausalLM", "own"), ("OlmoForCausalLM", "transformers")]
)
def test_a_match_names_the_code_that_runs_the_model(name: str, detail: str) -> None:
    assert sweep(name) == Result(name, "match", detail)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Llama4ForCausalLM", "the mask of layer 0 is not causal"),
        ("Qwen3_5ForCausalLM", "it has layers with a recurrent or convolutional state"),
        ("DeepseekV32ForCausalLM", "its attention reads only the tokens that an index chooses"),
        ("MptForCausalLM", "its attention cannot be replaced"),
    ],
)
def test_a_refusal_has_a_reason(name: str, reason: str) -> None:
    result = sweep(name)

    assert result.status == "refused" and result.detail.startswith(reason)


def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 without the check of its masks."""
    monkeypatch.setattr("portalm.models.transformers_model.check_model", lambda *_: None)

    result = sweep("Llama4ForCausalLM")

    assert result.status == "wrong" and result.detail.endswith("of 112 tokens")


def test_an_exception_of_another_kind_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portalm.models.decoder.Decoder.spec", None)

    assert sweep("LlamaForCausalLM").status == "crashed"


def test_published_values_are_compared_under_their_own_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = json.loads((CONFIGS / "pythia-1b.json").read_text())
    assert sweep("GPTNeoXForCausalLM", values) == Result("GPTNeoXForCausalLM", "match", "own")

    # a family that reads the wrong key for rotary_emb_base
    monkeypatch.setattr(GPTNeoX, "names", {"rope_theta": ("vocab_size",)})
    assert sweep("GPTNeoXForCausalLM", values).status == "wrong"


def test_every_published_config_names_an_architecture_of_transformers() -> None:
    import transformers

    names = [json.loads(path.read_text())["architectures"][0] for path in CONFIGS.glob("*.json")]

    assert names and all(hasattr(transformers, name) for name in names)


def test_reasons_are_grouped_and_counted() -> None:
    results = [
        Result("AForCausalLM", "match", "own"),
        Result("BForCausalLM", "refused", "the mask of layer 0 is not causal"),
        Result("CForCausalLM", "refused", "the mask of layer 3 is not causal"),
    ]

    first, *lines = table(results)

    assert "1 match, 2 are refused and 0 are wrong" in first
    assert "**Refused**, the mask of a layer is not causal (2): B, C." in lines


def test_the_page_lists_every_architecture() -> None:
    section = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    names = set(section.replace(",", " ").replace(".", " ").split())

    missing = {n.removesuffix("ForCausalLM") for n in architectures()} - names
    assert not missing, "run `python ci/model_sweep.py write`"
    assert "0 are wrong" in " ".join(section.split())

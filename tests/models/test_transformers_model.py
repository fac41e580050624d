"""Decoders without a family file run through transformers' code, with the same answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.helium.modeling_helium import HeliumRotaryEmbedding
from transformers.utils.logging import get_verbosity

from portalm.backend import AttentionSpec
from portalm.errors import CheckpointError, Unsupported, UnsupportedModel
from portalm.models import registry
from portalm.models.transformers_attention import register
from portalm.models.transformers_check import _attended, check_model
from tests.models.test_families import CASES, NUM_OUT, PROMPTS, Case, engine_of
from tests.tiny import ask, make_config_folder, run, tokens

OTHERS = {
    "olmo3": Case("Olmo3", {"sliding_window": 24}),
    "helium": Case("Helium", {"head_dim": 16}),
    "phimoe": Case("Phimoe", {"num_local_experts": 4, "sliding_window": None}),
}
FAMILIES = ("gemma2", "glm4", "gpt_oss", "granite")
"""Families with caps, windows, partial rotary embedding, sinks, experts or scaled logits, run as
if they had no file."""


@pytest.mark.parametrize(
    ("name", "device"),
    [*((name, "reference") for name in OTHERS), *((name, "cpu") for name in (*FAMILIES, "olmo3"))],
)
def test_answers_equal_transformers(
    tmp_path: Path, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = OTHERS.get(name) or CASES[name]
    monkeypatch.delitem(registry.ARCHITECTURES, f"{case.family}ForCausalLM", raising=False)
    model = case.make()
    model.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, device=device, max_model_len=200)

    for key, prompt in PROMPTS.items():
        ask(engine, key, prompt, max_tokens=NUM_OUT)
    sampled = tokens(run(engine))
    for key, prompt in PROMPTS.items():
        ask(engine, key, prompt)
    again = tokens(run(engine))

    assert engine.stats().prefix_hits_total > 0
    assert again == {key: sampled[key][:8] for key in sampled}
    for key, prompt in PROMPTS.items():
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sampled[key]])).logits[0]
        assert sampled[key] == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), key


LLAMA4 = {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            Case("Llama4", {**LLAMA4, "attention_chunk_size": 64}, config="{}TextConfig"),
            "the mask of layer 0 is not causal$",
        ),
        (
            Case(  # temperature tuning counts positions from transformers' cache
                "Llama4",
                {
                    **LLAMA4,
                    "attn_temperature_tuning": True,
                    "floor_scale": 64,
                    "layer_types": ["full_attention"] * 2,
                    "no_rope_layers": [0, 0],
                },
                config="{}TextConfig",
            ),
            "differ from those of its own attention for a prompt computed in chunks",
        ),
        (
            Case("Phimoe", {"num_local_experts": 4, "sliding_window": 64}),
            "the mask of layer 0 is not causal$",
        ),
    ],
    ids=["chunks", "temperature tuning", "window of the mask alone"],
)
def test_masks_and_positions_that_attention_does_not_get_are_refused(
    tmp_path: Path, case: Case, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(registry.ARCHITECTURES, f"{case.family}ForCausalLM", raising=False)
    case.make().save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match=message):
        engine_of(tmp_path, device="reference")


def test_llama4_without_chunks_and_temperature_tuning_equals_transformers(tmp_path: Path) -> None:
    off = {"attn_temperature_tuning": False, "layer_types": ["full_attention"] * 2}
    model = Case("Llama4", {**LLAMA4, **off}, config="{}TextConfig").make()
    model.save_pretrained(tmp_path)
    engine = engine_of(tmp_path, device="reference")

    ask(engine, "a", PROMPTS["33"])

    [sampled] = tokens(run(engine)).values()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS["33"] + sampled])).logits[0]
    assert sampled == logits[32:-1].argmax(-1).tolist()


def _wrong_window(q: Any, k: Any, v: Any, spec: AttentionSpec, sinks: Any) -> torch.Tensor:
    return _attended(q, k, v, replace(spec, sliding_window=None), sinks)


def _wrong_positions(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
    return HELIUM_ROPE(self, x, torch.arange(position_ids.shape[1])[None])


HELIUM_ROPE = HeliumRotaryEmbedding.forward


@pytest.mark.parametrize(
    ("name", "place", "fault", "message"),
    [
        (
            "olmo3",
            "portalm.models.transformers_check._attended",
            _wrong_window,
            "a prompt computed whole",
        ),
        (
            "helium",
            "transformers.models.helium.modeling_helium.HeliumRotaryEmbedding.forward",
            _wrong_positions,
            "a prompt computed in chunks",
        ),
    ],
)
def test_the_check_finds_planted_faults(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    place: str,
    fault: Callable[..., Any],
    message: str,
) -> None:
    case = OTHERS[name]
    monkeypatch.delitem(registry.ARCHITECTURES, f"{case.family}ForCausalLM", raising=False)
    case.make().save_pretrained(tmp_path)
    monkeypatch.setattr(place, fault)

    with pytest.raises(UnsupportedModel, match=message):
        engine_of(tmp_path, device="reference")


def test_the_check_changes_no_global_state() -> None:
    state = lambda: (  # noqa: E731
        torch.get_num_threads(), torch.random.get_rng_state().tolist(), get_verbosity()
    )  # fmt: skip
    model = OTHERS["helium"].make()
    register()
    before = state()

    check_model(type(model), model.config)

    assert state() == before


def test_one_warning_says_that_transformers_code_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    OTHERS["helium"].make().save_pretrained(tmp_path)

    engine_of(tmp_path, device="reference")

    warnings = [r.message for r in caplog.records if "transformers' code" in r.message]
    assert len(warnings) == 1 and "HeliumForCausalLM" in warnings[0]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    OTHERS["helium"].make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' is missing"):
        engine_of(tmp_path, device="reference")


def test_quantization_is_refused(tmp_path: Path) -> None:
    OTHERS["helium"].make().save_pretrained(tmp_path)

    with pytest.raises(Unsupported, match="does not support quantized weights"):
        engine_of(tmp_path, device="cpu", quantization="int8")


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("MptForCausalLM", {"model_type": "mpt"}, "cannot be replaced"),
        ("MambaForCausalLM", {"model_type": "mamba"}, "a recurrent or convolutional state"),
        ("VaxForCausalLM", {}, "no decoder with that name; supported: .*LlamaForCausalLM"),
        ("HeliumForCausalLM", {"model_type": "vax"}, "has no model_type 'vax'"),
        (
            "HeliumForCausalLM",
            {"model_type": "helium", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "its rotary embedding depends",
        ),
    ],
)
def test_a_model_that_cannot_run_is_refused_with_the_reason(
    tmp_path: Path, architecture: str, values: dict[str, Any], message: str
) -> None:
    folder = make_config_folder(tmp_path, architectures=[architecture], **values)

    with pytest.raises(UnsupportedModel, match=message):
        engine_of(folder, device="reference", load_format="dummy")

"""GGUF files of other families than Llama, named and converted as llama.cpp does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from portalm.config import EngineConfig, ModelConfig
from portalm.errors import UnsupportedModel
from portalm.layers.rope import cos_sin_table
from portalm.models.loader import open_checkpoint
from portalm.models.loader.gguf import GGUFCheckpoint
from portalm.models.registry import model_class
from tests.models.gguf_writer import write_gguf
from tests.models.test_families import CASES, PROMPTS, engine_of
from tests.tiny import ask, run, tokens


@dataclass(frozen=True)
class File:
    """A family's file: its general.architecture, its case, and what files cannot say otherwise."""

    name: str
    case: str
    changes: dict[str, Any] = field(default_factory=dict)
    is_old: bool = False

    def make(self) -> Any:
        case = CASES[self.case]
        return replace(case, changes={**case.changes, **self.changes}).make()


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "mscale": 0.8,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 64,
}
KNOWN = [
    File("qwen2", "qwen2"),
    File("qwen3", "qwen3"),
    File("smollm3", "smollm3", {"no_rope_layer_interval": 4}),
    File("granite", "granite"),
    File("gemma", "gemma"),
    # the head size
    File("gemma2", "gemma2", {"query_pre_attn_scalar": 32}),
    File("gemma3", "gemma3", {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6}),
]
"""Whose tensors and shapes say all."""
FILES = [
    File("llama", "mixtral"),
    File("qwen2moe", "qwen2 moe"),
    File("qwen3moe", "qwen3 moe", {"mlp_only_layers": []}),
    File("gpt-oss", "gpt_oss", {"swiglu_limit": 7.0}),
    File("deepseek2", "deepseek v2", is_old=True),
    File("deepseek2", "deepseek v2"),
    File("deepseek2", "deepseek v2 with groups"),
    File("deepseek2", "deepseek v3", {"attention_bias": False, "rope_scaling": YARN}),
    File("phi3", "phi3"),
    File("phi3", "phi4"),
    File("olmo2", "olmo2"),
    File("starcoder2", "starcoder2", {"sliding_window": 4096}),
    File("command-r", "cohere"),
    File("command-r", "command r+"),
    File("cohere2", "cohere2"),
    File("falcon", "falcon"),
    File("falcon", "falcon 40b"),
    File("falcon", "falcon 11b"),
    File("gptneox", "gpt_neox"),
    File("gptneox", "gpt_neox, one after the other"),
    File("gpt2", "gpt2"),
]
"""Of which also answers are compared."""


def convert(folder: Path, file: File, model: Any, **options: Any) -> tuple[Any, Path]:
    """The model as transformers saves it, opened, and its GGUF file."""
    model.save_pretrained(folder)
    saved = open_checkpoint(folder, EngineConfig(model=str(folder)))
    tensors = {n: saved.tensor(n) for n in saved.names()}
    path = folder / "a.gguf"
    return saved, write_gguf(path, file.name, model.config, tensors, is_old=file.is_old, **options)


def shape_of(config: ModelConfig) -> str:
    """All that a model is but its weights and rotations; numbers as precise as float32."""
    model = model_class(config.architecture)(config, "float32")
    parts = (
        model.attention_specs(),
        [getattr(model, name) for name in ("embedding_scale", "logit_scale", "logit_cap")],
        (config.norm_eps, config.max_position, config.tie_word_embeddings),
    )
    return re.sub(r"\d+\.\d+(e-\d+)?|\de-\d+", lambda m: f"{float(m.group()):.5g}", str(parts))


def rotations_of(config: ModelConfig) -> list[torch.Tensor]:
    model = model_class(config.architecture)(config, "float32")
    return [
        cos_sin_table(rope, head_size=config.head_size, max_position=config.max_position)
        for rope in model.ropes()
    ]


@pytest.mark.parametrize("file", KNOWN + FILES, ids=lambda f: f"{f.case}{' old' * f.is_old}")
def test_a_gguf_file_is_the_model_it_was_made_of(tmp_path: Path, file: File) -> None:
    model = file.make()
    saved, path = convert(tmp_path, file, model)

    converted = GGUFCheckpoint(path, {})

    assert shape_of(converted.config) == shape_of(saved.config)
    torch.testing.assert_close(
        rotations_of(converted.config), rotations_of(saved.config), atol=1e-4, rtol=0
    )
    if file.name != "gpt-oss":  # its experts have other names
        assert set(converted.names()) == set(saved.names())
        for hf_name in saved.names():
            torch.testing.assert_close(
                converted.tensor(hf_name), saved.tensor(hf_name), atol=1e-6, rtol=0
            )
    if file in FILES:
        assert_answers(path, model)


def assert_answers(path: Path, model: Any) -> None:
    """Tokens are those of transformers."""
    engine = engine_of(path, device="cpu", dtype="float32", max_model_len=128)
    ask(engine, "a", PROMPTS["33"], max_tokens=16)
    [drawn] = tokens(run(engine)).values()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS["33"] + drawn])).logits[0]
    assert drawn == logits[32:-1].argmax(-1).tolist()


def test_an_architecture_that_is_not_known_names_those_that_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "bloom")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(UnsupportedModel, match="'bloom' is not supported; supported: llama, qwen2"):
        GGUFCheckpoint(tmp_path / "a.gguf", {})

"""GGUF files of all families except Llama, written as llama.cpp's converter does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from portalm.backend import QuantizedWeight
from portalm.config import EngineConfig, ModelConfig
from portalm.errors import CheckpointError, UnsupportedModel
from portalm.layers.rope import cos_sin_table
from portalm.models.loader import Checkpoint, open_checkpoint
from portalm.models.loader.gguf import GGUFCheckpoint
from portalm.models.loader.gguf_families import FAMILIES, find_family
from portalm.models.registry import model_class
from portalm_backends.reference.backend import ReferenceBackend
from tests.models.gguf_writer import write_gguf
from tests.models.test_families import CASES, PROMPTS, engine_of
from tests.tiny import ask, run, tokens


@dataclass(frozen=True)
class File:
    """A GGUF file: its general.architecture, its case, and changes for what GGUF cannot store."""

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
    # GGUF files do not store it: it is the head size
    File("gemma2", "gemma2", {"query_pre_attn_scalar": 32}),
    File("gemma3", "gemma3", {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6}),
]
"""Files whose weights and config are compared."""
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
    File("olmoe", "olmoe", {"norm_topk_prob": False}),
    File("seed_oss", "seed oss"),
    File("nemotron", "nemotron"),
    File("stablelm", "stablelm"),
    File("stablelm", "stablelm 12b"),
    File("ernie4_5", "ernie"),
    File("hunyuan-dense", "hunyuan"),
    File("phi2", "phi"),
    File("arcee", "arcee"),
    File("exaone4", "exaone4"),
    File("exaone4", "exaone4 without a window"),
    File("glm4", "glm4"),
    File("granitemoe", "granite moe"),
    File("granitemoe", "granite moe, shared"),
    File("gptneox", "gpt_neox"),
    File("gptneox", "gpt_neox, one after the other"),
    File("gpt2", "gpt2"),
]
"""Files whose answers are compared too."""


def convert(folder: Path, file: File, model: Any, **options: Any) -> tuple[Any, Path]:
    """Save the model with transformers and as GGUF; return the opened checkpoint and the file."""
    model.save_pretrained(folder)
    saved = open_checkpoint(folder, EngineConfig(model=str(folder)))
    tensors = {n: saved.tensor(n) for n in saved.names()}
    path = folder / "a.gguf"
    return saved, write_gguf(path, file.name, model.config, tensors, is_old=file.is_old, **options)


def shape_of(config: ModelConfig) -> str:
    """Text of all a model's settings except rotary ones, with numbers in float32 precision."""
    model = model_class(config.architecture)(config, "float32")
    parts = (
        model.attention_specs(),
        [getattr(model, name) for name in ("embedding_scale", "logit_scale", "logit_cap")],
        (config.norm_eps, config.max_position, config.tie_word_embeddings),
    )
    return re.sub(r"\d+\.\d+(e-\d+)?|\de-\d+", lambda m: f"{float(m.group()):.5g}", str(parts))


def loaded(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """All weights of the model in float32, as the reference backend holds them, without ropes."""
    model = model_class(checkpoint.config.architecture)(checkpoint.config, "float32")
    weights = model.load(checkpoint, ReferenceBackend())
    return list(tensors_in({name: part for name, part in weights.items() if name != "ropes"}))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor within dicts, lists, tuples and dataclasses, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name))


def rotations_of(config: ModelConfig) -> list[torch.Tensor]:
    model = model_class(config.architecture)(config, "float32")
    return [
        cos_sin_table(rope, head_size=config.head_size, max_position=config.max_position)
        for rope in model.ropes()
    ]


@pytest.mark.parametrize("file", KNOWN + FILES, ids=lambda f: f"{f.case}{' old' * f.is_old}")
def test_a_gguf_file_holds_the_model_that_it_was_converted_from(tmp_path: Path, file: File) -> None:
    model = file.make()
    saved, path = convert(tmp_path, file, model)

    converted = GGUFCheckpoint(path, {})

    assert shape_of(converted.config) == shape_of(saved.config)
    torch.testing.assert_close(
        rotations_of(converted.config), rotations_of(saved.config), atol=1e-4, rtol=0
    )
    form = converted.form  # a file may have a tensor for each expert, and one for all norms
    if not (form.has_separate_experts or form.has_stacked_norms):
        assert set(converted.names()) == set(saved.names())
    for actual, expected in zip(loaded(converted), loaded(saved), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    if file in FILES:
        assert_answers(path, model)


def assert_answers(path: Path, model: Any, **settings: Any) -> None:
    """Check that greedy tokens equal transformers'."""
    engine = engine_of(path, device="cpu", dtype="float32", max_model_len=128, **settings)
    ask(engine, "a", PROMPTS["33"], max_tokens=16)
    [sampled] = tokens(run(engine)).values()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS["33"] + sampled])).logits[0]
    assert sampled == logits[32:-1].argmax(-1).tolist()


def test_gemma_norm_weights_lose_no_precision(tmp_path: Path) -> None:
    file = File("gemma", "gemma")
    _, path = convert(tmp_path, file, file.make())
    small = np.float32(1e-9)  # subtracting 1 and adding it again would make this 0
    stored = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "output_norm.weight")
    stored.data[0] = small

    checkpoint = GGUFCheckpoint(path, {})
    model = model_class(checkpoint.config.architecture)(checkpoint.config, "float32")

    assert model.load(checkpoint, ReferenceBackend())["norm"].weight[0] == small


def test_quantized_linear_weights_of_gpt2_stay_quantized(tmp_path: Path) -> None:
    file = next(f for f in FILES if f.name == "gpt2")
    model = file.make()
    for name, parameter in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):  # [K, N]
            rows = np.ascontiguousarray(parameter.data.T.numpy())
            values = dequantize(quantize(rows, Kind.Q8_0), Kind.Q8_0)
            parameter.data = torch.from_numpy(values).T.contiguous()
    _, path = convert(tmp_path, file, model, linear=Kind.Q8_0)

    weight = GGUFCheckpoint(path, {}).weight("transformer.h.0.attn.c_attn.weight")

    assert isinstance(weight, QuantizedWeight)
    assert weight.shape == (192, 64)
    assert_answers(path, model)


# -- experts ----------------------------------------------------------------------------------

MIXTRAL, GPT_OSS = FILES[0], FILES[3]
STACK = "blk.1.ffn_up_exps.weight"


def rounded_experts(model: Any, kind: Kind) -> None:
    """Round the experts of `model` to values that the type can hold exactly."""
    for name, parameter in model.named_parameters():
        if ".experts." in name and not name.endswith("bias"):
            is_by_columns = model.config.model_type == "gpt_oss"
            rows = parameter.data.swapaxes(-1, -2) if is_by_columns else parameter.data
            values = dequantize(quantize(np.ascontiguousarray(rows.numpy()), kind), kind)
            exact = torch.from_numpy(values.reshape(rows.shape))
            parameter.data = exact.swapaxes(-1, -2).contiguous() if is_by_columns else exact


@pytest.mark.parametrize(
    ("file", "kind"), [(MIXTRAL, Kind.Q8_0), (GPT_OSS, Kind.MXFP4)], ids=["q8_0", "mxfp4"]
)
def test_quantized_experts_stay_quantized(tmp_path: Path, file: File, kind: Kind) -> None:
    model = file.make()
    rounded_experts(model, kind)
    _, path = convert(tmp_path, file, model, experts=kind)
    checkpoint = GGUFCheckpoint(path, {})
    [name] = [n for n in checkpoint.names() if re.search(r"1\.\w+\.experts\.2\.(w3|up_proj)\.w", n)]

    weight = checkpoint.weight(name)

    [stack] = [t for t in gguf.GGUFReader(path).tensors if t.name == STACK]
    assert isinstance(weight, QuantizedWeight)
    assert np.array_equal(weight.dequantize().numpy(), dequantize(stack.data, kind)[2])
    assert_answers(path, model, quantization="none")
    assert_answers(path, model)


def test_older_files_with_a_tensor_for_each_expert_are_read(tmp_path: Path) -> None:
    model = MIXTRAL.make()
    _, path = convert(tmp_path, MIXTRAL, model)
    stacked = GGUFCheckpoint(path, {})
    reader = gguf.GGUFReader(path)
    separate = gguf.GGUFWriter(str(tmp_path / "b.gguf"), "llama")
    for key, value in reader.fields.items():
        if key.startswith("llama."):
            separate.add_key_value(key, value.contents(), value.types[0])
    for tensor in reader.tensors:
        if "exps" in tensor.name:
            for i, values in enumerate(tensor.data):
                separate.add_tensor(tensor.name.replace("_exps", f".{i}"), values)
        else:
            separate.add_tensor(tensor.name, tensor.data)
    separate.write_header_to_file()
    separate.write_kv_data_to_file()
    separate.write_tensors_to_file()
    separate.close()

    old = GGUFCheckpoint(tmp_path / "b.gguf", {})

    assert set(old.names()) == set(stacked.names())
    assert all(torch.equal(old.tensor(n), stacked.tensor(n)) for n in old.names())


def replaced(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_a_wrong_number_of_experts_names_tensor_and_file(tmp_path: Path) -> None:
    _, path = convert(tmp_path, MIXTRAL, MIXTRAL.make())
    key = b"llama.expert_count\x04\x00\x00\x00"
    replaced(path, key + b"\x04", key + b"\x05")

    with pytest.raises(
        CheckpointError, match=r"a\.gguf.*_exps\.weight' has shape \[4, .*expert_count, 5"
    ):
        GGUFCheckpoint(path, {})


def test_a_truncated_stack_of_experts_is_named(tmp_path: Path) -> None:
    _, path = convert(tmp_path, MIXTRAL, MIXTRAL.make())
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match=r"a\.gguf.*truncated: tensor 'blk\.1\.ffn_\w+_exps"):
        GGUFCheckpoint(path, {})


# -- DeepSeek ---------------------------------------------------------------------------------


def test_expert_groups_follow_from_the_number_of_experts_if_not_stored() -> None:
    values = {"expert_count": 256, "expert_gating_func": 2, "attention.key_length": 192,
              "rope.dimension_count": 64, "attention.value_length": 128}  # fmt: skip
    family = find_family("deepseek2", values.get, ())
    assert family is not None

    found = family.hf_values(values.get, ())

    assert family.architecture == "DeepseekV3ForCausalLM"
    assert (found["n_group"], found["topk_group"]) == (8, 4)
    assert (found["qk_nope_head_dim"], found["v_head_dim"]) == (128, 128)


def test_parts_of_kv_b_proj_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = FILES[5]
    _, path = convert(tmp_path, file, file.make())
    # [H, R, K], reversed in the file: swap R and K
    name, size = b"blk.0.attn_k_b.weight", (3).to_bytes(4, "little")
    shape = [n.to_bytes(8, "little") for n in (12, 32, 4)]
    replaced(path, name + size + b"".join(shape), name + size + shape[1] + shape[0] + shape[2])

    with pytest.raises(CheckpointError, match=r"k_b_proj\.weight' has shape \[4, 12, 32\]"):
        GGUFCheckpoint(path, {}).tensor("model.layers.0.self_attn.kv_b_proj.weight")


# -- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_tensor_names_are_known_to_the_gguf_package(name: str) -> None:
    [arch] = [a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == name]
    known = {gguf.TENSOR_NAMES[t].rpartition(".")[2] for t in gguf.MODEL_TENSORS[arch]}

    assert {stem.partition(".")[0] for stem in FAMILIES[name].names} <= known


def test_metadata_that_a_family_does_not_support_is_refused(tmp_path: Path) -> None:
    file = next(f for f in FILES if f.name == "olmo2")
    model = file.make()
    model.config.sliding_window = 4096  # OLMo 3 has the same name in GGUF files
    _, path = convert(tmp_path, file, model)

    with pytest.raises(UnsupportedModel, match=r"a\.gguf.*sliding_window is 4096.*Olmo2"):
        GGUFCheckpoint(path, {})


def test_an_unknown_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "bloom")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(UnsupportedModel, match="'bloom' is not supported; supported: llama, qwen2"):
        GGUFCheckpoint(tmp_path / "a.gguf", {})

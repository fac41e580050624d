"""GGUF metadata by llama.cpp's rules: rotary scaling, ends of answers, split files, damage."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from portalm import LLM, SamplingParams
from portalm.errors import CheckpointError, ModelNotFound, UnsupportedModel
from portalm.layers.rope import cos_sin_table
from portalm.models.hub import resolve_model
from portalm.models.loader.end_tokens import gguf_end_ids
from portalm.models.loader.gguf import GGUFCheckpoint

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB, CONTEXT = 64, 128, 4, 2, 2, 48, 128
HEAD = HIDDEN // HEADS
BASE = 10_000.0


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kv = HEAD * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (kv, HIDDEN),
            f"blk.{i}.attn_v.weight": (kv, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def write_file(
    path: Path,
    values: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    *,
    tokens: list[str] | None = None,
    split: Callable[[str], bool] | None = None,
    **split_values: int,
) -> Path:
    """Write a Llama of two layers, with `values` in place of its metadata or in addition.

    `split` selects the tensors of one file of a split checkpoint; files after the first have no
    other metadata than `split_values`.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    usual: dict[str, Any] = {
        "block_count": LAYERS, "context_length": CONTEXT, "embedding_length": HIDDEN,
        "feed_forward_length": INNER, "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    is_first = not split_values.get("no")
    if is_first:
        for key, value in {**usual, **(values or {})}.items():
            add_value(writer, key if key.startswith("tokenizer.") else f"llama.{key}", value)
        names = tokens or [f"t{i}" for i in range(VOCAB)]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(names)
        writer.add_token_types([3 if name.startswith(("<", "[")) else 1 for name in names])
        writer.add_token_merges([])
    if "no" in split_values:
        writer.add_uint16("split.no", split_values["no"])
        writer.add_uint16("split.count", split_values["count"])
        writer.add_int32("split.tensors.count", split_values["tensors"])
    for name, tensor in {**tensors(), **(extra or {})}.items():
        if split is None or split(name):
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- rotary scaling ---------------------------------------------------------------------------


def llama_cpp_table(
    *,
    factor: float = 1.0,
    attention: float = 1.0,
    freq_factors: list[float] | None = None,
    yarn: Mapping[str, float] | None = None,
) -> torch.Tensor:
    """cos and sin as ggml's rope computes them, in float64 and plain loops: [CONTEXT, HEAD]."""

    def corr_dim(rotations: float) -> float:
        assert yarn is not None
        turns = math.log(yarn["original"] / (rotations * 2 * math.pi))
        return HEAD * turns / (2 * math.log(BASE))

    rows = []
    for position in range(CONTEXT):
        cosines, sines = [], []
        for i in range(HEAD // 2):
            theta = position * BASE ** (-2 * i / HEAD)
            theta /= freq_factors[i] if freq_factors else 1.0
            scale = attention
            angle = theta / factor
            if yarn is not None:
                low = max(0, math.floor(corr_dim(yarn.get("beta_fast", 32))))
                high = min(HEAD - 1, math.ceil(corr_dim(yarn.get("beta_slow", 1))))
                ramp = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
                angle = angle * (1 - ramp) + theta * ramp
                scale *= 1 + 0.1 * math.log(factor)
            cosines.append(math.cos(angle) * scale)
            sines.append(math.sin(angle) * scale)
        rows.append(cosines + sines)
    return torch.tensor(rows, dtype=torch.float64)


FREQUENCIES = [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize(
    ("values", "freq_factors", "expected"),
    [
        ({}, None, {}),
        ({"rope.scaling.factor": 4.0}, None, {"factor": 4.0}),
        ({"rope.scale_linear": 2.0}, None, {"factor": 2.0}),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, None, {"factor": 4.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, {"factor": 4.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None, {}),
        ({}, FREQUENCIES, {"freq_factors": FREQUENCIES}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
            FREQUENCIES,
            {"freq_factors": FREQUENCIES, "factor": 2.0},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 32},
            None,
            {"factor": 4.0, "yarn": {"original": 32}},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            None,
            {"factor": 4.0, "yarn": {"original": CONTEXT}},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
             "rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 0.75,
             "rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.yarn_beta_fast": 16.0,
             "rope.scaling.yarn_beta_slow": 2.0},
            None,
            {"factor": 4.0, "attention": 0.75 * 1.5,
             "yarn": {"original": 32, "beta_fast": 16, "beta_slow": 2}},
        ),
    ],
    ids=[
        "none", "factor without a type", "the older key", "both keys", "linear", "type none",
        "rope_freqs", "linear and rope_freqs", "yarn", "yarn without its length", "yarn, all",
    ],
)  # fmt: skip
def test_the_rotary_table_is_llama_cpps(
    tmp_path: Path, values: dict[str, Any], freq_factors: list[float] | None, expected: Any
) -> None:
    extra = {} if freq_factors is None else {
        "rope_freqs.weight": np.array(freq_factors, np.float32)
    }  # fmt: skip
    path = write_file(tmp_path / "a.gguf", values, extra)

    config = GGUFCheckpoint(path, {}).config

    table = cos_sin_table(config.rope, head_size=HEAD, max_position=CONTEXT)
    right = llama_cpp_table(**expected)
    assert torch.allclose(table[:CONTEXT].double(), right, atol=2e-4)


@pytest.mark.parametrize(
    ("values", "has_freqs", "message"),
    [
        ({"rope.scaling.attn_factor": 1.5}, False, "attn_factor 1.5 with linear"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, True, "yarn with rope_freqs"),
        ({"rope.scaling.type": "longrope"}, False, "longrope without its rope_factors"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, False, "ext_factor"),
        ({"rope.scaling.alpha": 1000.0}, False, r"rope\.scaling\.alpha is 1000.0"),
        ({"rope.freq_base_swa": 5000.0}, False, r"rope\.freq_base_swa"),
        ({"rope.dimension_sections": [2, 3, 3, 0]}, False, r"rope\.dimension_sections"),
    ],
)
def test_other_scalings_are_refused_by_name(
    tmp_path: Path, values: dict[str, Any], has_freqs: bool, message: str
) -> None:
    extra = {"rope_freqs.weight": np.array(FREQUENCIES, np.float32)} if has_freqs else {}
    path = write_file(tmp_path / "a.gguf", values, extra)

    with pytest.raises(UnsupportedModel, match=message):
        GGUFCheckpoint(path, {})


# -- other metadata ---------------------------------------------------------------------------


def test_equal_values_by_layer_are_one_value(tmp_path: Path) -> None:
    values = {"attention.head_count_kv": [KV_HEADS] * LAYERS, "feed_forward_length": [INNER] * 2}

    config = GGUFCheckpoint(write_file(tmp_path / "a.gguf", values), {}).config

    assert (config.num_kv_heads, config.intermediate_size) == (KV_HEADS, INNER)


@pytest.mark.parametrize("key", ["attention.head_count_kv", "feed_forward_length"])
def test_values_that_differ_by_layer_are_refused_by_name(tmp_path: Path, key: str) -> None:
    path = write_file(tmp_path / "a.gguf", {key: [2, 4]})

    with pytest.raises(UnsupportedModel, match=rf"llama.{key} differs by layer \(\[2, 4\]\)"):
        GGUFCheckpoint(path, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 64), ("attn_logit_softcapping", 30.0), ("logit_scale", 0.5),
        ("embedding_scale", 12.0), ("attention.scale", 0.1), ("expert_gating_func", 2),
        ("attention.causal", True), ("attention.sliding_window_pattern", [True, False]),
        ("something_new", 7), ("pooling_type", 1),
    ],
)  # fmt: skip
def test_metadata_that_nothing_reads_is_refused_unless_it_changes_nothing(
    tmp_path: Path, key: str, value: Any
) -> None:
    neutral = {"logit_scale": 1.0, "embedding_scale": 1.0, "expert_gating_func": 1}
    neutral |= {"attention.causal": True, "pooling_type": 3, "something_new": 0}
    path = write_file(tmp_path / "neutral.gguf", neutral)
    assert GGUFCheckpoint(path, {}).config.num_layers == LAYERS
    if neutral.get(key) == value:
        return

    with pytest.raises(UnsupportedModel, match=rf"(llama\.{key}|layer_types)"):
        LLM(str(write_file(tmp_path / "a.gguf", {key: value})), device="cpu", use_tqdm=False)


def test_rope_factors_of_one_length_only_are_refused(tmp_path: Path) -> None:
    extra = {"rope_factors_long.weight": np.array(FREQUENCIES, np.float32)}

    with pytest.raises(UnsupportedModel, match=r"rope_factors_long\.weight"):
        GGUFCheckpoint(write_file(tmp_path / "a.gguf", {}, extra), {})


# -- tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("blk.0.attn_q_norm.weight", HEAD),
        ("blk.1.attn_q.bias", HIDDEN),
        ("blk.2.attn_norm.weight", HIDDEN),
        ("blk.0.something_new.weight", HIDDEN),
        ("position_embd.weight", HIDDEN),
        ("adapter", HIDDEN),
    ],
)
def test_a_tensor_that_the_model_does_not_read_is_refused_by_name(
    tmp_path: Path, name: str, size: int
) -> None:
    path = write_file(tmp_path / "a.gguf", {}, {name: np.ones(size, np.float32)})

    with pytest.raises(CheckpointError, match="has tensors that the model does not use"):
        ids_of(path)


@pytest.mark.parametrize("name", ["blk.0.attn_rot_embd.weight", "blk.0.attn_q.bias"])
def test_a_tensor_that_changes_nothing_is_accepted(tmp_path: Path, name: str) -> None:
    path = write_file(tmp_path / "a.gguf", {}, {name: np.zeros(HIDDEN, np.float32)})

    assert ids_of(path) == ids_of(write_file(tmp_path / "b.gguf"))


# -- where answers end ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "metadata", "expected"),
    [
        # eos is not the end of the turn
        (["a", "<|endoftext|>", "<|im_end|>", "<|im_start|>"], {"eos": 1}, [1, 2]),
        (["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"], {"eos": 1}, [1, 0, 2]),
        (["<eos>", "<end_of_turn>", "<start_of_turn>"], {"eos": 0}, [0, 1]),
        (["<eos>", "<x>", "<y>"], {"eos": 0, "eot": 1, "eom": 2}, [0, 1, 2]),
        # gpt-oss: <|end|> ends a channel, not the answer
        (["<|return|>", "<|call|>", "<|end|>"], {"eos": 0}, [0, 1]),
        (["<|end|>", "<|endoftext|>"], {"eos": 1}, [1, 0]),
        (["<turn|>", "<|tool_response>", "</s>"], {"eos": 0}, [0, 1]),
        (["a", "b"], {}, []),
    ],
)
def test_an_answer_ends_at_the_tokens_that_end_one_in_llama_cpp(
    tokens: list[str], metadata: dict[str, int], expected: list[int]
) -> None:
    values: dict[str, Any] = {f"tokenizer.ggml.{k}_token_id": v for k, v in metadata.items()}
    types = [3 if token.startswith("<") else 1 for token in tokens]

    found = gguf_end_ids(
        {**values, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    )

    assert found == expected


def test_a_known_name_of_an_ordinary_token_ends_nothing() -> None:
    metadata = {"tokenizer.ggml.tokens": ["</s>"], "tokenizer.ggml.token_type": [1]}

    assert gguf_end_ids(metadata) == []


def test_a_files_turn_end_is_in_its_config(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(VOCAB)]
    tokens[5], tokens[9] = "<|endoftext|>", "<|im_end|>"
    path = write_file(tmp_path / "a.gguf", {"tokenizer.ggml.eos_token_id": 5}, tokens=tokens)

    assert GGUFCheckpoint(path, {}).config.eos_token_ids == (5, 9)


# -- split checkpoints ------------------------------------------------------------------------


def write_split(folder: Path, **changes: Any) -> list[Path]:
    names = list(tensors())
    paths = []
    for no, start in enumerate((0, 5, 14)):
        held = set(names[start : (5, 14, len(names))[no]])
        values = {"no": no, "count": 3, "tensors": len(names), **changes.get(f"part_{no}", {})}
        paths.append(
            write_file(
                folder / f"tiny-{no + 1:05}-of-00003.gguf",
                split=lambda name, held=held: name in held,
                **values,
            )
        )
    return paths


def ids_of(path: Path) -> list[int]:
    llm = LLM(str(path), device="cpu", dtype="float32", use_tqdm=False)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    [output] = llm.generate([[3, 4, 5]], params, use_tqdm=False)
    llm.close()
    return output.outputs[0].token_ids


def test_a_split_checkpoint_answers_as_the_whole_one(tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    first = write_split(tmp_path / "split")[0]

    assert ids_of(first) == ids_of(write_file(tmp_path / "a.gguf"))
    assert resolve_model(str(tmp_path / "split")) == first


def test_two_models_in_a_folder_are_refused_though_one_is_split(tmp_path: Path) -> None:
    write_split(tmp_path)
    write_file(tmp_path / "a.gguf")

    with pytest.raises(ModelNotFound, match=r"2 \.gguf models"):
        resolve_model(str(tmp_path))


def test_a_missing_later_or_foreign_file_of_a_split_checkpoint_is_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)

    with pytest.raises(CheckpointError, match="it is file 2 of 3: pass the first one, tiny-00001"):
        GGUFCheckpoint(paths[1], {})
    second = paths[1].rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-00003\.gguf.*missing"):
        GGUFCheckpoint(paths[0], {})
    second.rename(paths[1])
    paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="restore the name"):
        GGUFCheckpoint(tmp_path / "renamed.gguf", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part_1": {"no": 2}}, r"split.no and split.count are \(2, 3\), not \(1, 3\)"),
        ({"part_0": {"tensors": 99}}, "split.tensors.count is 99"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    first = write_split(tmp_path, **changes)[0]

    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(first, {})


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    write_file(
        paths[2],
        split=lambda name: name.startswith(("blk.1", "token_embd")),
        no=2,
        count=3,
        tensors=len(tensors()),
    )

    with pytest.raises(CheckpointError, match=r"has a tensor .token_embd\.weight., as tiny-00001"):
        GGUFCheckpoint(paths[0], {})


# -- damage -----------------------------------------------------------------------------------


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    path = patched(write_file(tmp_path / "a.gguf"), b"blk.0.attn_k.weight", b"blk.0.attn_q.weight")

    with pytest.raises(CheckpointError, match=r"two tensors named 'blk.0.attn_q.weight'"):
        GGUFCheckpoint(path, {})


def test_metadata_with_one_key_twice_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gguf", {"rope.freq_base": 1e4, "rope.freq_besa": 1e4})
    patched(path, b"llama.rope.freq_besa", b"llama.rope.freq_base")

    with pytest.raises(CheckpointError, match=r"'llama.rope.freq_base' twice"):
        GGUFCheckpoint(path, {})


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gguf")
    content = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    offset = content.index(name) + len(name) + 4 + 2 * 8 + 4
    content[offset : offset + 8] = struct.pack("<Q", 32)
    path.write_bytes(bytes(content))

    with pytest.raises(CheckpointError, match="overlap"):
        GGUFCheckpoint(path, {})


def test_a_big_endian_file_is_named_so(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    with pytest.raises(CheckpointError, match=r"it is big-endian.*gguf_convert_endian.py"):
        GGUFCheckpoint(tmp_path / "a.gguf", {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"tjgg\x01\x00\x00\x00", "GGJT format of 2023"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\x1f\x8b\x08rest", "compressed with gzip"),
        (bytes(64), "begins with zeros"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "GGUF version 1 is not supported"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(path, {})

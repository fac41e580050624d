"""GGUF files: every tensor type compared with the gguf package, and broken files."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from portalm.errors import CheckpointError, ModelError
from portalm.models.loader.gguf import GGUFCheckpoint
from portalm.models.loader.gguf_file import TYPES, read_metadata

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 256, 256, 4, 2, 32
PYTHON_QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write_file(path: Path, down: np.ndarray | None = None, kind: Kind = Kind.F32) -> Path:
    """Write a one-layer Llama; `down` (raw bytes of `kind`) may replace its ffn_down."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))

    kv = HIDDEN // HEADS * KV_HEADS
    add("token_embd.weight", VOCAB, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for name, rows in (("attn_q", HIDDEN), ("attn_k", kv), ("attn_v", kv), ("attn_output", HIDDEN)):
        add(f"blk.0.{name}.weight", rows, HIDDEN)
    add("blk.0.attn_norm.weight", HIDDEN)
    add("blk.0.ffn_norm.weight", HIDDEN)
    add("blk.0.ffn_gate.weight", INNER, HIDDEN)
    add("blk.0.ffn_up.weight", INNER, HIDDEN)
    if down is None:
        add("blk.0.ffn_down.weight", HIDDEN, INNER)
    else:
        writer.add_tensor("blk.0.ffn_down.weight", down, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", PYTHON_QUANTS + K_QUANTS)
def test_every_type_is_dequantized_as_the_gguf_package_does(tmp_path: Path, name: str) -> None:
    kind = Kind[name]
    if name in PYTHON_QUANTS:
        values = np.random.default_rng(1).standard_normal((HIDDEN, INNER)).astype(np.float32)
        raw = gguf.quants.quantize(values, kind)
    else:  # any bytes are a valid block, as long as scales are finite
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = (
            np.random.default_rng(1)
            .integers(0, 60, (HIDDEN, INNER // block * size))
            .astype(np.uint8)
        )
    path = write_file(tmp_path / "a.gguf", raw, kind)

    tensor = GGUFCheckpoint(path, {}).tensor("model.layers.0.mlp.down_proj.weight")

    expected = gguf.quants.dequantize(raw, kind)
    assert np.array_equal(tensor.float().numpy(), expected.reshape(HIDDEN, INNER))


def test_the_config_comes_from_the_metadata(tmp_path: Path) -> None:
    config = GGUFCheckpoint(write_file(tmp_path / "a.gguf"), {}).config

    assert (config.num_heads, config.num_kv_heads, config.head_size) == (4, 2, 64)
    assert (config.vocab_size, config.max_position, config.eos_token_ids) == (32, 128, (2,))
    assert config.tie_word_embeddings


def test_rotary_pairs_are_reordered_to_halves(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(write_file(tmp_path / "a.gguf"), {})
    info = checkpoint._infos["model.layers.0.self_attn.q_proj.weight"]
    raw = checkpoint._read(info)

    head = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")[:64]

    assert np.array_equal(head[1].numpy(), raw[2].numpy())  # pair 1, first
    assert np.array_equal(head[33].numpy(), raw[3].numpy())  # pair 1, second


# -- broken files -----------------------------------------------------------------------------


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
        GGUFCheckpoint(write_file(tmp_path / "a.gguf"), {}).tensor("lm_head.weight")


def test_an_error_shows_the_wrong_magic_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"RIFF this is another format")

    with pytest.raises(CheckpointError, match="not a GGUF file: it begins with b'RIFF"):
        read_metadata(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\x03\x00\x00\x00"])
def test_a_file_cut_in_its_header_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)

    with pytest.raises(CheckpointError):
        GGUFCheckpoint(path, {})


@pytest.mark.parametrize("where", [8, 16], ids=["tensors", "values"])
def test_an_absurd_count_is_refused_before_anything_is_allocated(
    tmp_path: Path, where: int
) -> None:
    path = write_file(tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, where, 2**60)
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match="more than the file has room for"):
        GGUFCheckpoint(path, {})


def test_a_truncated_file_names_the_tensor(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-5000])

    with pytest.raises(CheckpointError, match=r"truncated: tensor '.*' ends at byte"):
        GGUFCheckpoint(path, {})


def test_random_damage_raises_only_model_errors(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gguf")
    whole = path.read_bytes()
    rng = random.Random(0)
    num_refused = 0
    for _ in range(150):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(min(len(data), 1500))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            checkpoint = GGUFCheckpoint(path, {})
            for name in checkpoint.names():
                checkpoint.tensor(name)
        except ModelError:
            num_refused += 1
    assert num_refused > 50


def test_the_table_of_types_equals_the_gguf_packages() -> None:
    theirs = {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType
    }

    assert {kind: TYPES.get(kind) for kind in theirs} == theirs

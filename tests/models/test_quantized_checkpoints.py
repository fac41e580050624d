"""Quantized checkpoints, written here by plain loops, one scheme after another."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from portalm.backend import QuantizedWeight
from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.errors import CheckpointError, ConfigError, UnsupportedModel
from portalm.models.loader import open_checkpoint
from tests.tiny import ask, make_config_folder, run, tokens

GROUP = 32
LAYERS = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }.items()
}
Parts = dict[str, torch.Tensor]


class Grid:
    """Random codes [N, K], scales and zeros [N, G], and the weight that they represent."""

    def __init__(self, shape: tuple[int, int], bits: int, *, has_zeros: bool, groups: Any = None):
        rng = np.random.default_rng(hash(shape) % 1000 + bits)
        rows, columns = shape
        num_groups = columns // GROUP
        self.codes = rng.integers(0, 1 << bits, shape)
        self.scales = rng.uniform(0.01, 0.03, (rows, num_groups)).astype(np.float16)
        if bits == 8:
            self.scales /= np.float16(16)
        half = 1 << (bits - 1)
        self.zeros = np.full((rows, num_groups), half)
        if has_zeros:
            self.zeros = rng.integers(0, 1 << bits, (rows, num_groups))
        self.groups = np.arange(columns) // GROUP if groups is None else groups
        self.exact = np.empty(shape)
        for n in range(rows):
            for k in range(columns):
                g = self.groups[k]
                scale = float(self.scales[n, g])
                self.exact[n, k] = scale * (int(self.codes[n, k]) - int(self.zeros[n, g]))


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack codes [R, C] -> int32 [R, C bits / 32]; place i of a word holds column order[i]."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    out = np.zeros((codes.shape[0], codes.shape[1] // per_word), np.uint32)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            for place in range(per_word):
                code = int(codes[row, column * per_word + order[place]])
                out[row, column] |= np.uint32(code << (bits * place))
    return torch.from_numpy(out.view(np.int32).copy())


def float16(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float16))


Written = tuple[Parts, np.ndarray]
"""A layer's parts by the ends of their names, and its exact weight."""


def awq(shape: tuple[int, int]) -> Written:
    grid = Grid(shape, 4, has_zeros=True)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": words(grid.codes.T, 4, order),
        "qzeros": words(grid.zeros.T, 4, order),
        "scales": float16(grid.scales.T),
    }
    return parts, grid.exact


def gptq(
    shape: tuple[int, int], bits: int = 4, has_zeros: bool = False, is_shuffled: bool = False
) -> Written:
    groups = np.arange(shape[1]) // GROUP
    if is_shuffled:
        groups = np.random.default_rng(3).permutation(groups)
    grid = Grid(shape, bits, has_zeros=has_zeros, groups=groups)
    parts = {
        "qweight": words(grid.codes, bits).T.contiguous(),
        "qzeros": words((grid.zeros.T - 1) % (1 << bits), bits),
        "scales": float16(grid.scales.T),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return parts, grid.exact


def packed_tensors(shape: tuple[int, int], bits: int = 4, has_zeros: bool = False) -> Written:
    grid = Grid(shape, bits, has_zeros=has_zeros)
    parts = {
        "weight_packed": words(grid.codes, bits),
        "weight_scale": float16(grid.scales),
        "weight_shape": torch.tensor(shape),
    }
    if has_zeros:
        parts["weight_zero_point"] = words(grid.zeros.T, bits).T.contiguous()
    return parts, grid.exact


def int8_rows(shape: tuple[int, int]) -> Written:
    rng = np.random.default_rng(4)
    weight = rng.integers(-128, 128, shape).astype(np.int8)
    scales = rng.uniform(0.0005, 0.002, (shape[0], 1)).astype(np.float32)
    parts = {"weight": torch.from_numpy(weight), "weight_scale": torch.from_numpy(scales)}
    return parts, weight.astype(np.float64) * scales


def fp8(shape: tuple[int, int], scales: torch.Tensor, name: str, block: int = 0) -> Written:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(torch.float8_e4m3fn)
    exact = np.empty(shape)
    for n in range(shape[0]):
        for k in range(shape[1]):
            if scales.numel() == 1:
                scale = scales.item()
            elif block:
                scale = scales[n // block, k // block].item()
            else:
                scale = scales[n, 0].item()
            exact[n, k] = weight[n, k].item() * scale
    return {"weight": weight, name: scales}, exact


def fp8_tensor(shape: tuple[int, int]) -> Written:
    return fp8(shape, torch.tensor(0.11), "weight_scale")


def random_scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(8)) * 0.1 + 0.05


def fp8_rows(shape: tuple[int, int]) -> Written:
    return fp8(shape, random_scales(shape[0], 1), "weight_scale")


def fp8_blocks(shape: tuple[int, int]) -> Written:
    """Quantize by blocks of 48; the last blocks are smaller."""
    sizes = [-(-n // 48) for n in shape]
    return fp8(shape, random_scales(*sizes), "weight_scale_inv", 48)


def fp8_uneven_blocks(shape: tuple[int, int]) -> Written:
    """Quantize by blocks of 48 in compressed-tensors' format; the last blocks are smaller."""
    parts, exact = fp8_blocks(shape)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, exact


E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def nvfp4(shape: tuple[int, int], *, is_compressed: bool) -> Written:
    """Quantize by groups of 16 with FP8 scales, which a scale of the whole weight multiplies."""
    rng = np.random.default_rng(11)
    codes = rng.integers(0, 16, shape)
    scales = torch.from_numpy(rng.uniform(1, 60, (shape[0], shape[1] // 16))).to(
        torch.float8_e4m3fn
    )
    whole = 0.0015
    exact = np.empty(shape)
    for n in range(shape[0]):
        for k in range(shape[1]):
            exact[n, k] = E2M1[codes[n, k]] * scales[n, k // 16].item() * whole
    pairs = torch.from_numpy((codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8))
    if is_compressed:
        divisor = torch.tensor([1 / whole], dtype=torch.float32)
        parts = {"weight_packed": pairs, "weight_scale": scales, "weight_global_scale": divisor,
                 "input_global_scale": torch.ones(1)}  # fmt: skip
    else:
        factor = torch.tensor(whole, dtype=torch.float32)
        parts = {"weight": pairs, "weight_scale": scales, "weight_scale_2": factor,
                 "input_scale": torch.tensor(1.0)}  # fmt: skip
    return parts, exact


def bnb_int8(shape: tuple[int, int]) -> Written:
    rng = np.random.default_rng(6)
    weight = rng.integers(-127, 128, shape).astype(np.int8)
    largest = rng.uniform(0.1, 0.3, shape[0]).astype(np.float32)
    parts = {"weight": torch.from_numpy(weight), "SCB": torch.from_numpy(largest)}
    return parts, weight * (largest.astype(np.float64)[:, None] / 127)


def nf4(shape: tuple[int, int]) -> Written:
    """Quantize by blocks of 64, whose scales are quantized to 8 bits by blocks of 256."""
    rng = np.random.default_rng(7)
    count = shape[0] * shape[1]
    codes = rng.integers(0, 16, count)
    levels = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    outer_levels = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    blocks = rng.integers(0, 256, count // 64)
    outer = rng.uniform(0.05, 0.1, -(-len(blocks) // 256)).astype(np.float32)
    offset = 0.15
    exact = np.empty(count)
    for i in range(count):
        block = i // 64
        scale = float(outer_levels[blocks[block]]) * float(outer[block // 256]) + offset
        exact[i] = float(levels[codes[i]]) * scale
    state = {"quant_type": "nf4", "blocksize": 64, "shape": shape, "dtype": "bfloat16",
             "nested_blocksize": 256, "nested_offset": offset}  # fmt: skip
    parts = {
        "weight": torch.from_numpy((codes[0::2] * 16 + codes[1::2]).astype(np.uint8))[:, None],
        "weight.absmax": torch.from_numpy(blocks.astype(np.uint8)),
        "weight.quant_map": torch.from_numpy(levels),
        "weight.nested_absmax": torch.from_numpy(outer),
        "weight.nested_quant_map": torch.from_numpy(outer_levels),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return parts, exact.reshape(shape)


def weights_config(
    bits: int, kind: str = "int", strategy: str = "group", **more: Any
) -> dict[str, Any]:
    size = {"group_size": GROUP} if strategy == "group" else {}
    return {"num_bits": bits, "type": kind, "strategy": strategy, **size, **more}


def group_config(*args: Any, **more: Any) -> dict[str, Any]:
    group = {"weights": weights_config(*args, **more), "targets": ["Linear"]}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


@dataclass(frozen=True)
class Case:
    """A function that writes a layer, and the quantization_config for it."""

    write: Callable[[tuple[int, int]], Written]
    config: dict[str, Any]
    kept: str | None
    """`QuantizedWeight.format` of the weights; None: they are dequantized."""


@functools.cache
def written(write: Callable[[tuple[int, int]], Written], shape: tuple[int, int]) -> Written:
    """Call `write`; cached, as plain loops are slow."""
    return write(shape)


TENSORS = {"quant_method": "compressed-tensors"}
CASES = {
    "awq": Case(
        awq,
        {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": GROUP},
        "int4_min",
    ),
    "gptq": Case(gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}, "int4"),
    "gptq with zeros": Case(
        lambda shape: gptq(shape, has_zeros=True), {"quant_method": "gptq", "bits": 4}, "int4_min"
    ),
    "gptq in act order": Case(
        lambda shape: gptq(shape, has_zeros=True, is_shuffled=True),
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        None,
    ),
    "gptq 8 bits with zeros": Case(
        lambda shape: gptq(shape, bits=8, has_zeros=True),
        {"quant_method": "gptq", "bits": 8},
        "int8_min",
    ),
    "gptq 8 bits": Case(
        lambda shape: gptq(shape, bits=8), {"quant_method": "gptq", "bits": 8}, "int8"
    ),
    "w4a16": Case(
        packed_tensors, {**TENSORS, "format": "pack-quantized", **group_config(4)}, "int4"
    ),
    "w4a16 with zeros": Case(
        lambda shape: packed_tensors(shape, has_zeros=True),
        {**TENSORS, "format": "pack-quantized", **group_config(4, symmetric=False)},
        "int4_min",
    ),
    "w8a16": Case(
        lambda shape: packed_tensors(shape, bits=8),
        {**TENSORS, "format": "pack-quantized", **group_config(8)},
        "int8",
    ),
    "w8a8": Case(
        int8_rows,
        {**TENSORS, "format": "int-quantized", **group_config(8, strategy="channel")},
        "int8",
    ),
    "w8a8 in fp8": Case(
        fp8_rows,
        {**TENSORS, "format": "float-quantized", **group_config(8, "float", "channel")},
        None,
    ),
    "w8a8 in fp8 by blocks": Case(
        fp8_uneven_blocks,
        {
            **TENSORS,
            "format": "float-quantized",
            **group_config(8, "float", "block", block_structure=[48, 48]),
        },
        None,
    ),
    "compressed nvfp4": Case(
        lambda shape: nvfp4(shape, is_compressed=True),
        {
            **TENSORS,
            "format": "nvfp4-pack-quantized",
            **group_config(4, "float", "tensor_group", group_size=16),
        },
        None,
    ),
    "modelopt nvfp4": Case(
        lambda shape: nvfp4(shape, is_compressed=False),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        None,
    ),
    "modelopt fp8": Case(fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, None),
    "modelopt fp8 by rows": Case(
        lambda shape: fp8(shape, random_scales(shape[0], 1), "weight_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        None,
    ),
    "fp8 by tensor": Case(fp8_tensor, {"quant_method": "fp8"}, None),
    "fp8 by rows": Case(fp8_rows, {"quant_method": "fbgemm_fp8"}, None),
    "fp8 by blocks": Case(fp8_blocks, {"quant_method": "fp8", "weight_block_size": [48, 48]}, None),
    "bitsandbytes 8 bits": Case(
        bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"
    ),
    "bitsandbytes nf4": Case(nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
}


def save(folder: Path, case: Case, *, is_plain: bool) -> Path:
    """Save a tiny model with layers written by `case`, or the same weights in float32."""
    torch.manual_seed(1)
    config = {} if is_plain else {"quantization_config": case.config}
    make_config_folder(folder, **config)
    tensors = {
        "model.embed_tokens.weight": torch.randn(512, 64),
        "lm_head.weight": torch.randn(512, 64),
        "model.norm.weight": torch.ones(64),
    }
    for i in range(2):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(64)
    for layer, shape in LAYERS.items():
        parts, exact = written(case.write, shape)
        if is_plain:
            tensors[f"{layer}.weight"] = torch.from_numpy(exact).float()
        else:
            tensors.update({f"{layer}.{part}": tensor.clone() for part, tensor in parts.items()})
    save_file(tensors, folder / "model.safetensors")
    return folder


def answers(folder: Path, **settings: Any) -> dict[str, list[int]]:
    engine = Engine(
        EngineConfig.from_dict(
            {"model": str(folder), "device": "cpu", "max_num_seqs": 4, **settings}
        )
    )
    for name, prompt in {"a": [5, 6, 7], "b": list(range(40))}.items():
        ask(engine, name, prompt, max_tokens=24)
    return tokens(run(engine))


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_read_exactly_from_its_parts(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    checkpoint = open_checkpoint(save(tmp_path, case, is_plain=False), EngineConfig(model="x"))
    layer = "model.layers.1.mlp.down_proj"

    weight = checkpoint.weight(f"{layer}.weight")
    whole = checkpoint.tensor(f"{layer}.weight")

    kept = weight.format if isinstance(weight, QuantizedWeight) else None
    assert kept == case.kept
    exact = written(case.write, LAYERS[layer])[1]
    np.testing.assert_allclose(whole.numpy(), exact, rtol=1e-5, atol=1e-6)
    assert f"{layer}.weight" in checkpoint.names()
    assert not [n for n in checkpoint.names() if n.startswith(layer) and n != f"{layer}.weight"]


@pytest.mark.parametrize("name", CASES)
def test_answers_equal_those_of_the_same_weights_in_float32(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    written = save(tmp_path / "written", case, is_plain=False)
    plain = save(tmp_path / "plain", case, is_plain=True)

    assert answers(written, dtype="float32") == answers(plain, dtype="float32")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kept])
def test_quantized_weights_give_nearly_the_logprobs_of_dequantized_ones(
    tmp_path: Path, name: str
) -> None:
    folder = save(tmp_path, CASES[name], is_plain=False)

    def logprob(**settings: Any) -> float:
        engine = Engine(
            EngineConfig.from_dict(
                {"model": str(folder), "device": "cpu", "dtype": "bfloat16", **settings}
            )
        )
        ask(engine, "a", [5, 6, 7], max_tokens=1, logprobs=1)
        [output] = [o for outputs in run(engine).values() for o in outputs if o.logprobs]
        return output.logprobs[0].logprob

    assert abs(logprob() - logprob(quantization="none")) < 0.05


def test_the_log_says_how_many_weights_are_dequantized(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, CASES["gptq in act order"], is_plain=False)

    answers(folder, dtype="bfloat16")

    assert "14 weights of this gptq checkpoint are dequantized to the model's dtype" in caplog.text


def test_a_quantization_setting_must_match_the_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path / "awq", CASES["awq"], is_plain=False)
    plain = save(tmp_path / "plain", CASES["awq"], is_plain=True)

    assert answers(folder, quantization="awq", dtype="float32")
    with pytest.raises(CheckpointError, match="its weights are awq, but quantization is 'gptq'"):
        answers(folder, quantization="gptq")
    with pytest.raises(
        CheckpointError,
        match=r"quantization is 'awq', but its config.json has no quantization_config",
    ):
        answers(plain, quantization="awq")
    with pytest.raises(ConfigError, match="must be one of auto, none, int8, int4, fp8, awq"):
        answers(plain, quantization="exl2")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method 'aqlm' is not supported; supported: awq"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3 is not supported; supported: 4, 8"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' is not supported"),
        ({**TENSORS, "format": "marlin-24"}, "format 'marlin-24' is not supported"),
        ({**TENSORS, **group_config(2)}, "num_bits 2 is not supported"),
    ],
)
def test_unsupported_formats_are_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = save(tmp_path, Case(awq, config, None), is_plain=False)

    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(folder, EngineConfig(model="x"))


@pytest.mark.parametrize(
    ("name", "part", "broken"),
    [
        ("awq", "scales", lambda t: t[:, :-1]),
        ("awq", "qzeros", None),
        ("gptq", "g_idx", lambda t: t + 1),
        ("gptq", "scales", lambda t: t.flatten()),
        ("w4a16", "weight_shape", lambda t: t * 2),
        ("w4a16", "weight_scale", lambda t: t[:-1]),
        ("w8a8", "weight", lambda t: t[0]),
        ("fp8 by blocks", "weight_scale_inv", lambda t: t[:1]),
        ("fp8 by rows", "weight", lambda t: t.to(torch.int8)),
        ("bitsandbytes nf4", "weight.quant_state.bitsandbytes__nf4", lambda t: t[:9]),
        ("bitsandbytes nf4", "weight.absmax", lambda t: t[:-1]),
        ("bitsandbytes 8 bits", "SCB", lambda t: t[:-1]),
    ],
)
def test_a_broken_part_is_named(
    tmp_path: Path, name: str, part: str, broken: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    layer = "model.layers.0.mlp.up_proj"

    def write(shape: tuple[int, int]) -> Written:
        parts, exact = written(CASES[name].write, shape)
        parts = dict(parts)
        if broken is None:
            del parts[part]
        else:
            parts[part] = broken(parts[part]).contiguous()
        return parts, exact

    folder = save(tmp_path, Case(write, CASES[name].config, None), is_plain=False)
    checkpoint = open_checkpoint(folder, EngineConfig(model="x"))

    with pytest.raises(CheckpointError, match=layer):
        checkpoint.tensor(f"{layer}.weight")


def save_gpt_oss(folder: Path, *, is_plain: bool) -> Path:
    """Save a tiny GPT-OSS with MXFP4 experts, or the same weights in float32."""
    import transformers

    torch.manual_seed(2)
    config = transformers.GptOssConfig(
        vocab_size=512, hidden_size=64, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=24, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    rng = np.random.default_rng(9)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        count, k, n = tensors.pop(name).shape
        codes = rng.integers(0, 16, (count, n, k))
        exponents = rng.integers(122, 125, (count, n, k // 32))
        exact = np.empty((count, k, n), np.float32)
        for e, row, column in np.ndindex(count, n, k):
            code = int(codes[e, row, column])
            value = -values[code & 7] if code & 8 else values[code]
            exact[e, column, row] = value * 2.0 ** (int(exponents[e, row, column // 32]) - 127)
        if is_plain:
            tensors[name] = torch.from_numpy(exact)
        else:
            pairs = codes.reshape(count, n, k // 32, 16, 2).astype(np.uint8)
            tensors[f"{name}_blocks"] = torch.from_numpy(pairs[..., 0] | pairs[..., 1] << 4)
            tensors[f"{name}_scales"] = torch.from_numpy(exponents.astype(np.uint8))
    save_file(tensors, path, metadata={"format": "pt"})
    if not is_plain:
        file = folder / "config.json"
        method = {"quantization_config": {"quant_method": "mxfp4"}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **method}))
    return folder


def test_mxfp4_experts_equal_the_same_weights_in_float32(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    four_bits = save_gpt_oss(tmp_path / "mxfp4", is_plain=False)
    plain = save_gpt_oss(tmp_path / "plain", is_plain=True)
    checkpoint = open_checkpoint(four_bits, EngineConfig(model="x"))
    name = "model.layers.1.mlp.experts.down_proj"

    weight = checkpoint.weight(f"{name}.weight")
    exact = open_checkpoint(plain, EngineConfig(model="x")).tensor(name)  # [E, K, N]

    parts = load_file(four_bits / "model.safetensors")
    read = convert_moe_packed_tensors(
        parts[f"{name}_blocks"], parts[f"{name}_scales"], dtype=torch.float32
    )
    assert isinstance(weight, QuantizedWeight) and weight.format == "int8"
    assert torch.equal(weight.dequantize().view(4, 64, 32), exact.transpose(1, 2))
    assert torch.equal(read, exact)  # and transformers reads the same
    assert not [n for n in checkpoint.names() if n.endswith(("_blocks", "_scales"))]
    for device in ("reference", "cpu"):
        same = {"device": device, "dtype": "float32"}
        assert answers(four_bits, **same) == answers(plain, **same)

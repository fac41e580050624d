"""Checkpoints that quantize their layers in different ways, or some of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from portalm.config import EngineConfig
from portalm.errors import CheckpointError, PortaLMError, UnsupportedModel
from portalm.models.loader import open_checkpoint
from tests.models.test_quantized_checkpoints import (
    CASES,
    GROUP,
    LAYERS,
    TENSORS,
    Case,
    Written,
    answers,
    fp8_rows,
    fp8_tensor,
    gptq,
    nvfp4,
    packed_tensors,
    save,
    weights_config,
    written,
)

Write = Callable[[tuple[int, int]], Written]
UP, DOWN, QUERY = "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"


def four_bits(shape: tuple[int, int]) -> Written:
    return packed_tensors(shape, bits=4)


def eight_bits(shape: tuple[int, int]) -> Written:
    return packed_tensors(shape, bits=8)


def plain(shape: tuple[int, int]) -> Written:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.1
    return {"weight": weight}, weight.double().numpy()


def gptq_8(shape: tuple[int, int]) -> Written:
    return gptq(shape, bits=8)


def gptq_v2(shape: tuple[int, int]) -> Written:
    """Store zero instead of zero - 1."""
    parts, exact = written(gptq, shape)
    words = parts["qzeros"].to(torch.int64) & 0xFFFFFFFF
    nibbles = [(words >> (4 * i) & 15) + 1 for i in range(8)]
    packed = sum(nibble << (4 * i) for i, nibble in enumerate(nibbles))
    signed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return {**parts, "qzeros": signed.to(torch.int32)}, exact


def compressed_nvfp4(shape: tuple[int, int]) -> Written:
    return nvfp4(shape, is_compressed=True)


def modelopt_nvfp4(shape: tuple[int, int]) -> Written:
    return nvfp4(shape, is_compressed=False)


def save_mixed(
    folder: Path, writers: Mapping[str, Write], rest: Write, config: dict[str, Any], **more: Any
) -> tuple[Path, Path]:
    """Save a model whose layers are written by the first of `writers` in their name, or `rest`.

    Returns:
        Its folder, and that of the same weights in float32.
    """
    config = {"quantization_config": config} if config else {}
    for name in ("mixed", "plain"):
        save(folder / name, Case(plain, {}, None), is_plain=True)
    tensors, same = (load_file(folder / name / "model.safetensors") for name in ("mixed", "plain"))
    for layer, shape in LAYERS.items():
        write = next((w for part, w in writers.items() if part in layer), rest)
        parts, exact = written(write, shape)
        del tensors[f"{layer}.weight"]
        tensors |= {f"{layer}.{part}": tensor.clone() for part, tensor in parts.items()}
        same[f"{layer}.weight"] = torch.from_numpy(exact).float()
    save_file(tensors, folder / "mixed" / "model.safetensors")
    save_file(same, folder / "plain" / "model.safetensors")
    file = folder / "mixed" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config, **more}))
    return folder / "mixed", folder / "plain"


def groups(**named: tuple[list[str], dict[str, Any]]) -> dict[str, Any]:
    return {
        "config_groups": {
            name: {"targets": targets, "weights": weights}
            for name, (targets, weights) in named.items()
        }
    }


INT4, INT8 = weights_config(4), weights_config(8)
FP8_ROWS = weights_config(8, "float", "channel")
PACKED = {**TENSORS, "format": "pack-quantized"}
DYNAMIC = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
FP8_AND_NVFP4 = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        layer: {"quant_algo": "FP8"} if DOWN in layer else {"quant_algo": "NVFP4", "group_size": 16}
        for layer in LAYERS
    },
}

RIGHT: dict[str, tuple[Mapping[str, Write], Write, dict[str, Any]]] = {
    "regular expressions": (
        {DOWN: eight_bits},
        four_bits,
        {**PACKED, **groups(a=(["re:.*down_proj$"], INT8), b=(["re:.*(?<!down)_proj"], INT4))},
    ),
    "a regular expression before a class": (
        {DOWN: eight_bits},
        four_bits,
        {**PACKED, **groups(a=(["Linear"], INT4), b=(["re:.*down_proj"], INT8))},
    ),
    "a name before a regular expression": (
        {f"1.{DOWN}": eight_bits},
        four_bits,
        {
            **PACKED,
            **groups(
                a=(["re:.*"], INT4),
                b=([f"model.layers.1.{DOWN}"], INT8),
            ),
        },
    ),
    "ignored layers": (
        {QUERY: plain, DOWN: plain},
        four_bits,
        {
            **PACKED,
            **groups(a=(["Linear"], INT4)),
            "ignore": ["lm_head", "re:.*self_attn.q_proj", *(n for n in LAYERS if DOWN in n)],
        },
    ),
    "layers that are plain without a word": (
        {QUERY: plain},
        four_bits,
        {**PACKED, **groups(a=(["Linear"], INT4))},
    ),
    "mixed precision": (
        {DOWN: fp8_rows, UP: compressed_nvfp4},
        eight_bits,
        {
            **TENSORS,
            "format": "mixed-precision",
            "config_groups": {
                "a": {"targets": ["re:.*down_proj"], "weights": FP8_ROWS,
                      "format": "float-quantized"},
                "b": {"targets": ["re:.*up_proj"], "format": "nvfp4-pack-quantized",
                      "weights": weights_config(4, "float", "tensor_group", group_size=16)},
                "c": {"targets": ["Linear"], "weights": INT8, "format": "pack-quantized"},
            },
        },
    ),
    "presets": (
        {DOWN: fp8_rows},
        compressed_nvfp4,
        {
            **TENSORS,
            "format": "mixed-precision",
            "config_groups": {"FP8_DYNAMIC": ["re:.*down_proj"], "NVFP4A16": ["Linear"]},
        },
    ),
    "dynamic": (
        {DOWN: gptq_8, QUERY: plain},
        gptq,
        {
            **DYNAMIC,
            "dynamic": {
                r"-:.*\.self_attn\.q_proj": {},
                r"+:.*\.down_proj$": {"bits": 8},
                r".*\.layers\.0\..*": {"bits": 4},
            },
        },
    ),
    "gptq v2 by its newer key": ({}, gptq_v2, {**DYNAMIC, "format": "gptq_v2"}),
    "modules that AWQ does not convert": (
        {DOWN: plain},
        CASES["awq"].write,
        {**CASES["awq"].config, "modules_to_not_convert": ["down_proj"]},
    ),
    "modules that FP8 does not convert": (
        {"gate_proj": plain},
        fp8_tensor,
        {"quant_method": "fp8", "modules_to_not_convert": ["mlp.gate", "mlp.gate_proj", "lm_head"]},
    ),
    "modelopt mixed": ({DOWN: fp8_tensor}, modelopt_nvfp4, FP8_AND_NVFP4),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_each_layer_is_read_as_its_recipe_says(tmp_path: Path, name: str) -> None:
    writers, rest, config = RIGHT[name]
    mixed, same = save_mixed(tmp_path, writers, rest, config)

    assert answers(mixed, dtype="float32") == answers(same, dtype="float32")


WRONG: dict[str, tuple[Mapping[str, Write], Write, dict[str, Any], str]] = {
    "swapped groups": (
        {DOWN: eight_bits},
        four_bits,
        {**PACKED, **groups(a=(["re:.*down_proj$"], INT4), b=(["Linear"], INT8))},
        r"weight_packed has \d+ columns",
    ),
    "one group for layers of 4 and 8 bits": (
        {DOWN: eight_bits},
        four_bits,
        {**PACKED, **groups(a=(["Linear"], INT4))},
        "down_proj: weight_packed has 32 columns, but 128 ints of 4 bits need 16",
    ),
    "a group size that the scales do not have": (
        {},
        four_bits,
        {**PACKED, **groups(a=(["Linear"], {**INT4, "group_size": 64}))},
        "weight_scale has shape .* does not fit",
    ),
    "a layer without a group": (
        {},
        four_bits,
        {**PACKED, **groups(a=(["re:.*mlp.*"], INT4))},
        "q_proj: it is stored quantized, but no rule of quantization_config matches it",
    ),
    "a quantized layer that is ignored": (
        {},
        four_bits,
        {**PACKED, **groups(a=(["Linear"], INT4)), "ignore": ["re:.*up_proj"]},
        "up_proj: it is stored quantized, but quantization_config excludes 're:.*up_proj'",
    ),
    "two groups for a layer": (
        {},
        four_bits,
        {**PACKED, **groups(a=(["re:.*proj"], INT4), b=(["re:.*up.*"], INT8))},
        "up_proj: several rules of quantization_config match it",
    ),
    "zero points that are missing": (
        {},
        four_bits,
        {**PACKED, **groups(a=(["Linear"], {**INT4, "symmetric": False}))},
        "it has no weight_zero_point, but its group has symmetric false",
    ),
    "columns that are missing": (
        {},
        four_bits,
        {**PACKED, **groups(a=(["Linear"], {**INT4, "actorder": "group"}))},
        "it has no weight_g_idx, but its group has actorder group",
    ),
    "integers that are said to be floats": (
        {},
        CASES["w8a8"].write,
        {**TENSORS, **groups(a=(["Linear"], FP8_ROWS))},
        "weight is torch.int8, expected float8_e4m3fn",
    ),
    "scaled weights that are not quantized": (
        {},
        lambda shape: (
            {**plain(shape)[0], "weight_scale": torch.ones(shape[0], 1)},
            plain(shape)[1],
        ),
        {**TENSORS, "format": "dense", **groups(a=(["Linear"], FP8_ROWS))},
        "weight is torch.float32, expected float8_e4m3fn",
    ),
    "rotated weights": (
        {},
        four_bits,
        {
            **PACKED,
            **groups(a=(["Linear"], INT4)),
            "transform_config": {"config_groups": {"a": {}}},
        },
        "transform_config .* is not supported",
    ),
    "an unknown preset": (
        {}, four_bits, {**PACKED, "config_groups": {"W3A16": ["Linear"]}},
        "the preset 'W3A16' is not supported",
    ),
    "an invalid expression": (
        {}, four_bits, {**PACKED, **groups(a=(["re:(("], INT4))}, "invalid regular expression",
    ),
    "3 bits in one group": (
        {}, four_bits,
        {**PACKED, **groups(a=(["Linear"], INT4), b=(["re:x"], {**INT4, "num_bits": 3}))},
        "num_bits 3 is not supported",
    ),
    "dynamic bits that the layer does not have": (
        {}, gptq, {**DYNAMIC, "dynamic": {r"+:.*down_proj": {"bits": 8}}}, "down_proj: qzeros has",
    ),
    "a dynamic exclusion of a quantized layer": (
        {}, gptq, {**DYNAMIC, "dynamic": {r"-:.*up_proj": {}}}, r"excludes '-:\.\*up_proj'",
    ),
    "3 dynamic bits": (
        {}, gptq, {**DYNAMIC, "dynamic": {"+:x": {"bits": 3}}}, "bits 3 is not supported",
    ),
    "two GPTQ formats": (
        {}, gptq, {**DYNAMIC, "format": "gptq_v2", "checkpoint_format": "gptq"}, "different values",
    ),
    "GPTQ groups of another size": (
        {}, gptq, {**DYNAMIC, "group_size": 64}, "group_size is 64",
    ),
    "activation order without g_idx": (
        {},
        lambda shape: (
            {name: part for name, part in gptq(shape)[0].items() if name != "g_idx"},
            gptq(shape)[1],
        ),
        {**DYNAMIC, "desc_act": True},
        "it has no g_idx, but quantization_config has desc_act true",
    ),
    "AWQ groups of another size": (
        {}, CASES["awq"].write, {**CASES["awq"].config, "group_size": 64}, "group_size is 64",
    ),
    "a quantized module that is not converted": (
        {},
        fp8_tensor,
        {"quant_method": "fp8", "modules_to_not_convert": ["mlp.gate_proj"]},
        "gate_proj: it is stored quantized",
    ),
    "modelopt's AWQ": (
        {}, fp8_tensor, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        "quant_algo 'W4A16_AWQ' is not supported; supported: FP8",
    ),
    "modelopt's algorithm of another layer": (
        {DOWN: modelopt_nvfp4}, fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"},
        "down_proj: weight is torch.uint8, expected float8_e4m3fn",
    ),
    "a value of the wrong type": (
        {}, four_bits, {**PACKED, "config_groups": [1]}, "value of the wrong type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_recipe_that_contradicts_the_tensors_is_refused(tmp_path: Path, name: str) -> None:
    writers, rest, config, message = WRONG[name]
    mixed, _ = save_mixed(tmp_path, writers, rest, config)

    with pytest.raises((CheckpointError, UnsupportedModel), match=message):
        answers(mixed, dtype="float32")


def test_settings_of_a_folder_without_quantization_config(tmp_path: Path) -> None:
    """hf_quant_config.json of NVIDIA's Model Optimizer, and the older key compression_config."""
    optimizer = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    modelopt, same = save_mixed(tmp_path / "modelopt", {}, fp8_tensor, {})
    file = modelopt / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": optimizer}))
    compression = {"quant_method": "sparseml", **groups(a=(["Linear"], INT4))}
    older, four = save_mixed(tmp_path / "older", {}, four_bits, {}, compression_config=compression)

    assert answers(modelopt, dtype="float32") == answers(same, dtype="float32")
    assert answers(older, dtype="float32") == answers(four, dtype="float32")
    assert answers(modelopt, quantization="modelopt", dtype="float32")

    file.write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(UnsupportedModel, match="quant_algo 'W4A8_AWQ' is not supported"):
        answers(modelopt, dtype="float32")
    file.unlink()
    with pytest.raises(CheckpointError, match="only quantized weights are, but no quantization"):
        answers(modelopt, dtype="float32")


def test_two_settings_that_differ_are_refused(tmp_path: Path) -> None:
    config = {**PACKED, **groups(a=(["Linear"], INT4))}
    other = {**PACKED, **groups(a=(["Linear"], INT8))}
    mixed, _ = save_mixed(tmp_path, {}, four_bits, config, compression_config=other)

    with pytest.raises(UnsupportedModel, match="several quantization settings"):
        open_checkpoint(mixed, EngineConfig(model="x"))


@pytest.mark.parametrize(
    "found",
    [
        "fp8",
        4,
        {"quant_method": 3},
        {"quant_method": "fp8", "weight_block_size": 5},
        {"quant_method": "gptq", "dynamic": 1},
    ],
)
def test_settings_of_the_wrong_type_are_refused(tmp_path: Path, found: Any) -> None:  # fmt: skip
    mixed, _ = save_mixed(tmp_path, {}, fp8_tensor, found)

    with pytest.raises(PortaLMError, match=r"config.json: quantization_config"):
        open_checkpoint(mixed, EngineConfig(model="x"))

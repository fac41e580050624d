"""The weight that a layer's parts represent, by each format's specification, in plain loops.

`decode` returns None for parts that the specification does not define: a loader must refuse them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Parts = Mapping[str, torch.Tensor]
"""A layer's tensors by the ends of their names."""

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Undefined(Exception):
    """The specification does not define these parts."""


def decode(parts: Parts, config: Mapping[str, Any]) -> np.ndarray | None:
    """The weight, float64 [N, K]; None if parts and config do not fit together."""
    if set(parts) == {"weight"} and parts["weight"].dtype in _FLOATS:
        return parts["weight"].double().numpy()
    readers = {
        "awq": _awq,
        "bitsandbytes": _bitsandbytes,
        "compressed-tensors": _compressed,
        "fbgemm_fp8": _fp8,
        "fp8": _fp8,
        "gptq": _gptq,
        "modelopt": _modelopt,
    }
    read = readers.get(config.get("quant_method", ""))
    try:
        return None if read is None else read(parts, config)
    except (Undefined, IndexError):
        return None


def need(condition: object) -> None:
    if not condition:
        raise Undefined


def words_of(tensor: torch.Tensor) -> np.ndarray:
    need(tensor.dtype == torch.int32 and tensor.ndim == 2)
    return tensor.numpy().astype(np.int64) & 0xFFFFFFFF


def numbers_of(tensor: torch.Tensor, *shape: int) -> np.ndarray:
    need(tensor.dtype in _FLOATS and list(tensor.shape) == list(shape))
    return tensor.double().numpy()


def is_fit(size: int | None, columns: int, count: int) -> bool:
    """Whether groups of `size` columns (-1: all; None: not stated) are `count` in a row."""
    if size is None:
        return True
    return count == (1 if size == -1 else math.ceil(columns / size))


def _gptq(parts: Parts, config: Mapping[str, Any]) -> np.ndarray:
    bits = config.get("bits", 4)
    is_old = config.get("checkpoint_format", config.get("format", "gptq")) == "gptq"
    need(bits in (4, 8) and {"qweight", "qzeros", "scales"} <= set(parts))
    need(set(parts) <= {"qweight", "qzeros", "scales", "g_idx", "input_scale"})
    qweight, qzeros = words_of(parts["qweight"]), words_of(parts["qzeros"])
    per_word, mask = 32 // bits, (1 << bits) - 1
    columns, rows = len(qweight) * per_word, qweight.shape[1]
    count = len(parts["scales"])
    scales = numbers_of(parts["scales"], count, rows)
    need(qzeros.shape == (count, rows // per_word))
    need(is_fit(config.get("group_size"), columns, count))
    if "g_idx" in parts:
        groups = parts["g_idx"]
        need(groups.dtype in (torch.int32, torch.int64) and list(groups.shape) == [columns])
        need(int(groups.min()) >= 0 and int(groups.max()) < count)
        groups = groups.tolist()
    else:
        need(not config.get("desc_act") and columns % count == 0)
        groups = [k // (columns // count) for k in range(columns)]
    weight = np.empty((rows, columns))
    for n in range(rows):
        for k in range(columns):
            g = groups[k]
            code = int(qweight[k // per_word, n]) >> (bits * (k % per_word)) & mask
            zero = int(qzeros[g, n // per_word]) >> (bits * (n % per_word)) & mask
            weight[n, k] = scales[g, n] * (code - ((zero + 1) & mask if is_old else zero))
    return weight


def _awq(parts: Parts, config: Mapping[str, Any]) -> np.ndarray:
    need(set(parts) == {"qweight", "qzeros", "scales"} and config.get("bits", 4) == 4)
    need(config.get("version", "gemm") == "gemm")
    qweight, qzeros = words_of(parts["qweight"]), words_of(parts["qzeros"])
    columns, rows, count = len(qweight), 8 * qweight.shape[1], len(parts["scales"])
    scales = numbers_of(parts["scales"], count, rows)
    need(qzeros.shape == (count, rows // 8) and columns % count == 0)
    need(is_fit(config.get("group_size"), columns, count))
    place = [_AWQ_ORDER.index(i) for i in range(8)]
    weight = np.empty((rows, columns))
    for n in range(rows):
        shift = 4 * place[n % 8]
        for k in range(columns):
            g = k // (columns // count)
            code = int(qweight[k, n // 8]) >> shift & 15
            zero = int(qzeros[g, n // 8]) >> shift & 15
            weight[n, k] = scales[g, n] * (code - zero)
    return weight


def _scaled(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> np.ndarray:
    """Multiply each number by the scale of its block."""
    numbers, factors = weight.double().numpy(), scales.double().numpy()
    need(factors.shape == tuple(math.ceil(n / b) for n, b in zip(weight.shape, block, strict=True)))
    out = np.empty(numbers.shape)
    for n in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[n, k] = numbers[n, k] * factors[n // block[0], k // block[1]]
    return out


def _by_tensor_or_rows(weight: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    need(scales.dtype in _FLOATS and weight.ndim == 2)
    rows, columns = weight.shape
    if scales.numel() == 1:
        return _scaled(weight, scales.reshape(1, 1), (rows, columns))
    need(list(scales.shape) in ([rows], [rows, 1]))
    return _scaled(weight, scales.reshape(-1, 1), (1, columns))


def _fp8(parts: Parts, config: Mapping[str, Any]) -> np.ndarray:
    used = set(parts) - {"input_scale"}
    need(used in ({"weight", "weight_scale"}, {"weight", "weight_scale_inv"}))
    weight = parts["weight"]
    need(weight.dtype in _FP8 and weight.ndim == 2)
    block = config.get("weight_block_size")
    if block is None or "weight_scale" in parts:
        return _by_tensor_or_rows(weight, parts.get("weight_scale", parts.get("weight_scale_inv")))
    scales = parts["weight_scale_inv"]
    need(scales.dtype in _FLOATS)
    return _scaled(weight, scales, tuple(block))


def _nvfp4(pairs: torch.Tensor, scales: torch.Tensor, factor: float) -> np.ndarray:
    need(pairs.dtype == torch.uint8 and scales.dtype in _FP8 and pairs.ndim == 2)
    rows, columns = len(pairs), 2 * pairs.shape[1]
    need(list(scales.shape) == [rows, columns // 16])
    numbers = scales.double().numpy()
    weight = np.empty((rows, columns))
    for n in range(rows):
        for k in range(columns):
            code = int(pairs[n, k // 2]) >> (4 * (k % 2)) & 15
            weight[n, k] = E2M1[code] * numbers[n, k // 16] * factor
    return weight


def _modelopt(parts: Parts, config: Mapping[str, Any]) -> np.ndarray:
    used, algorithm = set(parts) - {"input_scale"}, config["quant_algo"]
    if algorithm == "NVFP4":
        need(used == {"weight", "weight_scale", "weight_scale_2"})
        need(config.get("group_size", 16) == 16)
        factor = parts["weight_scale_2"]
        need(factor.numel() == 1 and factor.dtype in _FLOATS)
        return _nvfp4(parts["weight"], parts["weight_scale"], float(factor))
    need(used == {"weight", "weight_scale"} and parts["weight"].dtype in _FP8)
    is_one = parts["weight_scale"].numel() == 1
    need(algorithm == ("FP8" if is_one else "FP8_PER_CHANNEL_PER_TOKEN"))
    return _by_tensor_or_rows(parts["weight"], parts["weight_scale"])


def _compressed(parts: Parts, config: Mapping[str, Any]) -> np.ndarray:
    [group] = config["config_groups"].values()
    need(group.get("targets") == ["Linear"])
    settings = group["weights"]
    bits, kind, strategy = (settings[name] for name in ("num_bits", "type", "strategy"))
    used = set(parts) - {"input_scale", "input_global_scale", "input_zero_point"}
    if (kind, bits) == ("float", 4):
        need(used == {"weight_packed", "weight_scale", "weight_global_scale"})
        divisor = parts["weight_global_scale"]
        need(strategy == "tensor_group" and divisor.numel() == 1 and divisor.dtype in _FLOATS)
        return _nvfp4(parts["weight_packed"], parts["weight_scale"], 1 / float(divisor))
    if kind == "float":
        need(used == {"weight", "weight_scale"} and parts["weight"].dtype in _FP8)
        if strategy == "block":
            need(parts["weight_scale"].dtype in _FLOATS)
            block = tuple(settings["block_structure"])
            return _scaled(parts["weight"], parts["weight_scale"], block)
        need(strategy in ("tensor", "channel"))
        return _by_tensor_or_rows(parts["weight"], parts["weight_scale"])
    has_zeros = "weight_zero_point" in parts
    need(has_zeros or settings.get("symmetric", True))
    if "weight" in parts:
        need(used <= {"weight", "weight_scale", "weight_zero_point"} and "weight_scale" in parts)
        need(
            parts["weight"].dtype == torch.int8 and bits == 8 and strategy in ("tensor", "channel")
        )
        need(not has_zeros)  # none of the changes adds one that fits
        return _by_tensor_or_rows(parts["weight"], parts["weight_scale"])
    return _packed(parts, used, settings, bits)


def _packed(parts: Parts, used: set[str], settings: Mapping[str, Any], bits: int) -> np.ndarray:
    need({"weight_packed", "weight_scale", "weight_shape"} <= used)
    need(used <= {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"})
    shape = parts["weight_shape"]
    need(list(shape.shape) == [2] and not shape.is_floating_point())
    rows, columns = shape.tolist()
    packed, per_word = words_of(parts["weight_packed"]), 32 // bits
    need(packed.shape == (rows, columns // per_word) and settings["strategy"] == "group")
    count = parts["weight_scale"].shape[-1]
    scales = numbers_of(parts["weight_scale"], rows, count)
    need(is_fit(settings["group_size"], columns, count) and columns % count == 0)
    zeros = None
    if "weight_zero_point" in parts:
        zeros = words_of(parts["weight_zero_point"])
        need(zeros.shape == (rows // per_word, count))
    mask = (1 << bits) - 1
    weight = np.empty((rows, columns))
    for n in range(rows):
        for k in range(columns):
            g = k // (columns // count)
            code = int(packed[n, k // per_word]) >> (bits * (k % per_word)) & mask
            zero = 1 << (bits - 1)
            if zeros is not None:
                zero = int(zeros[n // per_word, g]) >> (bits * (n % per_word)) & mask
            weight[n, k] = scales[n, g] * (code - zero)
    return weight


def _bitsandbytes(parts: Parts, config: Mapping[str, Any]) -> np.ndarray:
    if "SCB" in parts:
        need(
            set(parts) <= {"weight", "SCB", "weight_format"} and parts["weight"].dtype == torch.int8
        )
        need(list(parts["SCB"].shape) == [len(parts["weight"])])
        largest = numbers_of(parts["SCB"], len(parts["weight"]))
        return parts["weight"].double().numpy() * (largest[:, None] / 127)
    state_name = "weight.quant_state.bitsandbytes__nf4"
    names = {"weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
             "weight.nested_quant_map", state_name}  # fmt: skip
    need(set(parts) == names and parts["weight"].dtype == torch.uint8)
    need(parts[state_name].dtype == torch.uint8)
    try:
        state = json.loads(bytes(parts[state_name].tolist()))
    except ValueError:
        raise Undefined from None
    packed, count = parts["weight"].flatten(), math.prod(state["shape"])
    absmax = parts["weight.absmax"]
    need(absmax.dtype == torch.uint8 and list(absmax.shape) == [count // state["blocksize"]])
    levels = numbers_of(parts["weight.quant_map"], 16)
    outer_levels = numbers_of(parts["weight.nested_quant_map"], 256)
    num_outer = math.ceil(len(absmax) / state["nested_blocksize"])
    outer = numbers_of(parts["weight.nested_absmax"], num_outer)
    need(len(packed) * 2 == count)
    weight = np.empty(count)
    for i in range(count):
        block = i // state["blocksize"]
        scale = outer_levels[int(absmax[block])] * outer[block // state["nested_blocksize"]]
        code = int(packed[i // 2]) >> (4 if i % 2 == 0 else 0) & 15
        weight[i] = levels[code] * (scale + state["nested_offset"])
    return weight.reshape(state["shape"])

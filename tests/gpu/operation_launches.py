"""Launches of the operations' kernels, which kernel_budgets compiles for each target."""

from __future__ import annotations

from typing import Any

import torch

from portalm.backend import QUANTIZED_FORMATS
from portalm_backends.gpu_common.archs import CUDA, ROCM
from portalm_backends.gpu_common.kernels import (
    adjust,
    fp8,
    gemv,
    logprobs,
    matmul,
    moe,
    norms,
    rope,
    sampling,
    silu_mul,
)

ARCHS = CUDA | ROCM
_FLOAT, _INT, _LONG, _HALF = "*fp32", "*i32", "*i64", "*bf16"


def _types(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, kind)


def _sampling() -> dict[str, dict[str, Any]]:
    rows = {
        **_types(_FLOAT, "scores_ptr", "temperature_ptr", "top_p_ptr", "min_p_ptr"),
        **_types(_INT, "top_k_ptr", "left_out_ptr", "targets_ptr", "out_ptr"),
        **_types(_LONG, "seed_ptr", "position_ptr", "best_ptr", "kept_ptr"),
        "mass_ptr": _FLOAT,
        **_types("i32:16", "vocab_size", "row_stride"),
        "num_chunks": "i32",
    }
    logs = {
        **_types(_FLOAT, "raw_ptr", "tops_ptr", "masses_ptr", "logprobs_ptr", "top_logprobs_ptr"),
        **_types(_INT, "token_ids_ptr", "ahead_ptr", "ranks_ptr", "top_ids_ptr"),
        **_types("i32:16", "vocab_size", "row_stride"),
        **_types("i32", "num_top", "num_chunks"),
        "bests_ptr": _LONG,
    }
    changes = {
        **_types(_FLOAT, "logits_ptr", "scores_ptr", "presence_ptr", "frequency_ptr"),
        **_types(_FLOAT, "repetition_ptr", "values_ptr"),
        **_types(_INT, "counts_ptr", "masks_ptr", "ids_ptr", "rows_ptr"),
        **_types("i32:16", "vocab_size", "row_stride", "mask_stride"),
        **_types("i32", "width", "count"),
    }
    chunk = {"CHUNK": sampling.CHUNK}
    kept = {"CANDIDATES": sampling.CANDIDATES}
    both = {"HAS_PENALTIES": True, "HAS_MASK": True}
    block = {"BLOCK": adjust.BLOCK}
    return {
        "sampling, scan": _launch(sampling._scan, rows, chunk | kept, 8),
        "sampling, choose": _launch(
            sampling._choose,
            rows,
            kept | {"NUM_CHUNKS": 32, "SEARCHED": sampling.SEARCHED, "HAS_TARGETS": True},
            8,
        ),
        "sampling, adjust": _launch(adjust._apply, changes, both | {"CHUNK": adjust.CHUNK}),
        "sampling, count": _launch(adjust._count, changes, block | {"IS_PROMPT": True}),
        "sampling, bias": _launch(adjust._add, changes, block | {"HAS_MASK": True}),
        "logprobs, scan": _launch(logprobs._scan, logs, {"CHUNK": logprobs.CHUNK}, 8),
        "logprobs, merge": _launch(logprobs._merge, logs, {"NUM_CHUNKS": 32, "NUM_BESTS": 1024}),
    }


def _layers() -> dict[str, dict[str, Any]]:
    norm = {
        **_types(_HALF, "x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "out_ptr", "total_ptr"),
        **_types("i32:16", "outer", "residual_outer", "inner", "residual_inner", "width"),
        **_types("i32", "num_rows"),
        **_types(_HALF, "values_ptr", "scales_ptr"),
        "eps": "fp32",
    }
    turn = {
        **_types(_HALF, "query_ptr", "key_ptr", "query_out_ptr", "key_out_ptr"),
        **_types("i32:16", "query_stride", "query_head_stride", "key_stride", "key_head_stride"),
        **_types("i32", "num_heads", "num_kv_heads", "query_programs"),
        "positions_ptr": _INT,
        "cos_sin_ptr": _FLOAT,
    }
    row = {"ROWS": 1, "BLOCK": 4096, "group": 1}
    head = {"SIZE": 128, "ROTARY": 128, "HALF": 64, "REST": 0, "HEADS": 8}
    rows = {
        **_types("i32:16", "width", "row_stride"),
        **_types(_HALF, "gate_up_ptr", "out_ptr", "values_ptr", "scales_ptr"),
    }
    return {
        "rms_norm": _launch(norms._norm, norm, row | _flags(False, False), 8),
        "add_rms_norm": _launch(norms._norm, norm, row | _flags(True, False), 8),
        "layer_norm": _launch(norms._norm, norm, row | _flags(False, True), 8),
        "rms_norm of heads": _launch(
            norms._norm, norm | {"group": "i32"}, {"ROWS": 16, "BLOCK": 128} | _flags(False, False)
        ),
        "silu_mul": _launch(silu_mul._silu_mul, rows, {"BLOCK": silu_mul._BLOCK, "LARGEST": 0.0}),
        "rope, halves": _launch(rope._rope, turn, head | {"IS_INTERLEAVED": False}),
        "rope, interleaved": _launch(rope._rope, turn, head | {"IS_INTERLEAVED": True}),
    }


def _flags(has_residual: bool, has_bias: bool) -> dict[str, Any]:
    return {"HAS_RESIDUAL": has_residual, "HAS_BIAS": has_bias, "LARGEST": 0.0}


def _products() -> dict[str, dict[str, Any]]:
    found = {}
    for name, bits, group, has_minimums in (
        ("int4", 4, 32, False),
        ("int4_min", 4, 32, True),
        ("int8", 8, 32, False),
        ("int8_g16", 8, 16, False),
        ("int8_min", 8, 32, True),
        ("int8_g16_min", 8, 16, True),
        ("bf16 into float32", 16, matmul._PLAIN_GROUP, False),
    ):
        types = {
            **_types(_HALF, "x_ptr", "bias_ptr"),
            **_types("*fp16", "scales_ptr", "minimums_ptr"),
            **_types("i32:16", "n", "k", "x_stride"),
            **_types("i32", "m", "num_groups", "part"),
            "values_ptr": _HALF if bits == 16 else "*i8",
            "out_ptr": _FLOAT,
        }
        for block_m in (16, 128):
            constants = {
                "GROUP": group,
                "BITS": bits,
                "HAS_MINIMUMS": has_minimums,
                "HAS_BIAS": False,
                "BLOCK_M": block_m,
                "BLOCK_N": 64,
            }
            num_warps = 4 if block_m < 64 else 8
            found[f"linear, {name}, {block_m} rows"] = _launch(
                matmul._matmul, types, constants, num_warps, 3
            )
    parts = {
        **_types(_HALF, "bias_ptr", "out_ptr"),
        **_types("i32", "m", "num_parts"),
        "parts_ptr": _FLOAT,
        "n": "i32:16",
    }
    found["linear, parts"] = _launch(matmul._add_parts, parts, {"HAS_BIAS": False, "BLOCK": 256})
    return found


def few_rows(target: str, rows: int, dtype: str, *, is_even: bool = True) -> dict[str, Any]:
    """A launch of `gemv.gemv` with as many rows of the weight as its registers allow."""
    pointer, itemsize = {"bf16": (_HALF, 2), "fp32": (_FLOAT, 4)}[dtype]
    many, k = 1_000_000, 8192 if is_even else 8208
    _, block_n, block_k, _, _ = gemv.shape_of(
        rows, many, k, itemsize=itemsize, num_cores=1, warp_size=ROCM[target].warp_size
    )
    types = {
        **_types(pointer, "x_ptr", "weight_ptr", "bias_ptr", "out_ptr"),
        **_types("i32:16", "n", "k", "x_stride"),
        **_types("i32", "m", "blocks_per_part"),
    }
    constants = {
        "ROWS": rows,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "VECTOR": 16 // itemsize,
        "IS_EVEN": is_even,
        "HAS_BIAS": True,
    }
    return _launch(gemv._gemv, types, constants, gemv.NUM_WARPS)


def _sorting() -> dict[str, dict[str, Any]]:
    ids = {
        **_types(_INT, "ids_ptr", "choices_ptr", "tile_experts_ptr", "num_tiles_ptr"),
        **_types("i32", "num_choices", "num_experts"),
    }
    bins = {"ROWS": 16, "BINS": 256, "CHUNK": moe.CHUNK}
    sums = {**_types(_HALF, "results_ptr", "out_ptr"), "weights_ptr": _FLOAT, "width": "i32:16"}
    return {
        "moe, sort": _launch(moe._sort, ids, bins, 8),
        "moe, add up": _launch(moe._add_up, sums, {"TOP_K": 8, "BLOCK": 1024}),
    }


VALUES = {
    "bf16": (_HALF, torch.bfloat16),
    "fp32": (_FLOAT, torch.float32),
    "fp8": ("*fp8e4nv", torch.float8_e4m3fn),
}
"""Types of experts' values, as Triton pointer and torch dtype; all others are quantized codes."""


def experts(
    target: str, rows: int, form: str = "bf16", *, is_gated: bool = True, has_all: bool = False
) -> dict[str, Any]:
    """A launch of `moe.product`; `has_all`: with the biases and the clamped gate of gpt-oss."""
    pointer, dtype = VALUES.get(form, ("*i8", torch.int8))
    family = ARCHS[target].family
    shape = moe.launch_shape(rows, dtype, family, is_gated=is_gated)
    is_float = form in VALUES
    computed = _FLOAT if form == "fp32" else _HALF
    types = {
        **_types(computed, "bias_ptr", "out_ptr"),
        **_types("*fp32" if is_float else "*fp16", "scales_ptr", "minimums_ptr"),
        **_types(_INT, "choices_ptr", "tile_experts_ptr", "num_tiles_ptr"),
        **_types("i32:16", "n", "k", "x_stride"),
        **_types("i32", "num_choices", "num_experts", "num_groups"),
        **_types("fp32", "limit", "alpha"),
        "values_ptr": pointer,
        "x_ptr": pointer if form == "fp8" else computed,
        "x_scales_ptr": _FLOAT,
        "addresses_ptr": _LONG,
    }
    constants = {
        "GROUP": shape.columns if is_float else QUANTIZED_FORMATS[form],
        "BITS": 16 if is_float else 4 if form.startswith("int4") else 8,
        "HAS_MINIMUMS": form.endswith("_min"),
        "HAS_SCALES": form == "fp8",
        "HAS_BIAS": has_all,
        "IS_GATED": is_gated,
        "IS_CLAMPED": has_all,
        "ALIGNMENT": 16,
        "BAND": moe.BAND,
        "ROWS": rows,
        "BLOCK_N": shape.block_n,
        "DIES": 8 if ARCHS[target].cores_per_die else 1,
    }
    if is_gated:  # several choices read the same row of x
        types["choices_per_row"] = "i32"
    else:
        constants["choices_per_row"] = 1
    return _launch(moe._product, types, constants, shape.num_warps, shape.num_stages)


def _launch(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


OPERATIONS: dict[str, dict[str, Any]] = _sampling() | _layers() | _products() | _sorting()
"""Arguments of `kernel_budgets.Launch` by name, equal for all targets."""

EXPERTS: dict[str, dict[str, Any]] = {
    **{f"moe, {rows} rows": {"rows": rows} for rows in (16, 64, 128)},
    **{f"moe, down, {rows} rows": {"rows": rows, "is_gated": False} for rows in (16, 64, 128)},
    **{
        f"moe, {form}, {rows} rows": {"rows": rows, "form": form}
        for form in QUANTIZED_FORMATS
        for rows in ((16, 64, 128) if form == "int4_min" else (16, 128))
    },
    **{
        f"moe, int4_min, down, {r} rows": {"rows": r, "form": "int4_min", "is_gated": False}
        for r in (16, 128)
    },
    "moe, gpt-oss, 16 rows": {"rows": 16, "has_all": True},
    "moe, gpt-oss, 128 rows": {"rows": 128, "has_all": True},
    "moe, fp32, 16 rows": {"rows": 16, "form": "fp32"},
    "moe, fp32, 128 rows": {"rows": 128, "form": "fp32"},
}
"""Arguments of `experts` by name; unless the name says "down", the weights are gate and up."""

FEW_ROWS: dict[str, dict[str, Any]] = {
    "linear, bf16, 1 row": {"rows": 1, "dtype": "bf16"},
    "linear, bf16, 4 rows": {"rows": 4, "dtype": "bf16"},
    "linear, bf16, 4 rows, rest of K": {"rows": 4, "dtype": "bf16", "is_even": False},
    "linear, fp32, 4 rows": {"rows": 4, "dtype": "fp32"},
}
"""Arguments of `few_rows` by name, for AMD's targets."""

FP8_EXPERTS = {f"moe, fp8, {rows} rows": {"rows": rows, "form": "fp8"} for rows in (16, 128)}

_CODES = {"values_ptr": "*fp8e4nv", "scales_ptr": _FLOAT}
_INTO_FP8 = {"LARGEST": 448.0}

FP8_OPERATIONS = {
    "linear, quantize to fp8": _launch(
        fp8._quantize,
        {**_types("i32:16", "width", "row_stride"), "x_ptr": _HALF, **_CODES},
        _INTO_FP8 | {"BLOCK": 4096},
        8,
    ),
    **{
        f"{name} to fp8": how
        | {"signature": how["signature"] | _CODES, "constants": how["constants"] | _INTO_FP8}
        for name, how in _layers().items()
        if name in ("rms_norm", "add_rms_norm")
    },
    "silu_mul to fp8": _launch(
        silu_mul._silu_mul,
        _layers()["silu_mul"]["signature"] | _CODES,
        _INTO_FP8 | {"BLOCK": 16384},
        16,
    ),
}
"""Launches for targets with the 8-bit floats that checkpoints use."""

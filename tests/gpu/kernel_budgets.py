"""Compile every GPU kernel for every target and compare its resources with kernel_budgets.json.

`python -m tests.gpu.kernel_budgets` prints the resources of each kernel and fails if one is over
its budget; with `--write` it rewrites the table instead. Nothing is run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from portalm_backends.gpu_common import tiles
from portalm_backends.gpu_common.archs import CUDA
from portalm_backends.gpu_common.kernels import kv_cache, paged_attention
from portalm_backends.gpu_common.kernels.kv_codes import FP8, INT8
from tests.gpu import dependent_launch_rule
from tests.gpu.operation_launches import (
    EXPERTS,
    FEW_ROWS,
    FP8_EXPERTS,
    FP8_OPERATIONS,
    OPERATIONS,
    experts,
    few_rows,
)
from tests.gpu.triton_targets import ARCHS, SHARED_LIMIT, TARGETS, Compiled, compile_for

TABLE = Path(__file__).with_suffix(".json")

Budgets = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A kernel with the argument types, constants and options of one launch."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def compile(self, target: str) -> Compiled:
        return compile_for(
            self.kernel,
            self.signature,
            self.constants,
            target,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **self.options,
        )


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_ATTENTION_TYPES = {
    "out": "*bf16",
    "query": "*bf16",
    "cache": "*bf16:large",
    "scales": "*bf16",
    "partials": "*fp32",
    "part_weights": "*fp32",
    "table": "*i32",
    "items": "*i32",
    "merges": "*i32",
    "slopes": "*fp32",
    "sinks": "*fp32",
    "query_stride": "i32:16",
    "table_stride": "i32",
    "score_scale": "fp32",
    "cap": "fp32",
    "window": "i32",
}


def attention(
    target: str,
    kind: str,
    *,
    head_size: int = 128,
    value_size: int | None = None,
    block_size: int = 16,
    group: int = 4,
    dtype: str = "bf16",
    codes: int = 0,
    has_all: bool = False,
) -> Launch:
    """`attention.attend` for a decode (narrow) or a prompt (wide)."""
    family = ARCHS[target].family
    shape = tiles.tile_shape(kind, family, DTYPES[dtype], head_size, group, codes != 0)
    item_tokens = 1 if kind == "narrow" else max(1, 128 // group)
    rest = 0 if value_size is None else head_size - value_size
    types = _ATTENTION_TYPES | dict.fromkeys(("query", "out"), f"*{dtype}")
    return Launch(
        kernel=paged_attention.attention_kernel,
        signature=types | {"cache": "*i8:large" if codes else f"*{dtype}:large"},
        constants={
            "GROUP": group,
            "NUM_KV_HEADS": 8,
            "SHARING": 8 if rest else 1,
            "D": head_size,
            "V": head_size - rest,
            "VP": 1 << (head_size - rest - 1).bit_length(),
            "REST": rest,
            "BLOCK": block_size,
            "TILE": shape.tile,
            "ROWS": shape.rows,
            "TOKENS": min(shape.rows // group, item_tokens),
            "ITEM_TOKENS": item_tokens,
            "IS_WIDE": kind == "wide",
            "OVERLAPS": shape.overlaps and kind == "wide" and not rest,
            "HAS_CAP": has_all,
            "HAS_WINDOW": has_all,
            "HAS_ALIBI": has_all,
            "HAS_SINKS": has_all,
            "CODES": codes,
            "DIES": 8 if ARCHS[target].cores_per_die else 1,
            "PILES": 1,
        },
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        options=shape.options(),
    )


def _merge(target: str) -> Launch:
    return Launch(
        kernel=paged_attention.merge_kernel,
        signature=_ATTENTION_TYPES,
        constants={
            "GROUP": 4,
            "GROUP_PADDED": 4,
            "NUM_KV_HEADS": 8,
            "D": 128,
            "DP": 128,
            "ITEM_TOKENS": 1,
            "HAS_SINKS": False,
        },
    )


def _rows(*names: str) -> dict[str, str]:
    """Types of tensors and their row strides."""
    strides = {f"{name}_stride": "i32:16" for name in names}
    return dict.fromkeys(names, "*bf16") | strides


def encoder(target: str, *, head_size: int = 64, dtype: str = "bf16") -> Launch:
    """`attention.attend_encoder`."""
    shape = tiles.tile_shape("encoder", ARCHS[target].family, DTYPES[dtype], head_size, 1)
    types = _rows("query", "key", "value") | dict.fromkeys(("query", "key", "value"), f"*{dtype}")
    return Launch(
        kernel=paged_attention.encoder_kernel,
        signature={
            **types,
            "out": f"*{dtype}",
            "query_start_loc": "*i32",
            "score_scale": "fp32",
            "window": "i32",
        },
        constants={
            "GROUP": 1,
            "NUM_KV_HEADS": 12,
            "D": head_size,
            "DP": head_size,
            "TILE": shape.tile,
            "ROWS": shape.rows,
            "TOKENS": shape.rows,
            "HAS_WINDOW": False,
        },
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        options=shape.options(),
    )


def _write(target: str, codes: int = 0) -> Launch:
    return Launch(
        kernel=kv_cache.write_kernel,
        signature={
            **_rows("key", "value"),
            "cache": "*i8:large" if codes else "*bf16:large",
            "scales": "*bf16",
            "slots": "*i32",
        },
        constants={
            "NUM_KV_HEADS": 8,
            "HEADS_PADDED": 8,
            "D": 128,
            "DP": 128,
            "BLOCK": 16,
            "LARGEST": 448.0,
            "CODES": codes,
            "PLANES": 2,
        },
        options={"enable_fp_fusion": False},
    )


def _rotate_write(target: str) -> Launch:
    targets = {"query_out": "*bf16", "cache": "*bf16:large"}
    indices = {"slots": "*i32", "positions": "*i32", "cos_sin": "*fp32"}
    return Launch(
        kernel=kv_cache.rotate_write_kernel,
        signature={**_rows("query", "key", "value"), **targets, **indices},
        constants={
            "GROUP": 4,
            "GROUP_PADDED": 4,
            "NUM_KV_HEADS": 8,
            "D": 128,
            "DP": 128,
            "R": 128,
            "HALF_PADDED": 64,
            "REST_PADDED": 0,
            "BLOCK": 16,
            "IS_INTERLEAVED": False,
        },
        num_warps=1,
    )


def _copy(target: str) -> Launch:
    return Launch(
        kernel=kv_cache.copy_kernel,
        signature={
            "cache": "*i32:large",
            "source": "*i32",
            "destination": "*i32",
            "layer_words": "i64:16",
            "block_words": "i32:16",
        },
        constants={"WORDS": 4096},
    )


LAUNCHES: dict[str, Callable[[str], Launch]] = {
    "attention, decode": lambda target: attention(target, "narrow"),
    "attention, decode, all features": lambda t: attention(t, "narrow", has_all=True),
    "attention, decode, blocks of 64": lambda t: attention(t, "narrow", block_size=64),
    "attention, decode, head 64": lambda t: attention(t, "narrow", head_size=64),
    "attention, decode, head 256": lambda t: attention(t, "narrow", head_size=256),
    "attention, decode, fp32": lambda t: attention(t, "narrow", dtype="fp32"),
    "attention, prefill": lambda t: attention(t, "wide"),
    "attention, prefill, all features": lambda t: attention(t, "wide", has_all=True),
    "attention, prefill, head 64": lambda t: attention(t, "wide", head_size=64),
    "attention, prefill, head 256": lambda t: attention(t, "wide", head_size=256),
    "attention, prefill, fp32": lambda t: attention(t, "wide", dtype="fp32"),
    "attention, merge": _merge,
    "attention, encoder": encoder,
    "cache, write": _write,
    "cache, rotate and write": _rotate_write,
    "cache, copy": _copy,
    "attention, decode, int8 cache": lambda t: attention(t, "narrow", codes=INT8),
    "attention, decode, fp8 cache": lambda t: attention(t, "narrow", codes=FP8),
    "attention, prefill, int8 cache": lambda t: attention(t, "wide", codes=INT8),
    "attention, prefill, fp8 cache": lambda t: attention(t, "wide", codes=FP8),
    "cache, write codes": lambda t: _write(t, codes=FP8),
}
"""Functions from a target to the kernel's launch there, by name."""

FP8_TARGETS = (*(name for name in CUDA if int(name[3:]) >= 89), "gfx950")
"""Targets whose instructions support the 8-bit floats that checkpoints use."""

SIBLINGS = ("sm_86", "sm_89", "sm_103", "sm_110", "sm_120", "sm_121")
"""Targets on which only `OF_SIBLINGS` are compiled: their other kernels have the sizes of sm_80, 90
or 100, and need less shared memory than the smallest GPUs have."""

OF_SIBLINGS = (
    *(f"attention, {kind}{case}" for kind in ("decode", "prefill")
      for case in ("", ", head 256", ", int8 cache", ", fp8 cache")),
    "attention, encoder",
    "cache, write codes",
)  # fmt: skip

LATENT = {"head_size": 576, "value_size": 512, "group": 16}
"""DeepSeek's attention: 16 of its 128 query heads per program."""

LATENT_LAUNCHES: dict[str, Callable[[str], Launch]] = {
    "attention, decode, latent": lambda t: attention(t, "narrow", **LATENT),
    "attention, prefill, latent": lambda t: attention(t, "wide", **LATENT),
}

LATENT_TARGETS = ("sm_90", "gfx942")
"""Targets on which latent attention is compiled: one per maker."""


def launches(target: str) -> dict[str, Callable[[str], Launch]]:
    """All launches that are compiled for a target."""
    if target in SIBLINGS:
        return {name: LAUNCHES[name] for name in OF_SIBLINGS}
    operations = OPERATIONS | (FP8_OPERATIONS if target in FP8_TARGETS else {})
    found = LAUNCHES | {name: partial(_same, how) for name, how in operations.items()}
    of_experts = EXPERTS | (FP8_EXPERTS if target in FP8_TARGETS else {})
    found |= {name: partial(_experts, how) for name, how in of_experts.items()}
    if target.startswith("gfx"):
        found |= {name: partial(_few_rows, how) for name, how in FEW_ROWS.items()}
    return found | (LATENT_LAUNCHES if target in LATENT_TARGETS else {})


def _same(how: dict[str, Any], target: str) -> Launch:
    """A launch that is the same on every target."""
    return Launch(**how)


def _experts(how: dict[str, Any], target: str) -> Launch:
    """A product of experts, with the tile sizes for the target."""
    return Launch(**experts(target, **how))


def _few_rows(how: dict[str, Any], target: str) -> Launch:
    return Launch(**few_rows(target, **how))


def measure(target: str, name: str) -> tuple[dict[str, int], list[str]]:
    """Compile one kernel; return its resources and where it breaks dependent_launch.py's rule."""
    compiled = launches(target)[name](target).compile(target)
    found = dependent_launch_rule.faults(compiled.assembly, is_dependent=compiled.is_dependent)
    return dataclasses.asdict(compiled.resources), [f"{name} on {target}: {f}" for f in found]


def over_budget(target: str, name: str, taken: dict[str, int]) -> list[str]:
    """Describe each resource above its budget, with a slack of 8 registers and 1/8 shared memory.

    The slack allows for other compiler releases; spills have none.
    """
    allowed = json.loads(TABLE.read_text())[name].get(target)
    if allowed is None:
        return [f"{name} on {target}: no budget; write it with --write"]
    limits = {
        "registers": allowed["registers"] + 8,
        "shared": min(allowed["shared"] * 9 // 8, SHARED_LIMIT[target]),
        "spills": allowed["spills"],
    }
    return [
        f"{name} on {target}: {taken[what]} {what}, {limit} allowed"
        for what, limit in limits.items()
        if taken[what] > limit
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    arguments = parser.parse_args()
    table: Budgets = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    failures: list[str] = []
    for target in arguments.targets:
        for name in launches(target):
            if arguments.only not in name:
                continue
            taken, faults = measure(target, name)
            failures += faults
            print(f"{target:8} {name:34} {taken}", flush=True)
            if arguments.write:
                table.setdefault(name, {})[target] = taken
                TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            else:
                failures += over_budget(target, name, taken)
    print("\n".join(failures))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

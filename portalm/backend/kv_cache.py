"""The KV cache: its shape, and the data types that it may store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

KV: TypeAlias = Any
"""The KV cache: a handle private to its backend, passed in and returned (never copied)."""

SCALED_KV_DTYPES = {"int8": 127.0, "fp8": 448.0}
"""8-bit data types of keys and values, each with its largest code: integers, or float8 (e4m3fn).

The key or value of one token and one KV head, x [D], is stored as D codes and one scale, computed
in float32 when it is written:

    scale = max |x| * (1 / largest code), rounded to bfloat16
    code  = x * (1 / scale), rounded to nearest, ties to even

A scale below 2^-100 becomes 0, and so do its codes. If x contains a NaN or an infinity, the scale
is NaN, and so is every value read back. Values read back are code * scale, exact in float32;
written again, they give the same codes and scale. A device may store scales in a wider float than
bfloat16. docs/adr/0026-kv-scale-per-token-and-head.md gives the reasons.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """The shape of a KV cache."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    """Name of a float type, or one of `SCALED_KV_DTYPES`."""
    shares_values: bool = False
    """A token's value is (the beginning of) its key, so that the cache stores only keys."""

    @property
    def num_planes(self) -> int:
        """Number of vectors [D] stored per token and KV head: key and value, or one for both."""
        return 1 if self.shares_values else 2

    @property
    def wire_dtype(self) -> str:
        """Data type of `kv_export` and `kv_import`; 8-bit codes travel as their float32 values."""
        return "float32" if self.dtype in SCALED_KV_DTYPES else self.dtype

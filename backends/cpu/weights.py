"""Linear weights in the formats of the native kernels (csrc_cpu/kernels.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from portalm.backend import QuantizedWeight
from portalm_backends.cpu.memory import Arena

EXACT_FORMATS = {
    "int8": "q8_x16",
    "int4": "q4_x16",
    "int4_min": "q4_min_x16",
    "int8_g16": "q8_16_x16",
    "int8_min": "q8_min_x16",
    "int8_g16_min": "q8_16_min_x16",
}
"""Native formats (csrc_cpu/kernels.h) of a checkpoint's own codes: 15-bit activations."""
ROUNDED_FORMATS = EXACT_FORMATS | {"int8": "q8", "int4": "q4", "int4_min": "q4_min"}
"""Native formats of weights that are quantized here: 8-bit activations where that is faster."""


@dataclass(slots=True, frozen=True)
class CpuWeight:
    """A linear weight [N, K] in panels of rows (csrc_cpu/linear.h)."""

    data: torch.Tensor
    ptr: int
    format: int
    """Number of the native format, `_cpu.FORMATS`."""
    n: int
    k: int


class WeightPacker:
    """Packs weights into memory of one arena."""

    def __init__(self, native: Any) -> None:
        """Pack with the kernels of the native module `native`."""
        self._native = native
        self._arena = Arena("the weights")

    def pack(
        self, weight: torch.Tensor, *, quantization: str | None, for_logits: bool
    ) -> CpuWeight:
        """Pack a float weight [N, K], rounded to the format `quantization` if that is not None."""
        weight = weight.contiguous()
        dtype = str(weight.dtype).removeprefix("torch.")
        if quantization is not None:
            packed = self._reserve(ROUNDED_FORMATS[quantization], *weight.shape)
        elif dtype == "bfloat16" and not for_logits:
            packed = self._reserve("blocks", *weight.shape)
        else:  # logits decide between tokens: exact
            packed = self._reserve(dtype, *weight.shape)
        self._native.pack(
            source=weight.data_ptr(),
            dtype=self._native.DTYPES[dtype],
            n=packed.n,
            k=packed.k,
            packed=packed.ptr,
            format=packed.format,
        )
        return packed

    def pack_codes(self, weight: QuantizedWeight, *, is_rounded: bool) -> CpuWeight:
        """Pack the codes of a weight [N, K]: a checkpoint's, or `is_rounded` by this program."""
        formats = ROUNDED_FORMATS if is_rounded else EXACT_FORMATS
        packed = self._reserve(formats[weight.format], *weight.shape)
        codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
        minimums = None if weight.minimums is None else weight.minimums.contiguous()
        self._native.pack_codes(
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            minimums=0 if minimums is None else minimums.data_ptr(),
            n=packed.n,
            k=packed.k,
            packed=packed.ptr,
            format=packed.format,
        )
        return packed

    def _reserve(self, format: str, n: int, k: int) -> CpuWeight:
        """Allocate memory for a weight in a native format."""
        number = self._native.FORMATS[format]
        data = self._arena.take(self._native.packed_bytes(number, n, k))
        return CpuWeight(data, data.data_ptr(), number, n, k)

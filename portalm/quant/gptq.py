"""GPTQ: 4-bit or 8-bit codes with a scale and a zero point per group.

Frantar et al., "GPTQ", 2022; stored in AutoGPTQ's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portalm.quant.scheme import (
    LayerParts,
    Weight,
    dequantized_by_column,
    grouped,
    setting,
    unpacked,
)


class GPTQ:
    """qweight int32 [K bits / 32, N], qzeros int32 [G, N bits / 32], scales [G, N], g_idx [K].

    g_idx is the group of each column. In checkpoints with desc_act the columns of a group are not
    adjacent; `QuantizedWeight` cannot hold that, so these weights are dequantized.
    """

    name = "gptq"
    separator = "."
    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    unused = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check a quantization_config; raise `UnsupportedModel` for other bit widths."""
        self._bits = setting(config, "bits", (4, 8), 4)
        form = setting(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        self._zero_offset = 1 if form == "gptq" else 0  # "gptq" stores zero - 1

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [N, K]: scale * (code - zero)."""
        per_word = 32 // self._bits
        qweight = parts.get("qweight", None, None)
        num_columns, num_rows = len(qweight) * per_word, qweight.shape[1]
        scales = parts.get("scales", None, num_rows).T  # [N, G]
        num_groups = scales.shape[1]
        codes = unpacked(qweight, self._bits, along_rows=True).T  # [N, K]
        zeros = unpacked(
            parts.get("qzeros", num_groups, num_rows // per_word), self._bits, along_rows=False
        ).T.int()
        # a zero of 0 is stored as all ones in "gptq"
        zeros = (zeros + self._zero_offset) & ((1 << self._bits) - 1)
        groups = torch.arange(num_columns) // -(-num_columns // num_groups)
        if parts.has("g_idx"):
            named = parts.get("g_idx", num_columns)
            if int(named.min()) < 0 or int(named.max()) >= num_groups:
                raise parts.error(f"g_idx has a group outside 0 to {num_groups - 1}")
            if not torch.equal(named.long(), groups):
                return dequantized_by_column(codes, scales, zeros, named.long())
        if num_columns % num_groups:
            raise parts.error(f"{num_columns} columns cannot be split into {num_groups} groups")
        is_symmetric = bool((zeros == 1 << (self._bits - 1)).all())
        return grouped(codes, scales, bits=self._bits, zeros=None if is_symmetric else zeros)

"""GPTQ: 4 or 8 bits by groups. Frantar et al., "GPTQ", 2022; the layout of AutoGPTQ's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portalm.quant.scheme import LayerParts, Weight, grouped, of_columns, setting, unpacked


class GPTQ:
    """qweight int32 [K bits / 32, N], qzeros int32 [G, N bits / 32], scales [G, N], g_idx [K].

    g_idx names the group of each column. Where columns were rounded by how much they count
    (desc_act), a group's columns need not be neighbours: no format of ours has that.
    """

    name = "gptq"
    separator = "."
    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """As quantization_config says; `UnsupportedModel` for other numbers of bits."""
        self._bits = setting(config, "bits", (4, 8), 4)
        form = setting(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        self._zero_offset = 1 if form == "gptq" else 0  # the first form has each zero less 1

    def read(self, parts: LayerParts) -> Weight:
        """[N, K]: scale * (code - zero)."""
        per_word = 32 // self._bits
        qweight = parts.get("qweight", None, None)
        num_columns, num_rows = len(qweight) * per_word, qweight.shape[1]
        scales = parts.get("scales", None, num_rows).T  # [N, G]
        num_groups = scales.shape[1]
        codes = unpacked(qweight, self._bits, along_rows=True).T  # [N, K]
        zeros = unpacked(
            parts.get("qzeros", num_groups, num_rows // per_word), self._bits, along_rows=False
        ).T.int()
        # 0 is written as all ones in the first form
        zeros = (zeros + self._zero_offset) & ((1 << self._bits) - 1)
        groups = torch.arange(num_columns) // -(-num_columns // num_groups)
        if parts.has("g_idx"):
            named = parts.get("g_idx", num_columns)
            if int(named.min()) < 0 or int(named.max()) >= num_groups:
                raise parts.error(f"g_idx names groups outside of scales ({num_groups})")
            if not torch.equal(named.long(), groups):
                return of_columns(codes, scales, zeros, named.long())
        if num_columns % num_groups:
            raise parts.error(f"{num_columns} columns do not make {num_groups} groups")
        is_symmetric = bool((zeros == 1 << (self._bits - 1)).all())
        return grouped(codes, scales, bits=self._bits, zeros=None if is_symmetric else zeros)

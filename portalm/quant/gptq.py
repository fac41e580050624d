"""GPTQ: 4-bit or 8-bit codes with a scale and a zero point per group.

Frantar et al., "GPTQ", 2022; stored in AutoGPTQ's layout. GPTQModel adds settings of single layers
("dynamic").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from portalm.errors import UnsupportedModel
from portalm.quant.recipe import Recipe, Rule, by_regex, excluding
from portalm.quant.scheme import (
    FLOATS,
    INDEXES,
    WORDS,
    LayerParts,
    Weight,
    dequantized_by_column,
    grouped,
    num_groups,
    setting,
    unpacked,
)

_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class _Settings:
    """Settings of a layer."""

    bits: int
    group_size: int | None
    """Columns of a group; -1: all; None: as the number of scales says."""
    needs_groups: bool
    """The columns of a group are not adjacent: g_idx names the group of each."""


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
        """Check a quantization_config; raise `UnsupportedModel` for other layouts."""
        forms = {
            setting(config, name, _FORMATS, "gptq")
            for name in ("checkpoint_format", "format")
            if config.get(name) is not None
        }
        if len(forms) > 1:
            raise UnsupportedModel(
                "config.json: quantization_config has checkpoint_format and format, with "
                "different values"
            )
        self._zero_offset = 0 if "gptq_v2" in forms else 1  # "gptq" stores zero - 1
        setting(config, "pack_dtype", ("int32",), "int32")
        setting(config, "is_marlin_format", (False,), False)
        if config.get("adapter"):
            raise UnsupportedModel("config.json: quantization_config with adapter is not supported")
        self._recipe = Recipe(
            excluded=excluding(config.get("modules_to_not_convert") or ()),
            levels=([rule] for rule in _dynamic_rules(config)),
            default=_settings(config),
        )

    def read(self, parts: LayerParts) -> Weight:
        """Read a weight [N, K]: scale * (code - zero)."""
        settings = self._recipe.settings(parts)
        bits = settings.bits
        per_word = 32 // bits
        qweight = parts.get("qweight", None, None, dtypes=WORDS)
        num_columns, num_rows = len(qweight) * per_word, qweight.shape[1]
        scales = parts.get("scales", None, num_rows, dtypes=FLOATS).T  # [N, G]
        count = scales.shape[1]
        codes = unpacked(qweight, bits, along_rows=True).T  # [N, K]
        zeros = unpacked(
            parts.get("qzeros", count, num_rows // per_word, dtypes=WORDS), bits, along_rows=False
        ).T.int()
        # a zero of 0 is stored as all ones in "gptq"
        zeros = (zeros + self._zero_offset) & ((1 << bits) - 1)
        size = settings.group_size
        if size is not None and count != num_groups(parts, num_columns, size):
            raise parts.error(
                f"{num_columns} columns with {count} groups, but group_size is {size}"
            )
        size = -(-num_columns // count) if size in (None, -1) else size
        groups = torch.arange(num_columns) // size
        if parts.has("g_idx"):
            named = parts.get("g_idx", num_columns, dtypes=INDEXES)
            if int(named.min()) < 0 or int(named.max()) >= count:
                raise parts.error(f"g_idx has a group outside 0 to {count - 1}")
            if not torch.equal(named.long(), groups):
                return dequantized_by_column(codes, scales, zeros, named.long())
        elif settings.needs_groups:
            raise parts.error("it has no g_idx, but quantization_config has desc_act true")
        if num_columns % count:
            return dequantized_by_column(codes, scales, zeros, groups)
        is_symmetric = bool((zeros == 1 << (bits - 1)).all())
        return grouped(codes, scales, bits=bits, zeros=None if is_symmetric else zeros)


def _settings(config: Mapping[str, Any]) -> _Settings:
    """Read the settings of all layers, or of those that a pattern of `dynamic` matches."""
    size = config.get("group_size")
    return _Settings(
        bits=setting(config, "bits", (4, 8), 4),
        group_size=None if size is None else int(size),
        needs_groups=bool(config.get("desc_act", False)),
    )


def _dynamic_rules(config: Mapping[str, Any]) -> list[Rule[_Settings]]:
    """Rules of GPTQModel's `dynamic`: "-:" before a pattern excludes, "+:" or nothing overrides."""
    rules: list[Rule[_Settings]] = []
    for pattern, changes in (config.get("dynamic") or {}).items():
        is_excluded = pattern.startswith("-:")
        matches = by_regex(pattern.removeprefix("-:").removeprefix("+:"))
        settings = None if is_excluded else _settings({**config, **(changes or {})})
        rules.append(Rule(pattern, matches, settings))
    return rules

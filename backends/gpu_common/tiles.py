"""Tile sizes and launch options of the attention kernels, by family of GPUs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(slots=True, frozen=True, kw_only=True)
class TileShape:
    """Tile sizes and launch options of a kernel on a target."""

    rows: int
    """Query tokens times query heads per KV head."""
    tile: int
    """Tokens of keys and values computed at a time."""
    num_warps: int
    num_stages: int
    waves_per_eu: int = 0
    """AMD: number of waves per SIMD to limit registers for; 0: the compiler's choice."""
    max_registers: int = 0
    """NVIDIA: most registers per thread; 0: the compiler's choice."""
    overlaps: bool = False
    """Run the softmax of a tile while tensor cores multiply the tile before it; wide tiles of
    caches without codes. Worth it where matrix instructions are asynchronous (docs/adr/0016)."""

    def options(self) -> dict[str, int]:
        """Launch options in addition to warps and stages."""
        options = {"waves_per_eu": self.waves_per_eu, "maxnreg": self.max_registers}
        return {name: value for name, value in options.items() if value}


_SHAPES = {
    "nvidia": {
        "narrow": TileShape(rows=16, tile=64, num_warps=4, num_stages=5),
        "narrow codes": TileShape(rows=16, tile=128, num_warps=4, num_stages=5),
        "wide": TileShape(rows=128, tile=64, num_warps=8, num_stages=5, overlaps=True),
        "wide codes": TileShape(rows=128, tile=64, num_warps=8, num_stages=5),
        "exact": TileShape(rows=16, tile=32, num_warps=4, num_stages=3),
    },
    "cdna2": {
        "narrow": TileShape(rows=16, tile=32, num_warps=4, num_stages=2),
        "wide": TileShape(rows=128, tile=32, num_warps=4, num_stages=1),
        "exact": TileShape(rows=16, tile=16, num_warps=4, num_stages=1),
    },
    "rdna3": {
        "narrow": TileShape(rows=16, tile=16, num_warps=4, num_stages=1),
        "wide": TileShape(rows=64, tile=16, num_warps=8, num_stages=1),
        "exact": TileShape(rows=16, tile=16, num_warps=4, num_stages=1),
    },
}
# two programs per compute unit, 256 registers each, overlap softmax and matrix instructions: cdna3
# has room for a second stage, but not for tiles of 64 (340 registers); cdna4, which converts to
# bfloat16 in hardware, for tiles of 64, which halve the work of rescaling (docs/adr/0034)
_SHAPES["cdna3"] = _SHAPES["cdna2"] | {
    "wide": TileShape(rows=128, tile=32, num_warps=4, num_stages=2),
}
_SHAPES["cdna4"] = _SHAPES["cdna2"] | {
    "wide": TileShape(rows=128, tile=64, num_warps=4, num_stages=1),
}
_SHAPES["rdna4"] = _SHAPES["rdna3"] | {
    "wide": TileShape(rows=64, tile=32, num_warps=4, num_stages=1),
    "wide codes": TileShape(rows=64, tile=16, num_warps=8, num_stages=1),
}
_SHAPES["rdna3"] = _SHAPES["rdna3"] | {
    # its matrix instructions hold every operand twice: decoded codes leave room for half the rows
    "wide codes": TileShape(rows=32, tile=16, num_warps=8, num_stages=1),
}
_SHAPES["ampere"] = _SHAPES["nvidia"] | {
    "wide": TileShape(rows=128, tile=64, num_warps=8, num_stages=5),
    "narrow codes": TileShape(rows=16, tile=128, num_warps=4, num_stages=4),
    # its matrix instructions read from registers, which must hold the decoded codes
    "wide codes": TileShape(rows=128, tile=32, num_warps=8, num_stages=4),
}
_SHAPES["ada"] = _SHAPES["ampere"] | {
    # two programs fit 100 KiB of shared memory
    "narrow codes": TileShape(rows=16, tile=64, num_warps=4, num_stages=4),
}
"""Sizes by family of GPUs. `exact` is for float32, which tensor cores do not multiply exactly."""


@functools.cache
def tile_shape(
    kind: str,
    family: str,
    dtype: torch.dtype,
    head_size: int,
    group: int,
    has_codes: bool = False,
) -> TileShape:
    """Choose the tile sizes and launch options of attention.

    Args:
        kind: narrow, wide or encoder.
        family: `Arch.family` of the GPU.
        dtype: of the query.
        head_size: D
        group: query heads per KV head.
        has_codes: the cache is stored in 8 bits.
    """
    is_encoder = kind == "encoder"
    kind = "wide" if is_encoder else kind
    shapes, name = _SHAPES[family], "exact" if dtype == torch.float32 else kind
    shape = shapes.get(f"{name} codes", shapes[name]) if has_codes else shapes[name]
    if shape.overlaps and not is_encoder:
        return _asynchronous(shape, head_size, group)
    rows = max(shape.rows, power_of_2(group))
    tile, num_warps = shape.tile, shape.num_warps
    halvings = 0 if head_size <= 128 else 1 if head_size <= 256 else 2
    for _ in range(halvings):  # half the rows, so that larger sums need the same registers
        rows = max(rows // 2, 16, power_of_2(group))
        tile = 16 if family == "cdna4" else max(tile // 2, 16)
        if family == "rdna3":  # its matrix instructions hold every operand twice
            num_warps *= 2
    num_stages = min(shape.num_stages, 3 if halvings == 2 or is_encoder else 5)
    if family == "ada" and halvings == 1:  # the operands of larger heads must fit 99 KiB
        num_stages = min(num_stages, 2 if is_encoder else 3 if rows > 64 else 4)
    return replace(
        shape,
        rows=rows,
        tile=tile,
        num_warps=num_warps,
        num_stages=num_stages,
        overlaps=False,
    )


def _asynchronous(shape: TileShape, head_size: int, group: int) -> TileShape:
    """Tile sizes where tensor cores read shared memory and run in parallel with other instructions.

    Up to head size 64, two programs per multiprocessor overlap each other; above 128, registers
    have no room for a second tile of scores, and above 256 not for all the sums either.
    """
    if head_size <= 64:
        shape = replace(shape, max_registers=128, overlaps=False)
    elif head_size > 256:
        shape = replace(shape, rows=shape.rows // 4, tile=shape.tile // 4, num_stages=3)
    elif head_size > 128:
        shape = replace(shape, tile=shape.tile // 2)
    rows = max(shape.rows, power_of_2(group))
    return replace(shape, rows=rows, overlaps=shape.overlaps and head_size <= 128)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least `number`."""
    return 1 << (number - 1).bit_length()

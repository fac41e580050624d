"""The supported GPU architectures, by their compiler names (sm_90, gfx942)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A GPU architecture."""

    name: str
    """Compiler name: sm_90, gfx942, ..."""
    product: str
    """Well-known products of this architecture."""
    warp_size: int
    """Threads of a warp (AMD: wavefront)."""


CUDA = {
    arch.name: arch
    for arch in (
        Arch(name="sm_80", product="A100", warp_size=32),
        Arch(name="sm_86", product="A10", warp_size=32),
        Arch(name="sm_89", product="L40S", warp_size=32),
        Arch(name="sm_90", product="H100, H200", warp_size=32),
        Arch(name="sm_100", product="B200", warp_size=32),
        Arch(name="sm_103", product="B300", warp_size=32),
        Arch(name="sm_120", product="RTX PRO 6000", warp_size=32),
    )
}
"""Compute capability 8.0 and newer; older GPUs have no bfloat16."""

ROCM = {
    arch.name: arch
    for arch in (
        Arch(name="gfx90a", product="MI210, MI250", warp_size=64),
        Arch(name="gfx942", product="MI300X, MI325X", warp_size=64),
        Arch(name="gfx950", product="MI350X", warp_size=64),
        Arch(name="gfx1100", product="RX 7900", warp_size=32),
        Arch(name="gfx1201", product="RX 9070", warp_size=32),
    )
}

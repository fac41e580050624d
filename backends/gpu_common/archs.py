"""The supported GPU architectures, by their compiler names (sm_90, gfx942)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from portalm.errors import Unsupported

logger = logging.getLogger(__name__)

Family = Literal["nvidia", "ampere", "ada", "cdna2", "cdna3", "cdna4", "rdna3", "rdna4"]
"""Architectures that share tile sizes. nvidia: data-center GPUs since Hopper, with matrix
instructions that read shared memory; ada: NVIDIA's other GPUs, with 99 KiB of shared memory per
program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A GPU architecture."""

    name: str
    """Compiler name: sm_90, gfx942, ..."""
    product: str
    """Well-known products of this architecture."""
    family: Family
    shared_bytes: int
    """Most bytes of shared memory (AMD: LDS) per program."""
    warp_size: int = 32
    """Threads of a warp (AMD: wavefront)."""
    cores_per_die: int = 0
    """Multiprocessors that share an L2 cache; 0: all."""

    def num_dies(self, num_cores: int) -> int:
        """Dies with an L2 cache of their own in a device (or partition) of `num_cores`."""
        if not self.cores_per_die or num_cores % self.cores_per_die:
            return 1
        return num_cores // self.cores_per_die


def _by_name(*archs: Arch) -> dict[str, Arch]:
    return {arch.name: arch for arch in archs}


CUDA = _by_name(
    Arch(name="sm_80", product="A100", family="ampere", shared_bytes=163 << 10),
    Arch(name="sm_86", product="A10, RTX 30", family="ada", shared_bytes=99 << 10),
    Arch(name="sm_89", product="L4, L40S, RTX 40", family="ada", shared_bytes=99 << 10),
    Arch(name="sm_90", product="H100, H200", family="nvidia", shared_bytes=227 << 10),
    Arch(name="sm_100", product="B200", family="nvidia", shared_bytes=227 << 10),
    Arch(name="sm_103", product="B300", family="nvidia", shared_bytes=227 << 10),
    Arch(name="sm_110", product="Jetson Thor", family="nvidia", shared_bytes=227 << 10),
    Arch(name="sm_120", product="RTX PRO 6000, RTX 50", family="ada", shared_bytes=99 << 10),
    Arch(name="sm_121", product="DGX Spark", family="ada", shared_bytes=99 << 10),
)
"""Compute capability 8.0 and newer; older GPUs have no bfloat16. Shared memory: CUDA C++
Programming Guide, technical specifications per compute capability."""

ROCM = _by_name(
    Arch(
        name="gfx90a", product="MI210, MI250", family="cdna2", shared_bytes=64 << 10, warp_size=64
    ),
    Arch(
        name="gfx942",
        product="MI300X, MI325X",
        family="cdna3",
        shared_bytes=64 << 10,
        warp_size=64,
        cores_per_die=38,
    ),
    Arch(
        name="gfx950",
        product="MI350X",
        family="cdna4",
        shared_bytes=160 << 10,
        warp_size=64,
        cores_per_die=32,
    ),
    Arch(name="gfx1100", product="RX 7900", family="rdna3", shared_bytes=64 << 10),
    Arch(name="gfx1201", product="RX 9070", family="rdna4", shared_bytes=64 << 10),
)


def find_arch(name: str, archs: Mapping[str, Arch]) -> Arch:
    """Look up an architecture in `archs`.

    NVIDIA GPUs of compute capability 8.0 or newer that are not in the list get the tile sizes of
    the family with the least shared memory, because newer GPUs run what older ones do. AMD's
    architectures differ in their matrix instructions, so unknown ones are refused.

    Raises:
        Unsupported: the architecture is unknown, and no family is known to fit it.
    """
    if name in archs:
        return archs[name]
    capability = re.fullmatch(r"sm_(\d{2,3})", name)
    smallest = min(archs.values(), key=lambda arch: arch.shared_bytes)
    if capability and int(capability[1]) >= 80 and smallest.name.startswith("sm_"):
        logger.warning(
            "architecture %s is not listed; using the tile sizes of %s (%s), which may be slower "
            "than sizes made for it",
            name, smallest.name, smallest.product,
        )  # fmt: skip
        return replace(smallest, name=name, product="unlisted NVIDIA GPU")
    known = ", ".join(f"{arch.name} ({arch.product})" for arch in archs.values())
    raise Unsupported(f"architecture {name} is not supported; supported: {known}")

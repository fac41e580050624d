"""Memory for weights and the KV cache: on huge pages, committed when first written."""

from __future__ import annotations

import mmap

import torch

from portalm.errors import BackendError

_HUGE_PAGE = 2 << 20
_LINE = 64
_CHUNK = 32 << 20


def reserve(num_bytes: int, what: str, *, advice: str = "close other programs") -> torch.Tensor:
    """Reserve uint8 [num_bytes], not committed, on huge pages if the system has them.

    Huge pages mean fewer TLB misses; less than one huge page is aligned to a cache line only.
    """
    align = _HUGE_PAGE if num_bytes >= _HUGE_PAGE else _LINE
    try:
        memory = mmap.mmap(-1, num_bytes + align, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BackendError(
            "oom",
            f"cannot reserve {num_bytes / 2**20:.0f} MiB for {what} ({error}): {advice}",
        ) from error
    if num_bytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    start = -whole.data_ptr() % align
    return whole[start : start + num_bytes]


class Arena:
    """Cuts pieces from larger reservations, so that small weights share huge pages.

    A reservation is freed when all of its pieces are freed.
    """

    def __init__(self, what: str) -> None:
        """Create an arena; `what` names its contents in errors."""
        self._what = what
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 [num_bytes], 64-byte aligned."""
        size = -(-num_bytes // _LINE) * _LINE
        if size > len(self._rest):
            if size > _CHUNK // 2:
                return reserve(size, self._what)[:num_bytes]
            self._rest = reserve(_CHUNK, self._what)
        piece, self._rest = self._rest[:num_bytes], self._rest[size:]
        return piece

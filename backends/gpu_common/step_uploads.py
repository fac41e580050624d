"""One upload for all arrays of a step, into memory that every step reuses.

The arrays of a step are packed on the host, copied to the device on a stream of their own, and
written by one launch on the stream of the steps to where kernels read them: memory with fixed
addresses, and a block table that stays on the device. Steps with arrays of the same sizes in the
same order find them at the same addresses, so a captured step needs no further copies.

Only the block ids that a step reads are uploaded. Nothing is remembered from step to step: every
step writes the whole used part of its rows, so the table cannot disagree with the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from portalm_backends.gpu_common.device import Event, Gpu

ALIGNMENT = 16
"""Alignment in bytes of each array, so that kernels can load vectors."""

ARRAY_BYTES = 2 << 20
"""Memory for the arrays of a step, without its block table: those of 8,192 tokens take a tenth.
Arrays that do not fit are uploaded one by one."""

_LEAST_STAGED_BYTES = 256 << 10

Array = npt.NDArray[np.generic]
Ints = npt.NDArray[np.int32]

DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.bool_): torch.bool,
}


def aligned(num_bytes: int) -> int:
    """`num_bytes`, rounded up to `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Unpack(Protocol):
    """Writes a packed upload to where kernels read it: `kernels.unpack.unpack`."""

    def __call__(
        self,
        packed: torch.Tensor,
        arrays: torch.Tensor,
        table: torch.Tensor | None,
        num_words: int,
        ids_at: int,
        starts: Ints,
    ) -> None:
        """Copy words [0, num_words) to `arrays`, and each row's block ids to `table`.

        The starts of the rows are in `packed` too, right before the block ids.
        """
        ...


@dataclass(slots=True)
class _Staging:
    """Memory on the device that one upload arrives in."""

    packed: torch.Tensor
    """int32"""
    read: Event | None = None
    """The device has unpacked the last upload."""


class StepUploads:
    """The uploads of one device."""

    def __init__(self, gpu: Gpu, unpack: Unpack) -> None:
        """Allocate nothing yet.

        Args:
            gpu: the device.
            unpack: the launch that writes an upload to where kernels read it.
        """
        self._gpu = gpu
        self._unpack = unpack
        self._stream = gpu.new_stream()
        self._staging: list[_Staging] = []
        self._turn = 0
        self._memory: torch.Tensor | None = None
        """uint8 [ARRAY_BYTES]: where kernels read the arrays."""
        self._table: torch.Tensor | None = None
        """int32 [S, MB]"""
        self._views: dict[tuple[int, np.dtype[np.generic], tuple[int, ...]], torch.Tensor] = {}
        self._arrays: list[tuple[int, Array]] = []
        self._rows: tuple[Ints, Ints] | None = None
        """Block ids and starts of the table's rows."""
        self._size = 0
        self.is_open = False

    def reserve_table(self, num_rows: int, width: int) -> None:
        """Make the table at least this large; tensors of a smaller one stay valid."""
        if self._table is not None:
            num_rows = max(num_rows, self._table.shape[0])
            width = max(width, self._table.shape[1])
            if self._table.shape == (num_rows, width):
                return
        self._table = torch.zeros((num_rows, width), dtype=torch.int32, device=self._gpu.handle)

    def is_fixed(self, x: torch.Tensor) -> bool:
        """True if `x` is in memory that every step reuses."""
        mine = [y for y in (self._memory, self._table) if y is not None]
        return any(_storage(x) == _storage(y) for y in mine)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Context in which arrays are added; they are sent when it ends without an error."""
        assert not self.is_open, "the uploads of a step contain those of another step"
        if self._memory is None:
            self._memory = torch.empty(ARRAY_BYTES, dtype=torch.uint8, device=self._gpu.handle)
        self.is_open = True
        self._arrays, self._rows, self._size = [], None, 0
        try:
            yield
        finally:
            self.is_open = False
        self._send()

    def add(self, array: Array) -> torch.Tensor | None:
        """Add an array; return its tensor on the device, or None if no memory is left for it.

        It has its values after the context, until the next one. The caller must not change the
        array before the context ends.
        """
        assert self.is_open and self._memory is not None
        end = self._size + aligned(array.nbytes)
        if end > ARRAY_BYTES:
            return None
        start, self._size = self._size, end
        self._arrays.append((start, array))
        key = (start, array.dtype, array.shape)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            memory = self._memory[start : start + array.nbytes]
            view = self._views[key] = memory.view(DTYPES[array.dtype]).view(array.shape)
        return view

    def add_table(self, block_ids: Ints, block_starts: Ints, width: int) -> torch.Tensor:
        """Add the rows of the block table, see `Backend.block_table`; return int32 [S, width].

        Entries after a row's blocks are left over from earlier steps.
        """
        assert self.is_open and self._rows is None, "a step has one block table"
        num_rows = len(block_starts) - 1
        self.reserve_table(num_rows, width)
        assert self._table is not None
        self._rows = block_ids, block_starts
        return self._table[:num_rows, :width]

    def _send(self) -> None:
        """Copy everything in one transfer on the uploads' own stream, and unpack it."""
        ids_at, size, starts = 0, self._size, _NO_ROWS
        if self._rows is not None:
            block_ids, starts = self._rows
            ids_at = size + 4 * len(starts)
            self._arrays += [(size, starts), (ids_at, block_ids)]
            size = ids_at + block_ids.nbytes
        if not size:
            return
        pinned = self._gpu.pinned(size)
        staged = pinned.numpy()
        for start, array in self._arrays:
            target = staged[start : start + array.nbytes].view(array.dtype)
            target.reshape(array.shape)[...] = array
        staging, main = self._free_staging(size), self._gpu.current_stream()
        with self._gpu.on(self._stream):
            staging.packed.view(torch.uint8)[:size].copy_(pinned, non_blocking=True)
        main.wait_event(self._stream.record_event())
        assert self._memory is not None
        self._unpack(
            staging.packed,
            self._memory.view(torch.int32),
            self._table,
            self._size // 4,
            ids_at // 4,
            starts,
        )
        staging.read = main.record_event()
        self._arrays, self._rows = [], None

    def _free_staging(self, size: int) -> _Staging:
        """Memory for an upload; the upload waits until the device has read the one before."""
        self._turn = (self._turn + 1) % _NUM_STAGING
        while len(self._staging) < _NUM_STAGING:
            self._staging.append(_Staging(torch.empty(0, dtype=torch.int32)))
        staging = self._staging[self._turn]
        if staging.packed.numel() * 4 < size:
            num_bytes = max(_LEAST_STAGED_BYTES, 1 << (size - 1).bit_length())
            staging.packed = torch.empty(num_bytes // 4, dtype=torch.int32, device=self._gpu.handle)
            # torch's allocator may return memory that enqueued work still uses
            self._stream.wait_stream(self._gpu.current_stream())
        elif staging.read is not None:
            self._stream.wait_event(staging.read)
        return staging


_NUM_STAGING = 2
"""Uploads that may be on the device at once: one is unpacked while the next one arrives."""

_MOST_VIEWS = 4096
"""Most tensors kept to be returned again."""

_NO_ROWS = np.zeros(1, np.int32)


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()

"""The null device's KV cache: the token id and position in each slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from portalm.errors import BackendError

IntArray = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_MASK = 2**64 - 1
_WEIGHT = 0x9E3779B97F4A7C15


def context_hash(token_ids: Sequence[int]) -> int:
    """Hash a context to 31 bits; each token and its position matter."""
    total = 0
    for position, token_id in enumerate(token_ids):
        weight = (position + 1) * _WEIGHT & _MASK
        total += (token_id + 1) * (weight ^ weight >> 31)
    return (total & _MASK) >> 33


class NullKV:
    """A KV cache of `num_blocks` blocks that holds token ids instead of keys and values."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Allocate an empty cache; memory is committed as blocks are used."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._tokens = np.zeros((num_blocks, block_size), np.int32)
        self._places = np.zeros((num_blocks, block_size), np.int32)
        """int32 [NB, B]: position + 1; 0: never written."""

    def write(self, slots: IntArray, token_ids: IntArray, positions: IntArray) -> None:
        """Write token ids and positions to slots, [T] each."""
        self._tokens.reshape(-1)[slots] = token_ids
        self._places.reshape(-1)[slots] = positions + 1

    def copy(self, src: IntArray, dst: IntArray) -> None:
        """Copy blocks src[i] to dst[i], [N] each."""
        self._tokens[dst] = self._tokens[src]
        self._places[dst] = self._places[src]

    def read(self, block_table: IntArray, seq_lens: IntArray) -> Int64Array:
        """Return the `context_hash` of each request, [S], from the tokens in its blocks.

        Args:
            block_table: [S, MB]
            seq_lens: [S]

        Raises:
            BackendError: of kind shape, if a slot of a context holds a token of another position
                or none: its block was freed, swapped with another or not copied.
        """
        lens = seq_lens.astype(np.int64)
        ends = np.cumsum(lens)
        request = np.repeat(np.arange(len(lens)), lens)
        position = np.arange(len(request)) - np.repeat(ends - lens, lens)
        block = block_table[request, position // self.block_size]
        offset = position % self.block_size
        held = self._places[block, offset] - 1
        wrong = np.flatnonzero(held != position)
        if len(wrong):
            i = wrong[0]
            found = "nothing" if held[i] < 0 else f"a token of position {held[i]}"
            raise BackendError(
                "shape",
                f"request {request[i]} of the step reads its position {position[i]} from block "
                f"{block[i]}, offset {offset[i]}, which holds {found}",
            )
        weight = (position + 1).astype(np.uint64) * np.uint64(_WEIGHT)
        terms = (self._tokens[block, offset].astype(np.int64) + 1).astype(np.uint64)
        terms *= weight ^ (weight >> np.uint64(31))
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        sums: npt.NDArray[np.uint64] = total[ends] - total[ends - lens]
        hashes: Int64Array = (sums >> np.uint64(33)).astype(np.int64)
        return hashes

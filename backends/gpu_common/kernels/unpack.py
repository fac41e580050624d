"""Write a step's packed upload to where kernels read it, in one launch.

    packed   int32 [P]       the arrays of a step, then starts [S + 1] and ids [N] of its blocks
    arrays   int32 [A]       gets the first `num_words` words
    table    int32 [S, MB]   row i gets block ids starts[i] to starts[i + 1] at its start; what
                             follows is left over from earlier steps

Mapping:  one program per CHUNK words of the arrays, then one per row of the table.
Bound by: its launch; a step has tens of kilobytes.
Meaning:  `unpack_plainly`
"""

import itertools

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

CHUNK = 1024
"""Words that a program copies at a time."""


def unpack(
    packed: torch.Tensor,
    arrays: torch.Tensor,
    table: torch.Tensor | None,
    num_words: int,
    ids_at: int,
    starts: npt.NDArray[np.int32],
) -> None:
    """Copy the arrays, and the block ids of each row of the table.

    Args:
        packed: int32 [P]
        arrays: int32 [A]
        table: int32 [S, MB]; None where there are no rows.
        num_words: number of words of the arrays.
        ids_at: where the block ids begin in `packed`; the starts of the rows are right before.
        starts: int32 [S + 1], the starts on the host.
    """
    num_chunks, num_rows = triton.cdiv(num_words, CHUNK), len(starts) - 1
    if num_chunks + num_rows:
        _unpack[(num_chunks + num_rows,)](
            packed, arrays, arrays if table is None else table,
            0 if table is None else table.stride(0), num_words, num_chunks,
            ids_at - len(starts), ids_at, CHUNK, num_warps=8,
        )  # fmt: skip


def unpack_plainly(
    packed: torch.Tensor,
    arrays: torch.Tensor,
    table: torch.Tensor | None,
    num_words: int,
    ids_at: int,
    starts: npt.NDArray[np.int32],
) -> None:
    """Do the same as `unpack` in torch."""
    arrays[:num_words].copy_(packed[:num_words])
    for row, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
        assert table is not None
        table[row, : end - begin].copy_(packed[ids_at + begin : ids_at + end])


# everything varies from step to step
@triton.jit(
    do_not_specialize=[
        "table_stride", "num_words", "num_chunks", "starts_at", "ids_at"
    ]
)  # fmt: skip
def _unpack(
    packed, arrays, table, table_stride, num_words, num_chunks, starts_at, ids_at,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Copy one chunk of the arrays, or one row's block ids."""
    program = tl.program_id(0)
    word = tl.arange(0, CHUNK)
    if program < num_chunks:
        word += program * CHUNK
        is_word = word < num_words
        tl.store(arrays + word, tl.load(packed + word, mask=is_word), mask=is_word)
        return
    row = program - num_chunks
    begin, end = tl.load(packed + starts_at + row), tl.load(packed + starts_at + row + 1)
    ids = packed + ids_at + begin
    target = table + row.to(tl.int64) * table_stride
    for first in range(0, end - begin, CHUNK):
        is_id = first + word < end - begin
        tl.store(target + first + word, tl.load(ids + first + word, mask=is_id), mask=is_id)

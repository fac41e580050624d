"""Consistency checks of a step's inputs, from which a real device would compute garbage."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from portalm.backend import StepInputs, StepMeta
from portalm.errors import BackendError

IntArray = npt.NDArray[np.int64]


def check_meta(meta: StepMeta, block_size: int) -> None:
    """Raise `BackendError` of kind shape if the index tensors contradict each other."""
    loc, lens = (x.astype(np.int64) for x in (meta.host_query_start_loc, meta.host_seq_lens))
    _same("query_start_loc on the device", _host(meta.query_start_loc), loc)
    _same("seq_lens on the device", _host(meta.seq_lens), lens)
    lengths = np.diff(loc)
    _require(loc[0] == 0 and bool((lengths >= 0).all()), f"query_start_loc is {loc.tolist()}")
    _require(bool((lengths <= lens).all()), "a request has more new tokens than context")

    num_tokens, num_blocks = int(loc[-1]), -(-lens // block_size)
    table = _host(meta.block_table)
    _require(
        table.shape[0] == len(lens), f"block_table has {table.shape[0]} rows, expected {len(lens)}"
    )
    _require(
        int(num_blocks.max()) <= table.shape[1],
        f"block_table has {table.shape[1]} columns, the longest request needs {num_blocks.max()}",
    )
    is_held = np.arange(table.shape[1]) < num_blocks[:, None]
    _require(not np.any(table[is_held] < 1), "a context contains the null block")
    _same("block_table after the contexts", table[~is_held], 0)

    request = np.repeat(np.arange(len(lens)), lengths)
    positions = np.arange(num_tokens) - (loc[1:] - lens)[request]
    slots = table[request, positions // block_size] * block_size + positions % block_size
    _same("positions", _host(meta.positions)[:num_tokens], positions)
    _same("slot_mapping", _host(meta.slot_mapping)[:num_tokens], slots)
    _require(len(np.unique(slots)) == num_tokens, "two tokens would be written to one slot")
    pads = _host(meta.slot_mapping)[num_tokens:]
    _require(not np.any(pads >= block_size), "a pad token would be written outside block 0")

    rows = _host(meta.logits_rows)
    _require(
        not np.any((rows < 0) | (rows >= max(1, num_tokens))),
        f"logits_rows {rows.tolist()} are not all below {num_tokens}, the number of tokens",
    )
    is_decode = lengths == 1
    _same("decodes, which come first", is_decode[: meta.num_decodes], True)
    _same("requests after the decodes", is_decode[meta.num_decodes :], False)
    _same("max_query_len", np.array(meta.max_query_len), lengths.max())
    _same("max_seq_len", np.array(meta.max_seq_len), lens.max())


def check_inputs(inputs: StepInputs, num_blocks: int, vocab_size: int) -> None:
    """Raise `BackendError` of kind shape if ids are out of range."""
    table = _host(inputs.meta.block_table)
    _require(int(table.max()) < num_blocks, f"block {table.max()} is read, there are {num_blocks}")
    token_ids = _host(inputs.token_ids)
    if inputs.previous_ids is not None and inputs.previous_rows is not None:
        rows = _host(inputs.previous_rows)
        num_rows = len(inputs.previous_ids)
        _require(
            int(rows.max()) < num_rows, f"previous_rows contains row {rows.max()} of {num_rows}"
        )
        token_ids = token_ids[rows < 0]  # the others are ignored
    _require(
        not np.any((token_ids < 0) | (token_ids >= vocab_size)),
        f"token ids are not all from 0 to {vocab_size - 1}: {token_ids.tolist()}",
    )


def _host(x: object) -> IntArray:
    """Convert an index tensor on the host to int64."""
    return np.asarray(x).astype(np.int64)


def _same(name: str, actual: npt.NDArray[np.generic], expected: object) -> None:
    """Raise `BackendError` naming the first element that differs from `expected`."""
    wanted = np.broadcast_to(np.asarray(expected), actual.shape)
    wrong = np.argwhere(actual != wanted)
    if len(wrong):
        at = tuple(wrong[0])
        raise BackendError(
            "shape",
            f"{name}: element {[int(i) for i in at]} is {actual[at]}, expected {wanted[at]} "
            f"({len(wrong)} of {actual.size} differ)",
        )


def _require(holds: bool | np.bool_, problem: str) -> None:
    if not holds:
        raise BackendError("shape", problem)

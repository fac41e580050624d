"""The running requests as rows of numpy arrays, and the index arrays of each step.

Work that grows with the number of tokens is one numpy call over all of them; Python loops only over
the requests of a step, to copy what is new since the previous step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from portalm.config import SchedulerConfig
from portalm.core.plan import PlannedRequest, StepPlan
from portalm.core.request import Request

IntArray = npt.NDArray[np.int32]


@dataclass(slots=True, kw_only=True)
class StepArrays:
    """Index arrays of one step: views into buffers that the step after the next one reuses.

    T, S, MB and R are padded; `num_tokens`, `num_requests` and `num_rows` are not.
    """

    num_tokens: int
    num_requests: int
    num_rows: int
    num_decodes: int
    rows: npt.NDArray[np.intp]
    """[S]: each request's row in the batch; not padded."""
    token_ids: IntArray
    """[T]"""
    positions: IntArray
    """[T]"""
    slot_mapping: IntArray
    """[T]"""
    query_start_loc: IntArray
    """[S + 1]"""
    seq_lens: IntArray
    """[S]"""
    block_ids: IntArray
    """[N]: the blocks that hold each request's context, all requests end to end."""
    block_starts: IntArray
    """[S + 1]: request i has the block ids from block_starts[i] to block_starts[i + 1]."""
    table_width: int
    """MB: columns of the block table."""
    logits_rows: IntArray
    """[R]: the token of each row of logits; pad rows use token 0."""
    max_query_len: int
    max_seq_len: int
    previous_rows: IntArray | None
    """[T]: row of the previous step that samples this token, or -1; None if all are known."""


@dataclass(slots=True, frozen=True)
class PaddedShape:
    """The sizes that T, S, MB and R are padded to."""

    num_tokens: int
    num_requests: int
    num_blocks: int
    num_rows: int
    num_states: int = 0
    """Rows that return hidden states."""


class InputBatch:
    """A row for every running request, kept from step to step."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Allocate `max_batch_requests` rows; the OS provides the memory as tokens are written."""
        num_rows, max_len = config.max_batch_requests, config.max_model_len
        self.config = config
        self.block_size = config.block_size
        self.max_blocks = -(-max_len // config.block_size)
        self.token_ids = np.zeros((num_rows, max_len), np.int32)
        """[rows, max_model_len]: tokens known to the host."""
        self.block_table = np.zeros((num_rows, self.max_blocks), np.int32)
        self.num_prompt_tokens = np.zeros(num_rows, np.int32)
        self.requests: list[Request | None] = [None] * num_rows
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._num_known = [0] * num_rows
        self._num_blocks = [0] * num_rows
        self._last_block = [0] * num_rows
        self._buffers = [_Buffers(config) for _ in range(2)]
        self._step = 0

    def forget(self, request_ids: list[str]) -> None:
        """Free the rows of requests that no longer run; unknown ids are ignored."""
        for request_id in request_ids:
            row = self._row_of.pop(request_id, None)
            if row is not None:
                self.requests[row] = None
                self._free_rows.append(row)

    def update(self, plan: StepPlan) -> npt.NDArray[np.intp]:
        """Copy the requests' new tokens and blocks; return their rows, [S], in plan order."""
        row_of, known, held = self._row_of, self._num_known, self._num_blocks
        rows: list[int] = []
        sampled: list[tuple[int, int, int]] = []  # row, position and id of single new tokens
        for planned in plan.requests:
            request = planned.request
            row = row_of.get(request.request_id)
            if row is None:
                row = self._enter(request)
            token_ids, num_known = request.token_ids, known[row]
            num_new = len(token_ids) - num_known
            if num_new == 1:
                sampled.append((row, num_known, token_ids[-1]))
            elif num_new:
                self.token_ids[row, num_known : num_known + num_new] = token_ids[num_known:]
            known[row] = num_known + num_new
            table, num_blocks = request.block_table, held[row]
            if num_blocks != len(table) or (num_blocks and table[-1] != self._last_block[row]):
                # include the last known block: copy-on-write may have replaced it
                first = max(0, num_blocks - 1)
                self.block_table[row, first : len(table)] = table[first:]
                held[row] = len(table)
                self._last_block[row] = table[-1]
            rows.append(row)
        if sampled:  # one numpy call: single writes would take most of the time here
            at_rows, places, values = zip(*sampled, strict=True)
            self.token_ids[at_rows, places] = values
        return np.array(rows, np.intp)

    def _enter(self, request: Request) -> int:
        row = self._free_rows.pop()
        self._row_of[request.request_id] = row
        self.requests[row] = request
        self.num_prompt_tokens[row] = request.num_prompt_tokens
        self._num_known[row] = 0
        self._num_blocks[row] = 0
        self._last_block[row] = -1
        return row

    def build(
        self,
        plan: StepPlan,
        rows: npt.NDArray[np.intp],
        *,
        sampled_rows: dict[str, int],
        pad: PaddedShape | None = None,
        min_logits_rows: int = 1,
    ) -> StepArrays:
        """Build the step's index arrays.

        Args:
            plan: must not be empty.
            rows: [S], returned by `update` for this plan.
            sampled_rows: by request id, the row of the previous step that samples its last token,
                for tokens that the host does not know yet.
            pad: sizes to pad to; None: do not pad.
            min_logits_rows: minimum length of `logits_rows` if not padded; 0 where the step also
                returns hidden states.
        """
        buffers = self._buffers[self._step % 2]
        self._step += 1
        if pad is None and plan.num_tokens == len(plan.requests):
            arrays = self._build_decodes(plan.requests, rows, sampled_rows, buffers)
            if arrays is not None:
                return arrays
        return self._build_mixed(plan, rows, sampled_rows, buffers, pad, min_logits_rows)

    def _build_mixed(
        self,
        plan: StepPlan,
        rows: npt.NDArray[np.intp],
        sampled_rows: dict[str, int],
        buffers: _Buffers,
        pad: PaddedShape | None,
        min_logits_rows: int,
    ) -> StepArrays:
        """Build the arrays of any step."""
        planned = plan.requests
        num_requests, num_tokens = len(planned), plan.num_tokens
        starts = np.fromiter((p.start for p in planned), np.int32, num_requests)
        lengths = np.fromiter((p.num_tokens for p in planned), np.int32, num_requests)
        shape = pad or PaddedShape(
            num_tokens,
            num_requests,
            int(np.max((starts + lengths - 1) // self.block_size)) + 1,
            0,
        )

        loc = buffers.query_start_loc[: shape.num_requests + 1]
        loc[0] = 0
        np.cumsum(lengths, out=loc[1 : num_requests + 1])
        loc[num_requests + 1 :] = num_tokens

        seq_lens = buffers.seq_lens[: shape.num_requests]
        np.add(starts, lengths, out=seq_lens[:num_requests])
        seq_lens[num_requests:] = 0

        offsets = np.repeat(loc[:num_requests] - starts, lengths)
        token_ids, positions, slots = self._token_arrays(
            np.repeat(rows, lengths), offsets, shape.num_tokens, buffers
        )
        block_ids, block_starts = self._blocks(rows, seq_lens, buffers)

        wanted = self._logits_rows(planned, loc.tolist())
        num_rows = len(wanted)
        num_padded_rows = max(min_logits_rows, num_rows) if pad is None else pad.num_rows
        return StepArrays(
            num_tokens=num_tokens,
            num_requests=num_requests,
            num_rows=num_rows,
            num_decodes=int(np.count_nonzero(lengths == 1)),
            rows=rows,
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            query_start_loc=loc,
            seq_lens=seq_lens,
            block_ids=block_ids,
            block_starts=block_starts,
            table_width=shape.num_blocks,
            logits_rows=np.array(wanted + [0] * (num_padded_rows - num_rows), np.int32),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens[:num_requests].max()),
            previous_rows=self._previous_rows(planned, loc, shape.num_tokens, sampled_rows),
        )

    def _token_arrays(
        self,
        rows_of_tokens: npt.NDArray[np.intp],
        offsets: IntArray,
        padded_size: int,
        buffers: _Buffers,
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Token ids, positions and slots, [T] each, padded with 0.

        Args:
            rows_of_tokens: [T unpadded], each token's row in the batch.
            offsets: [T unpadded], each token's index in the step minus its position.
            padded_size: T.
            buffers: where to write them.
        """
        num_tokens = len(rows_of_tokens)
        positions = buffers.positions[:padded_size]
        np.subtract(buffers.arange[:num_tokens], offsets, out=positions[:num_tokens])
        positions[num_tokens:] = 0

        token_ids = buffers.token_ids[:padded_size]
        token_ids[:num_tokens] = self.token_ids[rows_of_tokens, positions[:num_tokens]]
        token_ids[num_tokens:] = 0

        block, offset = np.divmod(positions[:num_tokens], self.block_size)
        slots = buffers.slot_mapping[:padded_size]
        slots[:num_tokens] = self.block_table[rows_of_tokens, block] * self.block_size + offset
        slots[num_tokens:] = 0
        return token_ids, positions, slots

    def padding(self, pad: PaddedShape) -> StepArrays:
        """The arrays of a step without requests: all tokens are padding in the null block."""
        zeros = np.zeros(max(pad.num_tokens, pad.num_requests, pad.num_rows) + 1, np.int32)
        return StepArrays(
            num_tokens=0,
            num_requests=0,
            num_rows=0,
            num_decodes=0,
            rows=np.zeros(0, np.intp),
            token_ids=zeros[: pad.num_tokens],
            positions=zeros[: pad.num_tokens],
            slot_mapping=zeros[: pad.num_tokens],
            query_start_loc=zeros[: pad.num_requests + 1],
            seq_lens=zeros[: pad.num_requests],
            block_ids=zeros[:0],
            block_starts=zeros[: pad.num_requests + 1],
            table_width=pad.num_blocks,
            logits_rows=zeros[: pad.num_rows],
            max_query_len=0,
            max_seq_len=0,
            previous_rows=None,
        )

    def largest(self, num_rows: int) -> StepArrays:
        """The arrays of a step with the maximum of tokens and requests, all in the null block."""
        config = self.config
        num_tokens, num_requests = config.max_batch_tokens, config.max_batch_requests
        num_tokens = min(num_tokens, num_requests * config.max_model_len)
        lengths = np.full(num_requests, num_tokens // num_requests, np.int32)
        lengths[num_requests - num_tokens % num_requests :] += 1  # decodes come first
        loc = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        positions = np.arange(num_tokens, dtype=np.int32) - np.repeat(loc[:-1], lengths)
        longest = int(lengths.max())
        return StepArrays(
            num_tokens=num_tokens,
            num_requests=num_requests,
            num_rows=num_rows,
            num_decodes=int(np.count_nonzero(lengths == 1)),
            rows=np.arange(num_requests),
            token_ids=np.zeros(num_tokens, np.int32),
            positions=positions,
            slot_mapping=np.zeros(num_tokens, np.int32),
            query_start_loc=loc,
            seq_lens=lengths,
            block_ids=np.zeros(num_requests, np.int32),
            block_starts=np.arange(num_requests + 1, dtype=np.int32),
            table_width=-(-longest // self.block_size),
            logits_rows=np.zeros(num_rows, np.int32),
            max_query_len=longest,
            max_seq_len=longest,
            previous_rows=None,
        )

    def _build_decodes(
        self,
        planned: list[PlannedRequest],
        rows: npt.NDArray[np.intp],
        sampled_rows: dict[str, int],
        buffers: _Buffers,
    ) -> StepArrays | None:
        """Build the arrays of a step of decodes, faster than `build` does.

        Return None if a token samples nothing or its prompt logprob is requested.
        """
        if any(
            not p.samples_token or p.request.params.prompt_logprobs is not None for p in planned
        ):
            return None
        count, block_size = len(planned), self.block_size
        arange = buffers.arange
        positions = buffers.positions[:count]
        positions[:] = [p.start for p in planned]
        seq_lens = buffers.seq_lens[:count]
        np.add(positions, 1, out=seq_lens)
        longest = int(seq_lens.max())
        block_ids, block_starts = self._blocks(rows, seq_lens, buffers)
        token_ids = buffers.token_ids[:count]
        token_ids[:] = self.token_ids[rows, positions]
        slots = buffers.slot_mapping[:count]
        block, offset = np.divmod(positions, block_size)
        np.multiply(self.block_table[rows, block], block_size, out=slots)
        slots += offset
        loc = arange[: count + 1]
        return StepArrays(
            num_tokens=count,
            num_requests=count,
            num_rows=count,
            num_decodes=count,
            rows=rows,
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            query_start_loc=loc,
            seq_lens=seq_lens,
            block_ids=block_ids,
            block_starts=block_starts,
            table_width=-(-longest // block_size),
            logits_rows=loc[:count],
            max_query_len=1,
            max_seq_len=longest,
            previous_rows=self._previous_rows(planned, loc, count, sampled_rows),
        )

    def _blocks(
        self, rows: npt.NDArray[np.intp], seq_lens: IntArray, buffers: _Buffers
    ) -> tuple[IntArray, IntArray]:
        """The blocks of each request's context end to end, and where each request's begin.

        Only these are read, so the time does not depend on the longest context allowed.

        Args:
            rows: [S unpadded]
            seq_lens: [S], padded with 0.
            buffers: where to write the starts.
        """
        starts = buffers.block_starts[: len(seq_lens) + 1]
        starts[0] = 0
        counts = -(-seq_lens // self.block_size)
        np.cumsum(counts, out=starts[1:])
        table = self.block_table
        parts = [table[row, :n] for row, n in zip(rows.tolist(), counts.tolist(), strict=False)]
        return np.concatenate(parts), starts

    @staticmethod
    def _logits_rows(planned: list[PlannedRequest], loc: list[int]) -> list[int]:
        """Tokens whose logits are needed: to sample the next token, or for prompt logprobs."""
        rows: list[int] = []
        for i, p in enumerate(planned):
            wanted = p.num_prompt_rows
            if wanted:
                rows.extend(range(loc[i], loc[i] + wanted))
            if p.samples_token:
                rows.append(loc[i + 1] - 1)
        return rows

    @staticmethod
    def _previous_rows(
        planned: list[PlannedRequest], loc: IntArray, num_tokens: int, sampled_rows: dict[str, int]
    ) -> IntArray | None:
        """[T]: where the previous step samples a token that the host does not know yet."""
        waiting = [
            (int(loc[i + 1]) - 1, sampled_rows[p.request.request_id])
            for i, p in enumerate(planned)
            if p.start + p.num_tokens > len(p.request.token_ids)
        ]
        if not waiting:
            return None
        previous = np.full(num_tokens, -1, np.int32)
        for token, row in waiting:
            previous[token] = row
        return previous


class _Buffers:
    """Arrays with room for the largest step, overwritten every other step."""

    def __init__(self, config: SchedulerConfig) -> None:
        # a bucket may pad up to the next power of two
        num_tokens = 2 * config.max_batch_tokens
        num_requests = 2 * config.max_batch_requests
        self.arange = np.arange(num_tokens + 1, dtype=np.int32)
        self.token_ids = np.zeros(num_tokens, np.int32)
        self.positions = np.zeros(num_tokens, np.int32)
        self.slot_mapping = np.zeros(num_tokens, np.int32)
        self.query_start_loc = np.zeros(num_requests + 1, np.int32)
        self.seq_lens = np.zeros(num_requests, np.int32)
        self.block_starts = np.zeros(num_requests + 1, np.int32)

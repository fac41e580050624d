"""The index arrays of a step, compared with plain loops over its requests."""

from __future__ import annotations

import random

import numpy as np
import pytest

from portalm.config import SchedulerConfig
from portalm.core.plan import PlannedRequest, StepPlan
from portalm.core.request import Request
from portalm.runner.input_batch import InputBatch, PaddedShape, StepArrays
from portalm.sampling_params import SamplingParams

BLOCK_SIZE = 4
CONFIG = SchedulerConfig(
    max_batch_tokens=64, max_batch_requests=8, max_model_len=64, block_size=BLOCK_SIZE
)


def make_request(
    request_id: str, num_prompt: int, blocks: list[int], prompt_logprobs: int | None = None
) -> Request:
    request = Request(
        request_id,
        [ord(request_id[0]) * 100 + i for i in range(num_prompt)],
        SamplingParams(prompt_logprobs=prompt_logprobs),
        seed=0,
        max_total_tokens=64,
    )
    request.block_table = blocks
    return request


def make_plan(*planned: tuple[Request, int, int]) -> StepPlan:
    requests = [
        PlannedRequest(r, start, n, start + n >= r.num_tokens + r.num_placeholders, r.epoch)
        for r, start, n in planned
    ]
    return StepPlan(step_id=0, requests=requests, num_tokens=sum(n for _, _, n in planned))


def build(batch: InputBatch, plan: StepPlan, **more: object):
    rows = batch.update(plan)
    return batch.build(plan, rows, **{"sampled_rows": {}, **more})


def blocks_of(arrays: StepArrays, index: int) -> list[int]:
    """The blocks of one request in a step's arrays."""
    begin, end = arrays.block_starts[index : index + 2]
    blocks: list[int] = arrays.block_ids[begin:end].tolist()
    return blocks


def test_arrays_equal_plain_loops_over_random_mixed_steps() -> None:
    rng = random.Random(0)
    batch = InputBatch(CONFIG)
    requests = [
        make_request(name, rng.randrange(2, 30), rng.sample(range(1, 200), 16)) for name in "abcdef"
    ]
    for _ in range(50):
        chosen = rng.sample(requests, rng.randrange(1, 6))
        planned = []
        for r in chosen:
            start = rng.randrange(r.num_tokens)
            planned.append((r, start, rng.randrange(1, min(12, r.num_tokens - start) + 1)))
        arrays = build(batch, make_plan(*planned))

        token_ids, positions, slots = [], [], []
        for r, start, n in planned:
            for position in range(start, start + n):
                token_ids.append(r.token_ids[position])
                positions.append(position)
                slots.append(
                    r.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                )
        assert arrays.token_ids.tolist() == token_ids
        assert arrays.positions.tolist() == positions
        assert arrays.slot_mapping.tolist() == slots
        assert arrays.query_start_loc.tolist() == [0, *np.cumsum([n for _, _, n in planned])]
        assert arrays.seq_lens.tolist() == [start + n for _, start, n in planned]
        for i, (r, start, n) in enumerate(planned):
            num_blocks = -(-(start + n) // BLOCK_SIZE)
            assert blocks_of(arrays, i) == r.block_table[:num_blocks]
        assert arrays.table_width == -(-int(arrays.seq_lens.max()) // BLOCK_SIZE)


def test_only_requests_that_sample_have_a_row_of_logits() -> None:
    whole, part = make_request("a", 5, [1, 2]), make_request("b", 9, [3, 4, 5])

    arrays = build(InputBatch(CONFIG), make_plan((whole, 0, 5), (part, 0, 4)))

    assert arrays.logits_rows.tolist() == [4]
    assert arrays.num_rows == 1


def test_a_step_that_samples_nothing_still_has_a_row() -> None:
    arrays = build(InputBatch(CONFIG), make_plan((make_request("b", 9, [3, 4, 5]), 0, 4)))

    assert arrays.logits_rows.tolist() == [0]
    assert arrays.num_rows == 0


def test_prompt_logprobs_need_every_row_that_predicts_a_prompt_token() -> None:
    request = make_request("a", 6, [1, 2], prompt_logprobs=0)

    first = build(InputBatch(CONFIG), make_plan((request, 0, 4)))
    last = build(InputBatch(CONFIG), make_plan((request, 4, 2)))

    assert first.logits_rows.tolist() == [0, 1, 2, 3]
    assert last.logits_rows.tolist() == [0, 1]  # predicts token 5, then samples


def test_a_known_block_replaced_by_copy_on_write_is_updated() -> None:
    batch, request = InputBatch(CONFIG), make_request("a", 7, [1, 2])
    build(batch, make_plan((request, 0, 6)))
    request.block_table = [1, 9]

    arrays = build(batch, make_plan((request, 6, 1)))

    assert arrays.slot_mapping.tolist() == [9 * BLOCK_SIZE + 2]


def test_a_freed_row_is_reused_by_another_request() -> None:
    batch = InputBatch(CONFIG)
    for name in "abcdefgh":
        build(batch, make_plan((make_request(name, 3, [1]), 0, 3)))
    batch.forget(["c", "unknown"])

    arrays = build(batch, make_plan((make_request("z", 2, [7]), 0, 2)))

    assert arrays.token_ids.tolist() == [12200, 12201]
    assert arrays.slot_mapping.tolist() == [28, 29]


def test_tokens_still_on_the_device_point_to_the_row_that_samples_them() -> None:
    batch, known, waiting = InputBatch(CONFIG), make_request("a", 3, [1]), make_request("b", 3, [2])
    waiting.num_placeholders = 1

    arrays = build(batch, make_plan((known, 2, 1), (waiting, 3, 1)), sampled_rows={"b": 5})

    assert arrays.previous_rows is not None
    assert arrays.previous_rows.tolist() == [-1, 5]


def test_padding_points_into_the_null_block() -> None:
    batch, request = InputBatch(CONFIG), make_request("a", 3, [1])
    build(batch, make_plan((make_request("b", 30, list(range(2, 10))), 0, 30)))  # dirty buffers
    build(batch, make_plan((make_request("c", 30, list(range(2, 10))), 0, 30)))

    arrays = build(batch, make_plan((request, 0, 3)), pad=PaddedShape(8, 4, 6, 4))

    assert arrays.token_ids[3:].tolist() == [0] * 5
    assert arrays.slot_mapping[3:].tolist() == [0] * 5
    assert arrays.query_start_loc.tolist() == [0, 3, 3, 3, 3]
    assert arrays.seq_lens.tolist() == [3, 0, 0, 0]
    assert [blocks_of(arrays, i) for i in range(4)] == [[1], [], [], []]
    assert arrays.table_width == 6
    assert arrays.logits_rows.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("num_rows", [1, 7])
def test_two_steps_in_flight_do_not_share_buffers(num_rows: int) -> None:
    batch, request = InputBatch(CONFIG), make_request("a", 8, [1, 2])

    first = build(batch, make_plan((request, 0, num_rows)))
    kept = first.positions.copy()
    build(batch, make_plan((request, num_rows, 1)))

    assert first.positions.tolist() == kept.tolist()

"""The uploads of steps: one transfer, fixed addresses, and a block table that stays."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from portalm_backends.gpu_common.buckets import mixed_sizes, step_buckets
from portalm_backends.gpu_common.kernels.unpack import CHUNK, unpack, unpack_plainly
from portalm_backends.gpu_common.step_uploads import ARRAY_BYTES, StepUploads
from tests.gpu.fake_device import FakeGpu

WIDTH = 3000


def packed_step(
    rng: random.Random, num_words: int, num_rows: int
) -> tuple[torch.Tensor, int, np.ndarray]:
    """Random words, the starts and the block ids of some rows: (packed, ids_at, starts)."""
    lengths = [rng.choice([0, 1, rng.randrange(WIDTH), WIDTH]) for _ in range(num_rows)]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids_at = num_words + len(starts)
    words = np.array([rng.randrange(1 << 30) for _ in range(ids_at + int(starts[-1]))], np.int32)
    words[num_words:ids_at] = starts
    return torch.from_numpy(words), ids_at, starts


@pytest.mark.parametrize(
    ("num_words", "num_rows"), [(0, 0), (0, 3), (5, 0), (CHUNK, 1), (2 * CHUNK + 7, 6)]
)
def test_unpacking_equals_plain_loops(num_words: int, num_rows: int) -> None:
    packed, ids_at, starts = packed_step(random.Random(0), num_words, num_rows)
    results = []
    for function in (unpack, unpack_plainly):
        arrays = torch.full((num_words + 9,), -7, dtype=torch.int32)
        table = torch.full((num_rows + 1, WIDTH + 5), -9, dtype=torch.int32)
        function(packed, arrays, table, num_words, ids_at, starts)
        results.append((arrays, table))

    torch.testing.assert_close(*results, atol=0, rtol=0)
    arrays, table = results[0]
    assert arrays[:num_words].tolist() == packed[:num_words].tolist()
    assert arrays[num_words:].eq(-7).all()
    for row in range(num_rows):
        begin, end = starts[row : row + 2]
        assert table[row, : end - begin].tolist() == packed[ids_at + begin : ids_at + end].tolist()
        assert table[row, end - begin :].eq(-9).all()


@pytest.mark.parametrize("seed", range(8))
def test_steps_in_flight_read_their_own_arrays(seed: int) -> None:
    """Each step is uploaded before the device has computed the ones before."""
    gpu, rng = FakeGpu(seed=seed), random.Random(seed)
    uploads = StepUploads(gpu, unpack_plainly)
    read, expected, addresses = [], [], set()
    with gpu.running():
        for _ in range(12):
            numbers = np.array([rng.randrange(1000) for _ in range(20)], np.int32)
            floats = np.array([rng.random() for _ in range(3)], np.float32)
            lengths = [rng.randrange(5) for _ in range(4)]
            starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            ids = np.array([rng.randrange(1000) for _ in range(starts[-1])], np.int32)
            with uploads.open():
                a, b = uploads.add(numbers), uploads.add(floats)
                table = uploads.add_table(ids, starts, 5)
            assert a is not None and b is not None
            addresses.add((a.data_ptr(), b.data_ptr(), table.data_ptr()))
            rows = [table[i, :n].clone() for i, n in enumerate(lengths)]
            read.append([a * 1, b * 1, *rows])
            expected.append([numbers.copy(), floats, *np.split(ids.copy(), starts[1:-1])])
            numbers.fill(0)  # the caller may reuse its arrays
            ids.fill(0)
    gpu.drain()

    assert len(addresses) == 1
    for got, want in zip(read, expected, strict=True):
        for x, y in zip(got, want, strict=True):
            assert x.tolist() == y.tolist()


def test_arrays_that_do_not_fit_are_left_to_the_caller() -> None:
    gpu = FakeGpu()
    uploads = StepUploads(gpu, unpack_plainly)
    with gpu.running(), uploads.open():
        assert uploads.add(np.zeros(ARRAY_BYTES // 4 - 4, np.int32)) is not None
        assert uploads.add(np.zeros(5, np.int32)) is None
        assert uploads.add(np.zeros(4, np.int32)) is not None


def test_a_failed_step_sends_nothing() -> None:
    gpu = FakeGpu()
    uploads = StepUploads(gpu, unpack_plainly)
    with gpu.running():
        with pytest.raises(ZeroDivisionError), uploads.open():
            uploads.add(np.zeros(3, np.int32))
            _ = 1 / 0
        before = gpu.num_launches
        with uploads.open():
            pass

    assert gpu.num_launches == before
    assert not uploads.is_open


@pytest.mark.parametrize(
    ("max_tokens", "max_requests"), [(64, 8), (300, 256), (8192, 1), (8192, 256)]
)
def test_buckets_hold_every_small_step_with_little_padding(
    max_tokens: int, max_requests: int
) -> None:
    buckets = step_buckets(max_tokens, max_requests, 7)
    largest = mixed_sizes(max_tokens)[-1]

    assert buckets == sorted(set(buckets))
    assert max(b.num_requests for b in buckets) == buckets[-1].num_requests  # captured first
    for num_tokens in range(2, largest + 1):
        for num_requests in {1, 2, 33, num_tokens - 1, max_requests}:
            if num_requests >= num_tokens or num_requests > max_requests:
                continue
            fitting = [
                b
                for b in buckets
                if b.num_tokens >= num_tokens
                and b.num_requests >= num_requests
                and b.max_query_len >= num_tokens
            ]
            assert fitting, (num_tokens, num_requests)
            # below 184 tokens the weights take longer to read than to multiply by
            assert fitting[0].num_tokens <= max(192, num_tokens * 7 / 6)

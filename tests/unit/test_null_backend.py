"""The null device: its formula, its checks, its stream and its faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portalm.backend import Bucket, KVSpec, SampleParams, StepFn, StepInputs, StepMeta, load_backend
from portalm.engine.messages import AddRequest
from portalm.errors import BackendError, Unsupported
from portalm.sampling_params import SamplingParams
from portalm_backends.null.backend import NullBackend, next_id
from portalm_backends.null.cache import NullKV, context_hash
from tests.tiny import VOCAB_SIZE, ask, make_engine, run, tokens

B, V = 4, 50
SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_size=8, block_size=B, dtype="float32")


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_meta(query_lens: Sequence[int], seq_lens: Sequence[int]) -> StepMeta:
    """Requests whose blocks are numbered in order, from 1."""
    num_blocks = [-(-n // B) for n in seq_lens]
    table = torch.zeros(len(seq_lens), max(num_blocks), dtype=torch.int32)
    first = 1
    for i, count in enumerate(num_blocks):
        table[i, :count] = torch.arange(first, first + count)
        first += count
    positions = [p for q, n in zip(query_lens, seq_lens, strict=True) for p in range(n - q, n)]
    rows = np.repeat(np.arange(len(query_lens)), query_lens)
    slots = [int(table[r, p // B]) * B + p % B for r, p in zip(rows, positions, strict=True)]
    loc = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    return StepMeta(
        positions=int32(positions),
        slot_mapping=int32(slots),
        query_start_loc=torch.from_numpy(loc.copy()),
        seq_lens=int32(list(seq_lens)),
        block_table=table,
        logits_rows=int32((loc[1:] - 1).tolist()),
        host_query_start_loc=loc,
        host_seq_lens=np.array(seq_lens, np.int32),
        num_decodes=sum(q == 1 for q in query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


def make_inputs(meta: StepMeta, token_ids: Sequence[int], **changes: Any) -> StepInputs:
    num_rows = len(meta.logits_rows)
    sample = SampleParams(
        temperature=torch.zeros(num_rows),
        top_k=torch.zeros(num_rows, dtype=torch.int32),
        top_p=torch.ones(num_rows),
        min_p=torch.zeros(num_rows),
        seed=torch.zeros(num_rows, dtype=torch.int64),
        position=torch.zeros(num_rows, dtype=torch.int64),
        is_greedy=True,
        has_filters=False,
    )
    return StepInputs(token_ids=int32(list(token_ids)), meta=meta, sample=sample, **changes)


def start(backend: NullBackend, num_blocks: int = 20) -> tuple[StepFn, NullKV]:
    """Return a captured step of a model that consists of an output head, and a cache."""
    head = backend.pack(torch.zeros(V, 8))

    def step(weights: Any, kv: Any, inputs: StepInputs) -> Any:
        hidden = torch.zeros(len(inputs.meta.logits_rows), 8)
        return kv, backend.sample(backend.logits(hidden, head), inputs.sample)

    return backend.compile(step, None, None), backend.kv_alloc(SPEC, num_blocks)


def sample_ids(backend: NullBackend, step: StepFn, kv: NullKV, inputs: StepInputs) -> list[int]:
    backend.prepare(inputs.meta, [])
    _, out = step({}, kv, inputs)
    result: list[int] = backend.to_host(out.token_ids).result().tolist()
    return result


# -- the formula ------------------------------------------------------------------------------


def test_it_is_only_used_by_name() -> None:
    assert NullBackend.rank < 0
    assert isinstance(load_backend("null"), NullBackend)


def test_each_row_samples_from_its_last_token() -> None:
    backend = NullBackend()
    step, kv = start(backend)

    ids = sample_ids(backend, step, kv, make_inputs(make_meta([1, 3, 6], [1, 3, 6]), range(10, 20)))

    assert ids == [next_id(10, 0, V), next_id(13, 2, V), next_id(19, 5, V)]


def test_a_row_that_reads_the_cache_samples_from_its_whole_context() -> None:
    backend = NullBackend(reads_cache=True)
    step, kv = start(backend)
    prompts = [[7], [11, 12, 13], list(range(20, 29))]
    lens = [len(p) for p in prompts]
    first = sample_ids(
        backend, step, kv, make_inputs(make_meta(lens, lens), [t for p in prompts for t in p])
    )

    known = [[*p, t] for p, t in zip(prompts, first, strict=True)]
    meta = make_meta([1, 1, 1], [n + 1 for n in lens])
    meta.block_table = make_meta(lens, lens).block_table  # none of them fills its last block
    last_blocks = [1, 2, 5]
    meta.slot_mapping = int32([b * B + n % B for b, n in zip(last_blocks, lens, strict=True)])
    second = sample_ids(backend, step, kv, make_inputs(meta, first))

    assert first == [next_id(context_hash(p), len(p) - 1, V) for p in prompts]
    assert second == [next_id(context_hash(k), len(k) - 1, V) for k in known]


def test_contexts_that_differ_in_one_token_or_in_order_have_different_hashes() -> None:
    contexts = [(1,), (0, 1), (1, 0), (1, 2, 3), (3, 2, 1), (2, 1, 3), (0,), (0, 0), (0, 0, 0)]

    assert len({context_hash(c) for c in contexts}) == len(contexts)


def test_target_rows_report_their_target() -> None:
    backend = NullBackend()
    step, kv = start(backend)
    inputs = make_inputs(make_meta([2, 3], [2, 3]), [5, 6, 7, 8, 9])
    inputs.sample.targets = int32([33, -1])

    assert sample_ids(backend, step, kv, inputs) == [33, next_id(9, 2, V)]


def test_all_tokens_are_equally_likely() -> None:
    backend = NullBackend()
    step, kv = start(backend)
    inputs = make_inputs(make_meta([2], [2]), [5, 6])
    inputs.sample.num_logprobs = 3

    _, out = step({}, kv, inputs)

    assert out.top_ids is not None and out.top_logprobs is not None and out.logprobs is not None
    assert out.top_ids.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(out.logprobs, torch.log(torch.tensor([1 / V])))
    torch.testing.assert_close(out.top_logprobs, torch.log(torch.full((1, 3), 1 / V)))


# -- what it refuses --------------------------------------------------------------------------


def change(name: str, index: Any, value: int) -> Callable[[StepMeta], None]:
    def plant(meta: StepMeta) -> None:
        getattr(meta, name)[index] = value

    return plant


def put(**values: Any) -> Callable[[StepMeta], None]:
    def plant(meta: StepMeta) -> None:
        for name, value in values.items():
            setattr(meta, name, value)

    return plant


MISTAKES: dict[str, tuple[Callable[[StepMeta], None], str]] = {
    "a slot off by one": (change("slot_mapping", 1, 9), r"slot_mapping: element \[1\] is 9"),
    "a position off by one": (change("positions", 0, 4), r"positions: element \[0\] is 4"),
    "another request's block": (change("block_table", (1, 0), 1), "slot_mapping"),
    "the null block in a context": (change("block_table", (0, 0), 0), "null block"),
    "a block past the context": (change("block_table", (1, 1), 7), "after the contexts"),
    "a block table too narrow": (
        lambda meta: setattr(meta, "block_table", meta.block_table[:, :1]), "has 1 columns",
    ),
    "seq_lens on the device": (change("seq_lens", 0, 5), "seq_lens on the device"),
    "query_start_loc on the device": (change("query_start_loc", 1, 2), "query_start_loc on the"),
    "a logits row that is no token": (change("logits_rows", 0, 4), r"logits_rows \[4, 3\]"),
    "one decode too few": (put(num_decodes=0), "requests after the decodes"),
    "one decode too many": (put(num_decodes=2), "decodes, which come first"),
    "max_query_len too large": (put(max_query_len=2), "max_query_len"),
    "max_seq_len too large": (put(max_seq_len=5), "max_seq_len"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_step_that_contradicts_itself_is_refused(mistake: str) -> None:
    backend = NullBackend()
    start(backend)
    meta = make_meta([1, 3], [6, 3])
    backend.prepare(replace(meta), [])
    plant, message = MISTAKES[mistake]
    plant(meta)

    with pytest.raises(BackendError, match=message) as caught:
        backend.prepare(meta, [])

    assert caught.value.kind == "shape"


def test_two_requests_may_not_write_one_block() -> None:
    backend = NullBackend()
    start(backend)
    meta = make_meta([2, 2], [2, 2])
    meta.block_table[1, 0] = 1
    meta.slot_mapping[2:] = meta.slot_mapping[:2]

    with pytest.raises(BackendError, match="two tokens would be written to one slot"):
        backend.prepare(meta, [])


def test_padding_by_the_rules_is_accepted() -> None:
    backend = NullBackend()
    step, kv = start(backend)
    meta = make_meta([1, 3], [1, 3])
    meta.positions = int32([0, 0, 1, 2, 0, 0])
    meta.slot_mapping = int32([4, 8, 9, 10, 0, 0])
    meta.host_query_start_loc = np.array([0, 1, 4, 4], np.int32)
    meta.query_start_loc = torch.from_numpy(meta.host_query_start_loc)
    meta.host_seq_lens = np.array([1, 3, 0], np.int32)
    meta.seq_lens = torch.from_numpy(meta.host_seq_lens)
    meta.block_table = int32([[1, 0], [2, 0], [0, 0]])
    meta.logits_rows = int32([0, 3, 0])
    meta.bucket = Bucket(6, 3, 2, 6)

    ids = sample_ids(backend, step, kv, make_inputs(meta, [5, 6, 7, 8, 0, 0]))

    assert ids == [next_id(5, 0, V), next_id(8, 2, V), next_id(5, 0, V)]


def test_a_pad_token_may_only_go_to_the_null_block() -> None:
    backend = NullBackend()
    start(backend)
    meta = make_meta([2], [2])
    meta.positions, meta.slot_mapping = int32([0, 1, 0]), int32([4, 5, 8])

    with pytest.raises(BackendError, match="pad token would be written outside block 0"):
        backend.prepare(meta, [])


def test_a_block_that_does_not_exist_is_refused() -> None:
    backend = NullBackend()
    step, kv = start(backend, num_blocks=3)

    with pytest.raises(BackendError, match="block 3 is read, there are 3"):
        step({}, kv, make_inputs(make_meta([9], [9]), [5] * 9))
    with pytest.raises(BackendError, match="destination blocks"):
        backend.kv_copy(kv, int32([1]), int32([3]))
    with pytest.raises(BackendError, match="source blocks"):
        backend.kv_copy(kv, int32([0]), int32([2]))


@pytest.mark.parametrize("token_id", [-1, V])
def test_a_token_outside_the_vocabulary_is_refused(token_id: int) -> None:
    backend = NullBackend()
    step, kv = start(backend)

    with pytest.raises(BackendError, match=f"not all from 0 to {V - 1}"):
        step({}, kv, make_inputs(make_meta([2], [2]), [5, token_id]))


def test_a_context_that_was_never_computed_is_refused() -> None:
    backend = NullBackend()
    step, kv = start(backend)

    with pytest.raises(BackendError, match=r"position 0 from block 1, offset 0, which holds noth"):
        step({}, kv, make_inputs(make_meta([1], [6]), [5]))


def test_a_block_of_other_positions_is_refused() -> None:
    backend = NullBackend()
    step, kv = start(backend)
    step({}, kv, make_inputs(make_meta([8], [8]), range(5, 13)))
    meta = make_meta([1], [9])
    meta.block_table = int32([[2, 1, 3]])
    backend.prepare(meta, [])

    with pytest.raises(BackendError, match="which holds a token of position 4"):
        step({}, kv, make_inputs(meta, [5]))


def test_a_copied_block_gives_the_same_tokens() -> None:
    backend = NullBackend(reads_cache=True)
    step, kv = start(backend)
    step({}, kv, make_inputs(make_meta([6], [6]), range(5, 11)))
    backend.kv_copy(kv, int32([2]), int32([9]))
    meta = make_meta([1], [7])
    meta.block_table, meta.slot_mapping = int32([[1, 9]]), int32([9 * B + 2])

    ids = sample_ids(backend, step, kv, make_inputs(meta, [11]))

    assert ids == [next_id(context_hash(range(5, 12)), 6, V)]


def test_only_captured_steps_run() -> None:
    backend = NullBackend()
    start(backend)

    with pytest.raises(Unsupported, match="enforce_eager"):
        backend.linear(torch.zeros(1, 8), backend.pack(torch.zeros(V, 8)))
    with backend.seal(), pytest.raises(BackendError, match="sealed"):
        backend.compile(lambda weights, kv, inputs: (kv, None), None, None)  # type: ignore[arg-type,return-value]


def test_a_vocabulary_without_a_token_to_sample_is_refused() -> None:
    backend = NullBackend()
    head = backend.pack(torch.zeros(3, 8))
    step = backend.compile(
        lambda weights, kv, inputs: (kv, backend.logits(torch.zeros(1, 8), head)),  # type: ignore[arg-type,return-value]
        None,
        None,
    )

    with pytest.raises(Unsupported, match="vocabulary has only 3 tokens"):
        step({}, backend.kv_alloc(SPEC, 5), make_inputs(make_meta([1], [1]), [1]))


# -- its stream -------------------------------------------------------------------------------


def test_a_synchronous_step_is_done_when_its_call_returns() -> None:
    backend = NullBackend(latency_s=0.05)
    step, kv = start(backend)
    started = time.perf_counter()

    _, out = step({}, kv, make_inputs(make_meta([1], [1]), [5]))

    assert time.perf_counter() - started >= 0.05
    assert backend.to_host(out.token_ids).done()


def test_a_step_on_the_stream_is_done_later_and_in_order() -> None:
    backend = NullBackend(max_steps_in_flight=2)
    step, kv = start(backend)
    gate = threading.Event()
    backend._enqueue(lambda: gate.wait() and None)
    _, first = step({}, kv, make_inputs(make_meta([1], [1]), [5]))
    one = backend.to_host(first.token_ids)
    _, second = step({}, kv, make_inputs(make_meta([1], [1]), [6]))
    two = backend.to_host(second.token_ids)

    assert not one.done() and not two.done()
    assert first.token_ids.tolist() == [-1]
    gate.set()
    assert two.result().tolist() == [next_id(6, 0, V)]
    assert one.done()
    assert one.result().tolist() == [next_id(5, 0, V)]


def test_steps_on_the_stream_take_their_latency() -> None:
    backend = NullBackend(latency_s=0.1, max_steps_in_flight=2)
    step, kv = start(backend)
    started = time.perf_counter()
    step({}, kv, make_inputs(make_meta([1], [1]), [5]))
    _, second = step({}, kv, make_inputs(make_meta([1], [1]), [6]))

    backend.to_host(second.token_ids).result()

    assert time.perf_counter() - started >= 0.2


def test_a_token_that_is_still_on_the_device_is_looked_up_there() -> None:
    backend = NullBackend(latency_s=0.05, max_steps_in_flight=2)
    step, kv = start(backend)
    _, first = step({}, kv, make_inputs(make_meta([1, 2], [1, 2]), [5, 6, 7]))
    inputs = make_inputs(
        make_meta([1, 1], [2, 3]),
        [49, 49],  # ignored
        previous_ids=first.token_ids,
        previous_rows=int32([0, 1]),
    )

    ids = sample_ids(backend, step, kv, inputs)

    assert ids == [next_id(next_id(5, 0, V), 1, V), next_id(next_id(7, 1, V), 2, V)]


def test_a_row_that_the_previous_step_does_not_have_is_refused() -> None:
    backend = NullBackend()
    step, kv = start(backend)
    _, first = step({}, kv, make_inputs(make_meta([1], [1]), [5]))
    meta = make_meta([1], [2])

    with pytest.raises(BackendError, match="previous_rows contains row 1 of 1"):
        step(
            {},
            kv,
            make_inputs(meta, [0], previous_ids=first.token_ids, previous_rows=int32([1])),
        )


def test_block_copies_wait_for_the_steps_before_them() -> None:
    backend = NullBackend(latency_s=0.05, max_steps_in_flight=2, reads_cache=True)
    step, kv = start(backend)
    step({}, kv, make_inputs(make_meta([3], [3]), [5, 6, 7]))
    backend.kv_copy(kv, int32([1]), int32([8]))
    meta = make_meta([1], [4])
    meta.block_table, meta.slot_mapping = int32([[8]]), int32([8 * B + 3])

    ids = sample_ids(backend, step, kv, make_inputs(meta, [9]))

    assert ids == [next_id(context_hash([5, 6, 7, 9]), 3, V)]


def test_arrays_that_the_host_reuses_do_not_change_a_step_in_flight() -> None:
    backend = NullBackend(latency_s=0.05, max_steps_in_flight=2)
    step, kv = start(backend)
    host = np.array([5, 6], np.int32)
    inputs = make_inputs(make_meta([2], [2]), [0, 0])
    inputs.token_ids = backend.to_device(host)

    _, out = step({}, kv, inputs)
    future = backend.to_host(out.token_ids)
    host[:] = 40
    inputs.meta.host_seq_lens[:] = 0

    assert future.result().tolist() == [next_id(6, 1, V)]


def test_a_device_that_is_dropped_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    backend = NullBackend(max_steps_in_flight=2)
    step, kv = start(backend)
    _, out = step({}, kv, make_inputs(make_meta([1], [1]), [5]))
    backend.to_host(out.token_ids).result()
    [stream] = set(threading.enumerate()) - before

    del backend, step
    stream.join(timeout=10)

    assert not stream.is_alive()


# -- its faults -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["oom", "kernel", "timeout", "device_lost"])
def test_an_injected_fault_is_raised_by_the_future(kind: Any) -> None:
    backend = NullBackend(max_steps_in_flight=2, fail_at_step=1, fail_kind=kind)
    step, kv = start(backend)
    futures = []
    for token_id in (5, 6, 7):
        _, out = step({}, kv, make_inputs(make_meta([1], [1]), [token_id]))
        futures.append(backend.to_host(out.token_ids))

    assert futures[0].result().tolist() == [next_id(5, 0, V)]
    with pytest.raises(BackendError, match="injected fault at step 1") as caught:
        futures[1].result()
    assert caught.value.kind == kind
    assert futures[2].result().tolist() == [next_id(7, 0, V)]


def test_an_injected_fault_is_raised_by_the_call_of_a_synchronous_step() -> None:
    backend = NullBackend(fail_at_step=0)
    step, kv = start(backend)
    inputs = make_inputs(make_meta([1], [1]), [5])

    with pytest.raises(BackendError, match="injected fault at step 0"):
        step({}, kv, inputs)

    assert sample_ids(backend, step, kv, inputs) == [next_id(5, 0, V)]


# -- under an engine --------------------------------------------------------------------------


def chain(prompt: Sequence[int], num_tokens: int) -> list[int]:
    known = list(prompt)
    for _ in range(num_tokens):
        known.append(next_id(context_hash(known), len(known) - 1, VOCAB_SIZE))
    return known[len(prompt) :]


@pytest.fixture(params=[1, 2], ids=["synchronous", "one step ahead"])
def steps_in_flight(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_prefix_hits_reuse_blocks_of_the_same_prefix(tmp_path: Path, steps_in_flight: int) -> None:
    backend = NullBackend(max_steps_in_flight=steps_in_flight, reads_cache=True)
    engine = make_engine(tmp_path, backend, num_gpu_blocks_override=34)
    shared = [3 + (11 * i) % 500 for i in range(100)]
    prompts = {str(i): [*shared[: 16 * (i % 7)], *range(9 + i, 40 + i)] for i in range(30)}
    for request_id, prompt in prompts.items():
        ask(engine, request_id, prompt, max_tokens=100)

    answers = tokens(run(engine))

    assert engine.stats().prefix_hits_total > 0
    assert engine.stats().preemptions_total > 0
    assert answers == {k: chain(p, 100) for k, p in prompts.items()}


def test_forks_write_to_separate_blocks(tmp_path: Path, steps_in_flight: int) -> None:
    backend = NullBackend(max_steps_in_flight=steps_in_flight, reads_cache=True)
    engine = make_engine(tmp_path, backend)
    prompt = list(range(20, 57))  # ends within a block: its last one has to be copied
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    for i in range(4):
        engine.add(
            AddRequest(
                request_id=str(i),
                prompt_token_ids=prompt,
                params=params,
                seed=i,
                fork_of="0" if i else None,
            )
        )

    answers = tokens(run(engine))

    assert answers == {str(i): chain(prompt, 20) for i in range(4)}


class CopiesNothing(NullBackend):
    def kv_copy(self, kv: NullKV, src: torch.Tensor, dst: torch.Tensor) -> NullKV:
        return kv


def test_a_missing_block_copy_is_detected(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, CopiesNothing())
    prompt = list(range(20, 57))
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    for i in range(2):
        engine.add(
            AddRequest(
                request_id=str(i),
                prompt_token_ids=prompt,
                params=params,
                seed=i,
                fork_of="0" if i else None,
            )
        )

    outputs = run(engine)

    errors = [many[-1].error for many in outputs.values() if many[-1].error]
    assert any("which holds nothing" in error for error in errors)

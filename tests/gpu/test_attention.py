"""The attention kernels, interpreted and compared with loops in float64, and their plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from portalm.backend import AttentionSpec, Bucket, StepMeta
from portalm.conformance import laws, operations, reference
from portalm.conformance.check import Item
from portalm.conformance.numerics import NMSE_BOUND, require_close
from portalm.conformance.subject import Subject
from portalm_backends.gpu_common import attention
from portalm_backends.gpu_common.attention import AttentionPlan, Tiles
from portalm_backends.gpu_common.cache import ScaledKV
from portalm_backends.gpu_common.tiles import tile_shape
from portalm_backends.portable import kv_codes
from tests.gpu.interpreted import InterpretedBackend, complete, some

BUCKETS = [
    Bucket(num_tokens=4, num_requests=4, num_blocks=24, max_query_len=1),
    Bucket(num_tokens=64, num_requests=8, num_blocks=24, max_query_len=64),
    Bucket(num_tokens=512, num_requests=16, num_blocks=24, max_query_len=512),
]


def items(*names: str) -> list[Item]:
    every = [*operations.CHECKS, *laws.CHECKS]
    found = [item for check in every if check.name in names for item in check.items()]
    return [item for item in found if "bfloat16" not in item.case]


ATTEND, ENCODE = items("attend"), items("attend_encoder")
LAWS = items(
    "padding",
    "block permutation",
    "chunked prefill",
    "alone or in a batch",
    "encoder padding",
    "encoder alone or in a batch",
    "export and import",
    "copy",
)
"""Cases in float32 and float16 only, because the interpreter computes bfloat16 wrongly."""

QUICK = [
    item
    for item in [*ATTEND, *ENCODE]
    if item.case in {"decode, gqa, float16", "17, gqa of 3, float32"}
]


@pytest.mark.parametrize("item", QUICK, ids=lambda item: item.case)
def test_attention_matches_the_reference(item: Item) -> None:
    result = item.run(Subject(InterpretedBackend()))

    assert result.status == "pass", result.message


@complete  # without buckets: test_conformance.py
@pytest.mark.parametrize("item", [*ATTEND, *LAWS], ids=lambda item: item.name)
def test_the_conformance_cases_pass_in_buckets(item: Item) -> None:
    result = item.run(Subject(InterpretedBackend(buckets=BUCKETS)))

    assert result.status == "pass", result.message


# -- longer contexts than those of the conformance kit -----------------------------------------

SPEC = AttentionSpec(num_heads=4, num_kv_heads=1, head_size=16, scale=0.5)
BLOCK = 16
EVERYTHING = dataclasses.replace(
    SPEC, sliding_window=400, soft_cap=3.0, alibi_slopes=(0.5, 0.25, 0.125, 0.0625), has_sinks=True
)
SINKS = torch.tensor([1.0, -2.0, 0.5, 3.0])
ALONE, CROWD = 10**6, 1
"""Number of programs that fill the device: so high that every context is split, or so low that
none is."""


class Step:
    """Random requests over blocks in random order; slots without a token are NaN."""

    def __init__(
        self,
        query_lens: list[int],
        seq_lens: list[int],
        bucket: Bucket | None = None,
        *,
        block: int = BLOCK,
        size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        num_requests, num_tokens = len(query_lens), sum(query_lens)
        if bucket is not None:
            num_requests, num_tokens = bucket.num_requests, bucket.num_tokens
        blocks = [-(-n // block) for n in seq_lens]
        num_blocks = 1 + sum(blocks)
        ids = (1 + torch.randperm(num_blocks - 1, generator=generator)).split(blocks)
        # around the table are blocks that do not exist: reading them is an illegal access
        table = torch.full((num_requests + 2, max(blocks)), 2**30, dtype=torch.int32)[1:-1]
        table[:] = 0
        self.cache = torch.full((num_blocks, 1, 2, block, size), float("nan"), dtype=dtype)
        self.key, self.value = [], []
        for i, (length, own) in enumerate(zip(seq_lens, ids, strict=True)):
            table[i, : len(own)] = own
            pair = torch.randn((2, length, 1, size), generator=generator).to(
                dtype
            )  # [2, N, H_kv, D]
            slots = torch.full((2, len(own) * block, 1, size), float("nan"), dtype=dtype)
            slots[:, :length] = pair
            self.cache[own] = slots.view(2, len(own), block, 1, size).permute(1, 3, 0, 2, 4)
            self.key.append(pair[0])
            self.value.append(pair[1])
        self.query = torch.full((num_tokens, 4, size), float("nan"), dtype=dtype)
        self.query[: sum(query_lens)] = 2 * torch.randn(
            (sum(query_lens), 4, size), generator=generator
        )
        loc = np.full(num_requests + 1, sum(query_lens), np.int32)
        loc[: len(query_lens)] = np.cumsum([0, *query_lens[:-1]])
        lengths = np.zeros(num_requests, np.int32)
        lengths[: len(seq_lens)] = seq_lens
        self.meta = StepMeta(
            positions=torch.empty(0),
            slot_mapping=torch.empty(0),
            query_start_loc=torch.from_numpy(loc),
            seq_lens=torch.from_numpy(lengths),
            block_table=table,
            logits_rows=torch.empty(0),
            host_query_start_loc=loc,
            host_seq_lens=lengths,
            num_decodes=query_lens.count(1),
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            bucket=bucket,
        )
        self.query_lens = query_lens

    def plan(self, spec: AttentionSpec, num_programs: int) -> AttentionPlan:
        return attention.plan_attention(
            self.meta, spec, torch.from_numpy, num_programs=num_programs
        )

    def attend(
        self, spec: AttentionSpec, plan: AttentionPlan, family: str = "nvidia"
    ) -> torch.Tensor:
        """Attention of the step's tokens, without padding."""
        sinks = SINKS if spec.has_sinks else None
        out = attention.attend(self.cache, self.query, self.meta, spec, plan, sinks, family=family)
        return out[: sum(self.query_lens)]

    def expected(self, spec: AttentionSpec) -> Any:
        sinks = SINKS.double().numpy() if spec.has_sinks else None
        queries = self.query[: sum(self.query_lens)].double().split(self.query_lens)
        return np.concatenate(
            [
                reference.attention(q.numpy(), k.double().numpy(), v.double().numpy(), spec, sinks)
                for q, k, v in zip(queries, self.key, self.value, strict=True)
            ]
        )


@pytest.mark.parametrize("spec", [SPEC, EVERYTHING], ids=["plain", "everything"])
def test_a_split_decode_is_bit_identical_to_a_whole_one(spec: AttentionSpec) -> None:
    step = Step([1, 3], [600, 513])

    split, whole = step.plan(spec, ALONE), step.plan(spec, CROWD)

    assert split.narrow is not None and len(split.narrow.merges) == 2
    assert whole.narrow is not None and len(whole.narrow.merges) == 0
    actual = step.attend(spec, split)
    assert torch.equal(actual, step.attend(spec, whole))
    require_close("", actual.numpy(), step.expected(spec), NMSE_BOUND["float32"])


@pytest.mark.parametrize("spec", [SPEC, EVERYTHING], ids=["plain", "everything"])
def test_a_chunk_after_a_long_context_is_split(spec: AttentionSpec) -> None:
    step = Step([12], [523])

    plan = step.plan(spec, ALONE)

    assert plan.wide is not None and len(plan.wide.merges) == 1
    actual = step.attend(spec, plan)
    require_close("", actual.numpy(), step.expected(spec), NMSE_BOUND["float32"])


OVERLAPPED = {  # name: query_lens, seq_lens, block, num_programs
    "tables end with the last tile": ([64, 8], [128, 256], 64, CROWD),
    "only a diagonal, and 5 tiles": ([17, 90], [17, 320], 16, CROWD),
    "parts end before the diagonal": ([12], [523], 16, ALONE),
    "a part begins after the first query": ([20], [520], 16, ALONE),
    "blocks of two tiles": ([70], [512], 128, ALONE),
}


@pytest.mark.parametrize(
    "case", some(OVERLAPPED, lambda case: "tables" in case or "begins" in case)
)
@pytest.mark.parametrize("spec", [SPEC, EVERYTHING], ids=["plain", "everything"])
def test_overlapped_tiles_have_the_same_bits(spec: AttentionSpec, case: str) -> None:
    *lengths, block, num_programs = OVERLAPPED[case]
    spec = dataclasses.replace(spec, head_size=80, sliding_window=spec.sliding_window and 100)
    step = Step(*lengths, block=block, size=80, dtype=torch.float16)
    overlapped, plain = (tile_shape("wide", x, torch.float16, 80, 4) for x in ("nvidia", "ampere"))
    assert overlapped == dataclasses.replace(plain, overlaps=True) != plain
    plan = step.plan(spec, num_programs)

    actual = step.attend(spec, plan)

    assert torch.equal(actual, step.attend(spec, plan, family="ampere"))
    require_close("", actual.float().numpy(), step.expected(spec), NMSE_BOUND["float16"])


def test_a_captured_step_can_be_replayed_with_other_work() -> None:
    bucket = Bucket(num_tokens=24, num_requests=4, num_blocks=64, max_query_len=24)
    first, second = Step([1, 20], [40, 20], bucket), Step([1, 1, 11], [300, 20, 280], bucket)
    # the graph with the launches for split contexts computes every step
    captured = dataclasses.replace(first.plan(SPEC, 264), splits=True)

    other = second.plan(SPEC, 264)
    for one, two in ((captured.narrow, other.narrow), (captured.wide, other.wide)):
        assert one is not None and two is not None
        one.items.copy_(two.items)
        one.merges.copy_(two.merges)

    actual = second.attend(SPEC, captured)
    require_close("", actual.numpy(), second.expected(SPEC), NMSE_BOUND["float32"])


# -- plans ------------------------------------------------------------------------------------


def seen(step: Step, tiles: Tiles | None) -> list[tuple[int, int, int]]:
    """(request, query row, context token) of everything that the items cover."""
    pairs = []
    for item in [] if tiles is None else tiles.items.tolist():
        request, row, count, position, begin, end = item[:6]
        for i in range(count):
            pairs += [(request, row + i, at) for at in range(begin, min(end, position + i + 1))]
    return pairs


@pytest.mark.parametrize("num_programs", [ALONE, 64, CROWD])
@pytest.mark.parametrize("bucket", [None, Bucket(256, 8, 128, 256)], ids=["exact", "bucket"])
def test_the_items_cover_every_context_token_once(num_programs: int, bucket: Bucket | None) -> None:
    query_lens, seq_lens = [1, 1, 1, 8, 9, 130], [1, 900, 256, 300, 257, 131]
    step = Step(query_lens, seq_lens, bucket)

    plan = step.plan(SPEC, num_programs)

    pairs = seen(step, plan.narrow) + seen(step, plan.wide)
    row = 0
    for request, (count, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        for i in range(count):
            expected = [(request, row + i, at) for at in range(length - count + i + 1)]
            assert sorted(p for p in pairs if p[1] == row + i) == expected
        row += count


@pytest.mark.parametrize("num_programs", [ALONE, CROWD])
def test_every_part_is_merged_exactly_once(num_programs: int) -> None:
    plan = Step([1, 1, 40], [1000, 9000, 700]).plan(SPEC, num_programs)

    for tiles in (plan.narrow, plan.wide):
        assert tiles is not None
        parts = sorted(item[6] for item in tiles.items.tolist() if item[6] >= 0)
        merged = [
            part
            for row, count, first, number in tiles.merges.tolist()
            for part in range(first, first + number)
        ]
        assert parts == sorted(merged) == list(range(tiles.num_partials))
        rows = {item[6]: item[1] for item in tiles.items.tolist()}
        for row, _, first, number in tiles.merges.tolist():
            assert {rows[part] for part in range(first, first + number)} == {row}


def test_all_plans_of_a_bucket_have_the_same_shapes() -> None:
    bucket = Bucket(num_tokens=256, num_requests=8, num_blocks=128, max_query_len=256)
    batches = [([1], [1]), ([1] * 8, [2000] * 8), ([256], [256]), ([32] * 8, [900] * 8)]
    plans = [Step(*batch, bucket).plan(SPEC, n) for batch in batches for n in (ALONE, CROWD)]

    def shape(tiles: Tiles | None) -> Any:
        assert tiles is not None
        shapes = tiles.items.shape, tiles.merges.shape
        return *shapes, tiles.num_partials, tiles.tokens, tiles.merge_tokens

    assert len({(shape(plan.narrow), shape(plan.wide)) for plan in plans}) == 1


def test_a_decode_bucket_has_no_wide_tiles() -> None:
    bucket = Bucket(num_tokens=8, num_requests=8, num_blocks=128, max_query_len=1)

    assert Step([1] * 3, [9, 900, 30], bucket).plan(SPEC, 264).wide is None


def test_long_contexts_have_longer_parts() -> None:
    plan = Step([1], [200_000]).plan(SPEC, ALONE)

    assert plan.narrow is not None
    assert plan.narrow.merges.tolist() == [[0, 1, 0, 25]]


def test_the_longest_items_come_first() -> None:
    plan = Step([1, 1, 1], [30, 250, 90]).plan(SPEC, CROWD)

    assert plan.narrow is not None
    assert plan.narrow.items[:, 0].tolist() == [1, 2, 0]


@pytest.mark.parametrize("dtype", ["float32", "int8", "fp8"])
def test_programs_that_share_a_kv_head_compute_the_same(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step([1, 3, 20], [40, 33, 20])
    expected = step.expected(SPEC)
    cache = step.cache if dtype == "float32" else scaled(step.cache, dtype)
    results = []
    for most in (64, 32):  # query heads of 16 numbers: all four in one program, or two
        monkeypatch.setattr(attention, "_MOST_QUERY", most)
        attention._spec_of_programs.cache_clear()
        plan = step.plan(SPEC, CROWD)
        results.append(attention.attend(cache, step.query, step.meta, SPEC, plan)[: len(expected)])
    attention._spec_of_programs.cache_clear()

    require_close("", results[0].numpy(), results[1].double().numpy(), NMSE_BOUND["float32"])
    if dtype == "float32":
        require_close("", results[1].numpy(), expected, NMSE_BOUND["float32"])


def scaled(cache: torch.Tensor, dtype: str) -> ScaledKV:
    """One layer of a cache, [NB, H_kv, 2, B, D], in 8 bits."""
    codes, scales = kv_codes.quantize(cache, dtype)
    return ScaledKV(dtype, codes.view(torch.int8), scales)


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "max_query_len"),
    [([1] * 6, [40, 9, 33, 300, 21, 17], 1), ([1, 1, 20, 3], [40, 9, 20, 30], 24)],
    ids=["decodes", "mixed"],
)
def test_a_step_without_splits_needs_no_items_for_parts(
    query_lens: list[int], seq_lens: list[int], max_query_len: int
) -> None:
    bucket = Bucket(num_tokens=32, num_requests=8, num_blocks=64, max_query_len=max_query_len)
    step = Step(query_lens, seq_lens, bucket)
    plan = step.plan(SPEC, CROWD)
    expected = step.attend(SPEC, dataclasses.replace(plan, splits=True))

    assert plan.may_be_whole
    assert not plan.splits
    for tiles in (plan.narrow, plan.wide):
        if tiles is not None:
            assert len(tiles.items) > tiles.num_whole
            tiles.items[tiles.num_whole :] = 1 << 30  # a program that reads one fails
            tiles.merges[:] = 1 << 30
    assert torch.equal(step.attend(SPEC, plan), expected)
    require_close("", expected.numpy(), step.expected(SPEC), NMSE_BOUND["float32"])


@pytest.mark.parametrize("num_short", [3, 200])
def test_one_long_context_among_many_short_ones_is_split(num_short: int) -> None:
    """One program would read it alone, long after the others have ended."""
    bucket = Bucket(num_tokens=256, num_requests=256, num_blocks=512, max_query_len=1)
    step = Step([1] * (num_short + 1), [3000] + [10] * num_short, bucket)

    plan = step.plan(SPEC, 264)

    assert plan.splits
    assert plan.narrow is not None and int((plan.narrow.merges[:, 1] > 0).sum()) == 1


def test_few_decodes_have_no_graph_without_splits() -> None:
    bucket = Bucket(num_tokens=2, num_requests=2, num_blocks=128, max_query_len=1)

    assert not Step([1, 1], [9, 30], bucket).plan(SPEC, ALONE).may_be_whole

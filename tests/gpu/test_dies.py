"""Numbers of programs on GPUs of several dies: permutations that keep neighbors on one die."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from portalm.conformance.numerics import NMSE_BOUND, require_close
from portalm_backends.gpu_common import attention
from portalm_backends.gpu_common.archs import CUDA, ROCM
from portalm_backends.gpu_common.kernels import dies
from portalm_backends.gpu_common.kernels.paged_attention import _place
from tests.gpu.test_attention import CROWD, SPEC, Step

NUM_DIES = 8
COUNTS = [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 100, 257]


@triton.jit
def _numbers(out, num_programs, SIZE: tl.constexpr, DIES: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.arange(0, BLOCK)  # all programs of a launch at once
    if SIZE == 0:
        number = dies.in_ranges(program, num_programs, DIES)
    else:
        number = dies.in_groups(program, num_programs, SIZE, DIES)
    tl.store(out + program, number, mask=program < num_programs)


@triton.jit
def _dealt(out, count, PILES: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.arange(0, BLOCK)
    tl.store(out + number, dies.deal(number, count, PILES), mask=number < count)


@triton.jit
def _places(out, NUM_KV_HEADS: tl.constexpr, SHARING: tl.constexpr, IS_WIDE: tl.constexpr,
            DIES: tl.constexpr, PILES: tl.constexpr):  # fmt: skip
    index, kv_head, part = _place(NUM_KV_HEADS, SHARING, IS_WIDE, DIES, PILES)
    row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    place = out + (row * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(place, index)
    tl.store(place + 1, kv_head)
    tl.store(place + 2, part)


def numbers(count: int, *, size: int = 0, num_dies: int = NUM_DIES) -> list[int]:
    out = torch.full((count,), -1, dtype=torch.int32)
    _numbers[(1,)](out, count, size, num_dies, triton.next_power_of_2(count))
    return out.tolist()


@pytest.mark.parametrize("num_dies", [1, 2, 6, 8])
@pytest.mark.parametrize("count", COUNTS)
def test_each_number_is_used_once(count: int, num_dies: int) -> None:
    for size in (0, 1, 2, 8):
        assert sorted(numbers(count, size=size, num_dies=num_dies)) == [*range(count)], size


@pytest.mark.parametrize("count", COUNTS)
def test_a_die_has_one_range(count: int) -> None:
    found = numbers(count)

    for die in range(min(NUM_DIES, count)):
        own = found[die::NUM_DIES]  # programs go to the dies in turn
        assert own == [*range(own[0], own[0] + len(own))]
        assert len(own) in (count // NUM_DIES, math.ceil(count / NUM_DIES))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_groups_are_on_one_die_and_start_in_order(size: int) -> None:
    count = 5 * NUM_DIES * size
    found = numbers(count, size=size)

    die_of = {number: program % NUM_DIES for program, number in enumerate(found)}
    for start in range(0, count, size):
        assert len({die_of[number] for number in range(start, start + size)}) == 1
    for program, number in enumerate(found):  # at most one round of groups away
        assert abs(program - number) < NUM_DIES * size


@pytest.mark.parametrize("num_piles", [1, 2, 4, 8])
@pytest.mark.parametrize("count", COUNTS)
def test_piles_are_dealt_in_turn(count: int, num_piles: int) -> None:
    out = torch.full((count,), -1, dtype=torch.int32)
    _dealt[(1,)](out, count, num_piles, triton.next_power_of_2(count))

    assert out.tolist() == [i for pile in range(num_piles) for i in range(pile, count, num_piles)]


@pytest.mark.parametrize("is_wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("num_heads", [1, 6, 8])
def test_each_part_of_each_item_and_head_is_computed_once(num_heads: int, is_wide: bool) -> None:
    for num_items, num_parts, sharing, num_dies in (
        (1, 1, 1, 8), (5, 2, 1, 8), (7, 3, num_heads, 8), (7, 1, 1, 6), (2, 2, 1, 1)
    ):  # fmt: skip
        out = torch.full((num_items * num_heads * num_parts, 3), -1, dtype=torch.int32)
        axes = (num_items, num_heads) if is_wide else (num_heads, num_items)
        piles = dies.num_piles(num_heads, num_dies)

        _places[(*axes, num_parts)](out, num_heads, sharing, is_wide, num_dies, piles)

        ranges = (range(num_items), range(num_heads), range(num_parts))
        expected = [[i, h, p] for i in ranges[0] for h in ranges[1] for p in ranges[2]]
        assert sorted(out.tolist()) == expected


@pytest.mark.parametrize("num_heads", [2, 8, 16])
def test_a_die_reads_few_heads_of_prompts_and_its_share_of_long_items(num_heads: int) -> None:
    num_items = 24  # item i has 24 - i units of work
    out = torch.full((num_items * num_heads, 3), -1, dtype=torch.int32)
    piles = dies.num_piles(num_heads, NUM_DIES)

    _places[(num_items, num_heads, 1)](out, num_heads, 1, True, NUM_DIES, piles)

    work = []
    for die in range(NUM_DIES):
        own = out[die::NUM_DIES]
        assert len(set(own[:, 1].tolist())) == max(1, num_heads // NUM_DIES)
        work.append(sum(num_items - index for index in own[:, 0].tolist()))
    # as with programs in turn: within a round of items, each is a unit shorter than the one before
    assert max(work) - min(work) <= num_items


@pytest.mark.parametrize(
    ("arch", "num_cores", "expected"),
    [
        ("gfx942", 304, 8),
        ("gfx942", 228, 6),  # MI300A
        ("gfx942", 38, 1),  # a partition of one die
        ("gfx942", 80, 1),  # no whole dies: unknown, so nothing is renumbered
        ("gfx950", 256, 8),
        ("gfx90a", 104, 1),
        ("sm_90", 132, 1),
    ],
)
def test_dies_of_a_device(arch: str, num_cores: int, expected: int) -> None:
    assert (CUDA | ROCM)[arch].num_dies(num_cores) == expected


def test_attention_is_the_same_on_several_dies() -> None:
    """Long and short prompts and decodes; on one die, programs are not renumbered."""
    step = Step([40, 1, 7, 1, 90], [340, 513, 7, 30, 90])
    plan = step.plan(SPEC, CROWD)
    assert plan.narrow is not None and plan.wide is not None and len(plan.wide.items) > 2

    one, eight = (
        attention.attend(
            step.cache, step.query, step.meta, SPEC, plan, family="cdna3", num_dies=num_dies
        )[: sum(step.query_lens)]
        for num_dies in (1, 8)
    )

    assert torch.equal(one, eight)
    require_close("", eight.numpy(), step.expected(SPEC), NMSE_BOUND["float32"])

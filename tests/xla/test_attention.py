"""Attention as XLA operations, compared with loops in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portalm.backend import AttentionSpec
from portalm.conformance import reference
from portalm.conformance.cases import BATCHES, HEADS, Batch, batch_named
from portalm.conformance.numerics import NMSE_BOUND, require_close
from portalm_backends.xla import attention
from tests.xla.steps import Step, make_step

_GQA = HEADS[1]


_attend = jax.jit(attention.paged_attention, static_argnames=("spec", "max_query_len"))


def require_correct(step: Step) -> None:
    require_close("attention", step.attended(_attend), step.expected(), NMSE_BOUND["float32"])


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_every_batch_matches_the_reference(batch):
    require_correct(make_step(batch, _GQA))


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: h.name)
def test_every_head_layout_matches_the_reference(heads):
    require_correct(make_step(batch_named("mixed"), heads))


@pytest.mark.parametrize("name", ["mixed", "long context"])
@pytest.mark.parametrize(
    "features",
    [
        {"sliding_window": 1},
        {"sliding_window": 100},
        {"soft_cap": 2.0},
        {"has_alibi": True},
        {"has_sinks": True},
        {"sliding_window": 7, "has_alibi": True, "has_sinks": True, "soft_cap": 3.0},
    ],
    ids=str,
)
def test_every_feature_matches_the_reference(name, features):
    require_correct(make_step(batch_named(name), _GQA, **features))


@pytest.mark.parametrize(
    ("head_size", "lanes", "block_size"), [(16, 64, 8), (80, 128, 12), (128, 128, 256)]
)
def test_head_and_block_sizes_match_the_reference(head_size, lanes, block_size):
    step = make_step(
        batch_named("mixed"), _GQA, head_size=head_size, lanes=lanes, block_size=block_size
    )
    require_correct(step)


def test_more_decodes_than_a_group_with_queries_longer_than_a_tile():
    lengths = (1,) * (attention.GROUP + 3) + (2 * attention.TILE + 5, 3)
    contexts = (*range(120, 120 + attention.GROUP + 3), 200, 130)

    require_correct(make_step(Batch("crowd", lengths, contexts), _GQA))


def test_slots_before_a_window_may_hold_nan():
    step = make_step(batch_named("long context"), _GQA, sliding_window=100)
    step.after[step.block_table[0, :12]] = np.nan  # 192 tokens; the query attends to 211 to 310

    require_correct(step)


def test_the_comparison_detects_a_missing_token():
    step = make_step(batch_named("decode"), _GQA)
    expected = step.expected()
    step.seq_lens[0] -= 1

    with pytest.raises(AssertionError):
        np.testing.assert_allclose(step.attended(_attend), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_dtypes_match_the_reference(dtype):
    step = make_step(batch_named("mixed"), _GQA)
    step.round_to(dtype)

    require_close("attention", step.attended(_attend, dtype), step.expected(), NMSE_BOUND[dtype])


@pytest.mark.parametrize("lengths", [(17,), (1, 1, 33, 7, 130, 300)], ids=str)
@pytest.mark.parametrize("heads", HEADS[:2], ids=lambda h: h.name)
@pytest.mark.parametrize("window", [None, 1, 65])
def test_encoder_tokens_attend_to_their_own_prompt_only(lengths, heads, window):
    rng = np.random.default_rng(0)
    num_tokens, pad = sum(lengths), 5
    q, k, v = (
        rng.standard_normal((num_tokens, count, 64), np.float32)
        for count in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    )
    spec = AttentionSpec(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_size=64,
        scale=0.125,
        sliding_window=window,
    )
    loc = np.concatenate([[0], np.cumsum(lengths), [num_tokens] * 2]).astype(np.int32)
    padded = [np.pad(x, ((0, pad), (0, 0), (0, 0)), constant_values=np.nan) for x in (q, k, v)]

    out = jax.jit(attention.encoder_attention, static_argnames="spec")(*padded, loc, spec)

    cuts = np.cumsum(lengths)[:-1]
    parts = zip(*(np.split(x.astype(np.float64), cuts) for x in (q, k, v)), strict=True)
    expected = np.concatenate([reference.encoder_attention(*one, spec) for one in parts])
    require_close("encoder", np.asarray(out[:num_tokens]), expected, NMSE_BOUND["float32"])


def test_temporaries_do_not_grow_with_the_longest_context_of_a_bucket():
    def temporaries(num_blocks: int) -> int:
        f32, i32 = jnp.float32, jnp.int32
        shapes = (
            ((8, 9, 64), f32),
            ((num_blocks, 3, 16, 128), f32),
            ((9,), i32),
            ((8,), i32),
            ((8, num_blocks), i32),
        )
        spec = AttentionSpec(num_heads=9, num_kv_heads=3, head_size=64, scale=0.125)
        compiled = _attend.lower(
            *(jax.ShapeDtypeStruct(*s) for s in shapes), spec, max_query_len=8
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    table = 8 * (1024 - 64) * 4
    assert temporaries(1024) <= temporaries(64) + 3 * table

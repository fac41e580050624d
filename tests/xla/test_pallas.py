"""The TPU kernels in Pallas' interpreter, with unwritten memory set to NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from portalm.conformance.base import CheckFailed
from portalm.conformance.cases import BATCHES, HEADS, Batch, Heads, batch_named
from portalm.conformance.numerics import NMSE_BOUND, require_close
from portalm_backends.xla import cache
from portalm_backends.xla.pallas import cache_write, paged_attention
from tests.xla.steps import Step, make_step

_GQA = HEADS[1]
_INTERPRETED = pltpu.InterpretParams(uninitialized_memory="nan")


_attend = functools.partial(paged_attention.paged_attention, interpret=_INTERPRETED)


def tpu_step(batch: Batch, heads: Heads = _GQA, *, head_size: int = 64, **features) -> Step:
    lanes = cache.lanes_per_head(head_size, is_tpu=True)
    return make_step(batch, heads, head_size=head_size, lanes=lanes, **features)


def require_correct(step: Step) -> None:
    require_close("attention", step.attended(_attend), step.expected(), NMSE_BOUND["float32"])


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_every_batch_matches_the_reference(batch):
    require_correct(tpu_step(batch))


@pytest.mark.parametrize(
    ("heads", "head_size", "features"),
    [
        (Heads("gqa of 3", 9, 3), 64, {}),
        (Heads("mqa", 8, 1), 128, {}),
        (HEADS[0], 80, {"sliding_window": 7}),
        (_GQA, 64, {"sliding_window": 100, "soft_cap": 2.0}),
        (_GQA, 128, {"has_alibi": True, "has_sinks": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_head_layouts_and_features_match_the_reference(name, heads, head_size, features):
    require_correct(tpu_step(batch_named(name), heads, head_size=head_size, **features))


def test_queries_longer_than_a_tile_and_contexts_longer_than_a_chunk():
    shape = paged_attention.shape_for(
        (9, 2, 16, 128), tpu_step(BATCHES[0]).spec, itemsize=4, num_blocks=99, max_query_len=70
    )
    batch = Batch("long", (1, 1, shape.tile + 7, 3), (3 * shape.chunk + 1, 2, shape.chunk + 40, 3))

    require_correct(tpu_step(batch))


def test_slots_before_a_window_may_hold_nan():
    step = tpu_step(batch_named("decode"), sliding_window=5)
    step.after[step.block_table[2, :1]] = np.nan  # the third request attends to 28 to 32

    require_correct(step)


@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_bfloat16_matches_the_reference(name):
    step = tpu_step(batch_named(name))
    step.round_to("bfloat16")

    actual = step.attended(_attend, "bfloat16")

    require_close("attention", actual, step.expected(), NMSE_BOUND["bfloat16"])


def test_the_comparison_detects_a_missing_token():
    step = tpu_step(batch_named("decode"))
    expected = step.expected()
    step.seq_lens[0] -= 1

    with pytest.raises(CheckFailed):
        require_close("attention", step.attended(_attend), expected, NMSE_BOUND["bfloat16"])


def write(step: Step) -> jax.Array:
    touched = cache_write.touched_blocks(
        *map(jnp.asarray, (step.query_start_loc, step.seq_lens, step.block_table)),
        num_tokens=len(step.query),
        block_size=step.before.shape[2],
    )
    rows = map(jnp.asarray, (step.before, step.key, step.value))
    return cache_write.write(*rows, touched, interpret=_INTERPRETED)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_a_step_is_written_to_its_slots_only(batch):
    step = tpu_step(batch)

    np.testing.assert_array_equal(write(step), step.after)

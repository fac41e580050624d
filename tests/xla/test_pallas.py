"""The kernels for TPUs, interpreted: memory that was not written is NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from portalm.conformance.cases import BATCHES, HEADS, Batch, Heads, batch_named
from portalm.conformance.numerics import NMSE_BOUND, require_close
from portalm_backends.xla import cache
from portalm_backends.xla.pallas import cache_write, paged_attention
from tests.xla.steps import Step, make_step

_GQA = HEADS[1]
_INTERPRETED = pltpu.InterpretParams(uninitialized_memory="nan")


def attend(step: Step, dtype: str = "float32") -> np.ndarray:
    """The step's own rows, [sum of query_lens, H, D]."""
    out = paged_attention.paged_attention(
        jnp.asarray(step.query, dtype),
        jnp.asarray(step.after, dtype),
        step.query_start_loc,
        step.seq_lens,
        step.block_table,
        step.spec,
        max_query_len=max(step.batch.query_lens),
        sinks=step.sinks,
        interpret=_INTERPRETED,
    )
    assert out.shape == step.query.shape
    assert out.dtype == dtype
    return np.asarray(out[: step.num_tokens], np.float32)


def tpu_step(batch: Batch, heads: Heads = _GQA, *, head_size: int = 64, **features) -> Step:
    lanes = cache.lanes_per_head(head_size, is_tpu=True)
    return make_step(batch, heads, head_size=head_size, lanes=lanes, **features)


def require_right(step: Step) -> None:
    require_close("attention", attend(step), step.expected(), NMSE_BOUND["float32"])


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_every_batch_is_what_plain_loops_give(batch):
    require_right(tpu_step(batch))


def write(step: Step) -> jax.Array:
    touched = cache_write.touched_blocks(
        *map(jnp.asarray, (step.query_start_loc, step.seq_lens, step.block_table)),
        num_tokens=len(step.query),
        block_size=step.before.shape[2],
    )
    rows = map(jnp.asarray, (step.before, step.key, step.value))
    return cache_write.write(*rows, touched, interpret=_INTERPRETED)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_a_step_is_written_to_its_slots_and_nowhere_else(batch):
    step = tpu_step(batch)

    np.testing.assert_array_equal(write(step), step.after)

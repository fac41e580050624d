"""Sampling inside a program: what the conformance kit does not cover."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portalm_backends.xla import sampling
from portalm_backends.xla.sampling import SamplingArrays


def test_rows_sampled_in_parts_match_rows_sampled_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_rows, vocab_size = 11, 97
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((num_rows, vocab_size), np.float32) * 4
    scores[7] = np.nan
    words = rng.integers(0, 2**32, (2, num_rows, 2), np.uint32)
    arrays = SamplingArrays(
        temperature=jnp.asarray(rng.choice([0.0, 0.7, 1.5], num_rows), jnp.float32),
        top_k=jnp.asarray(rng.choice([0, 5], num_rows), jnp.int32),
        top_p=jnp.asarray(rng.choice([1.0, 0.6], num_rows), jnp.float32),
        min_p=jnp.zeros(num_rows),
        seed=jnp.asarray(words[0]),
        position=jnp.asarray(words[1]),
        is_greedy=jnp.asarray(False),
        has_filters=jnp.asarray(True),
    )
    together = jax.jit(lambda s: sampling.sample(s, arrays))(scores)

    monkeypatch.setattr(sampling, "_ROWS", 4)
    in_parts = jax.jit(lambda s: sampling.sample(s, arrays))(scores)

    np.testing.assert_array_equal(in_parts, together)
    assert together[7] == sampling.BROKEN
    assert len(set(np.asarray(together).tolist())) > 5

"""The KV cache of the XLA backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portalm.backend import KVSpec
from portalm.conformance.cases import HEADS, batch_named
from portalm.errors import Unsupported
from portalm_backends.xla import cache
from tests.xla.steps import make_step

_SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_size=16, block_size=4, dtype="float32")


def _filled(spec: KVSpec, num_blocks: int, *, is_tpu: bool = False):
    """A cache filled with distinct numbers, and its contents in the wire layout."""
    shape = (num_blocks, spec.num_layers, 2, spec.block_size, spec.num_kv_heads, spec.head_size)
    wire = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    layers = cache.allocate(spec, num_blocks, is_tpu=is_tpu)
    return cache.import_blocks(layers, jnp.arange(num_blocks), wire), wire


def test_a_step_is_written_to_its_slots_only():
    step = make_step(batch_named("ragged"), HEADS[1], lanes=128)

    layer = cache.write(*map(jnp.asarray, (step.before, step.key, step.value, step.slots)))

    np.testing.assert_array_equal(layer[1:], step.after[1:])  # padding is written to the null block


def test_a_write_to_a_donated_cache_is_in_place():
    step = make_step(batch_named("decode"), HEADS[1])
    layer = jax.device_put(step.before)
    address = layer.unsafe_buffer_pointer()

    written = jax.jit(cache.write, donate_argnums=0)(layer, step.key, step.value, step.slots)

    assert written.unsafe_buffer_pointer() == address


@pytest.mark.parametrize("is_tpu", [False, True], ids=["plain", "tpu"])
def test_imported_blocks_are_exported_unchanged(is_tpu):
    layers, wire = _filled(_SPEC, 6, is_tpu=is_tpu)

    exported = cache.export_blocks(layers, jnp.array([4, 1]), _SPEC.head_size)

    np.testing.assert_array_equal(exported, wire[[4, 1]])


def test_a_block_copy_includes_every_layer():
    layers, wire = _filled(_SPEC, 6)

    layers = cache.copy(layers, jnp.array([1, 4]), jnp.array([5, 2]))

    wire[5], wire[2] = wire[1], wire[4]
    np.testing.assert_array_equal(cache.export_blocks(layers, jnp.arange(6), 16), wire)


@pytest.mark.parametrize("is_tpu", [False, True], ids=["plain", "tpu"])
def test_bytes_per_block_match_the_allocation(is_tpu):
    layers = cache.allocate(_SPEC, 5, is_tpu=is_tpu)

    assert 5 * cache.bytes_per_block(_SPEC, is_tpu=is_tpu) == sum(x.nbytes for x in layers)


@pytest.mark.parametrize(
    ("head_size", "lanes"), [(16, 64), (64, 64), (80, 128), (128, 128), (192, 256)]
)
def test_on_a_tpu_a_key_and_its_value_fill_whole_registers(head_size, lanes):
    assert cache.lanes_per_head(head_size, is_tpu=True) == lanes
    assert 2 * lanes % cache.LANES == 0


def test_an_unsupported_dtype_is_refused(backend):
    spec = KVSpec(num_layers=1, num_kv_heads=1, head_size=8, block_size=4, dtype="float64")

    with pytest.raises(Unsupported, match="float64 is not supported"):
        backend.kv_alloc(spec, 2)

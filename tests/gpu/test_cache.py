"""The cache's kernels, interpreted: writes, rotations, copies and the wire."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from portalm.backend import KVSpec
from portalm.conformance import reference
from portalm.conformance.numerics import NMSE_BOUND, require_close
from portalm.errors import Unsupported
from portalm_backends.gpu_common import cache

SPEC = KVSpec(num_layers=2, num_kv_heads=3, head_size=40, block_size=8, dtype="float32")


def nan_cache(spec: KVSpec = SPEC, num_blocks: int = 5) -> torch.Tensor:
    return cache.allocate(spec, num_blocks, torch.device("cpu")).fill_(float("nan"))


def meta(slots: list[int], positions: list[int] | None = None) -> Any:
    return SimpleNamespace(
        slot_mapping=torch.tensor(slots, dtype=torch.int32),
        positions=torch.tensor(positions or [], dtype=torch.int32),
    )


def views(num_tokens: int, *heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value as a merged product leaves them: rows lie apart, the rest is NaN."""
    generator = torch.Generator().manual_seed(0)
    size = SPEC.head_size
    rows = torch.full((num_tokens, sum(heads) + 1, size), float("nan"))
    rows[:, :-1] = torch.randn((num_tokens, sum(heads), size), generator=generator)
    return list(rows.to(dtype).split((*heads, 1), dim=1))[:-1]


def token(kv: torch.Tensor, layer: int, slot: int) -> torch.Tensor:
    """[2, H_kv, D]: what one slot of a layer holds."""
    return kv[layer, slot // SPEC.block_size, :, :, slot % SPEC.block_size].transpose(0, 1)


def test_a_block_takes_the_bytes_that_are_counted() -> None:
    kv = nan_cache(num_blocks=5)

    assert kv.numel() * kv.element_size() == 5 * cache.bytes_per_block(SPEC)


@pytest.mark.parametrize("field, value", [("head_size", 60), ("block_size", 12)])
def test_a_shape_that_kernels_do_not_take_is_refused(field: str, value: int) -> None:
    spec = KVSpec(**{**{f: getattr(SPEC, f) for f in SPEC.__slots__}, field: value})

    with pytest.raises(Unsupported, match=f"not {value}"):
        nan_cache(spec)


def test_a_dtype_that_the_gpu_has_not_is_refused() -> None:
    spec = KVSpec(num_layers=1, num_kv_heads=1, head_size=16, block_size=8, dtype="float8_e4m3fn")

    with pytest.raises(Unsupported, match="float8_e4m3fn"):
        nan_cache(spec)


def test_a_token_goes_to_its_slot_and_nowhere_else() -> None:
    key, value = views(3, 3, 3)
    slots = [17, 39, 8]

    kv = cache.write(nan_cache(), 1, key, value, meta(slots))

    for i, slot in enumerate(slots):
        assert torch.equal(token(kv, 1, slot), torch.stack((key[i], value[i])))
    assert int(torch.isfinite(kv).sum()) == 3 * 2 * key[0].numel()


@pytest.mark.parametrize("is_interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("rotary_dim", [40, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rotation_and_write_in_one_are_both(
    is_interleaved: bool, rotary_dim: int, dtype: torch.dtype
) -> None:
    query, key, value = views(3, 6, 3, 3, dtype=dtype)
    slots, positions = [17, 39, 8], [5, 0, 63]
    table = reference.rope_table(64, rotary_dim, 100.0)
    kv = nan_cache().to(dtype)

    out = cache.rotate_and_write(
        kv,
        1,
        query,
        key,
        value,
        meta(slots, positions),
        torch.tensor(table, dtype=torch.float32),
        is_interleaved=is_interleaved,
    )

    at = np.array(positions, np.int32)
    name = str(dtype).removeprefix("torch.")
    for actual, source in ((out, query), (torch.stack([token(kv, 1, s)[0] for s in slots]), key)):
        expected = reference.rope(source.double().numpy(), at, table, is_interleaved)
        require_close("rotated", actual.float().numpy(), expected, NMSE_BOUND[name])
        assert torch.equal(actual[..., rotary_dim:], source[..., rotary_dim:])
    for i, slot in enumerate(slots):
        assert torch.equal(token(kv, 1, slot)[1], value[i])
    assert int(torch.isfinite(kv).sum()) == 3 * 2 * key[0].numel()


def test_a_copy_moves_whole_blocks_of_all_layers() -> None:
    kv = torch.arange(nan_cache().numel(), dtype=torch.float32).view(nan_cache().shape).clone()
    before = kv.clone()

    cache.copy(kv, torch.tensor([1, 4], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32))

    assert torch.equal(kv[:, [3, 2]], before[:, [1, 4]])
    assert torch.equal(kv[:, [0, 1, 4]], before[:, [0, 1, 4]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_the_wire_is_tokens_then_heads_and_comes_back(dtype: str) -> None:
    spec = KVSpec(num_layers=2, num_kv_heads=3, head_size=40, block_size=8, dtype=dtype)
    wire = torch.randn((2, 2, 2, 8, 3, 40)).to(getattr(torch, dtype))
    kv = cache.allocate(spec, 5, torch.device("cpu"), dtypes=cache.DTYPES | cache.FP8_DTYPES)
    blocks = torch.tensor([4, 1], dtype=torch.int32)

    cache.import_blocks(kv, blocks, wire)

    assert torch.equal(kv[1, 4, 2, 0].float(), wire[0, 1, 0, :, 2].float())
    assert torch.equal(kv[0, 1, 1, 1].float(), wire[1, 0, 1, :, 1].float())
    back = cache.export_blocks(kv, blocks)
    assert back.dtype == wire.dtype
    assert torch.equal(back.float(), wire.float())


def test_what_an_8_bit_float_cannot_hold_becomes_its_largest() -> None:
    spec = KVSpec(num_layers=1, num_kv_heads=1, head_size=16, block_size=8, dtype="float8_e4m3fn")
    kv = cache.allocate(spec, 2, torch.device("cpu"), dtypes=cache.FP8_DTYPES)
    key = torch.tensor([1.5, -2.0, 1e4, -1e4] * 4).view(1, 1, 16)

    cache.write(kv, 0, key, key, meta([9]))

    assert kv[0, 1, 0, 0, 1].float().tolist() == [1.5, -2.0, 448.0, -448.0] * 4

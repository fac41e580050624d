"""The cache kernels, interpreted: writes, rotation, copies, export and import."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from portalm.backend import SCALED_KV_DTYPES, KVSpec
from portalm.conformance import reference
from portalm.conformance.numerics import NMSE_BOUND, require_close
from portalm_backends.gpu_common import cache
from portalm_backends.portable import kv_codes

SPEC = KVSpec(num_layers=2, num_kv_heads=3, head_size=40, block_size=8, dtype="float32")


def nan_cache(spec: KVSpec = SPEC, num_blocks: int = 5) -> torch.Tensor:
    return cache.allocate(spec, num_blocks, torch.device("cpu")).fill_(float("nan"))


def meta(slots: list[int], positions: list[int] | None = None) -> Any:
    return SimpleNamespace(
        slot_mapping=torch.tensor(slots, dtype=torch.int32),
        positions=torch.tensor(positions or [], dtype=torch.int32),
    )


def views(num_tokens: int, *heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value as views of a merged projection, with NaN between the rows."""
    generator = torch.Generator().manual_seed(0)
    size = SPEC.head_size
    rows = torch.full((num_tokens, sum(heads) + 1, size), float("nan"))
    rows[:, :-1] = torch.randn((num_tokens, sum(heads), size), generator=generator)
    return list(rows.to(dtype).split((*heads, 1), dim=1))[:-1]


def token(kv: torch.Tensor, layer: int, slot: int) -> torch.Tensor:
    """Key and value of one slot of a layer, [2, H_kv, D]."""
    return kv[layer, slot // SPEC.block_size, :, :, slot % SPEC.block_size].transpose(0, 1)


def test_bytes_per_block_match_the_allocation() -> None:
    kv = nan_cache(num_blocks=5)

    assert kv.numel() * kv.element_size() == 5 * kv_codes.bytes_per_block(SPEC)


def test_a_token_is_written_to_its_slot_only() -> None:
    key, value = views(3, 3, 3)
    slots = [17, 39, 8]

    kv = cache.write(nan_cache(), 1, key, value, meta(slots))

    for i, slot in enumerate(slots):
        assert torch.equal(token(kv, 1, slot), torch.stack((key[i], value[i])))
    assert int(torch.isfinite(kv).sum()) == 3 * 2 * key[0].numel()


@pytest.mark.parametrize("is_interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("rotary_dim", [40, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rotate_and_write_equals_rope_followed_by_write(
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


def test_a_copy_includes_whole_blocks_of_all_layers() -> None:
    kv = torch.arange(nan_cache().numel(), dtype=torch.float32).view(nan_cache().shape).clone()
    before = kv.clone()

    cache.copy(kv, torch.tensor([1, 4], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32))

    assert torch.equal(kv[:, [3, 2]], before[:, [1, 4]])
    assert torch.equal(kv[:, [0, 1, 4]], before[:, [0, 1, 4]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_imported_blocks_are_exported_unchanged(dtype: str) -> None:
    spec = KVSpec(num_layers=2, num_kv_heads=3, head_size=40, block_size=8, dtype=dtype)
    wire = torch.randn((2, 2, 2, 8, 3, 40)).to(getattr(torch, dtype))
    kv = cache.allocate(spec, 5, torch.device("cpu"))
    blocks = torch.tensor([4, 1], dtype=torch.int32)

    cache.import_blocks(kv, blocks, wire)

    assert torch.equal(kv[1, 4, 2, 0].float(), wire[0, 1, 0, :, 2].float())
    assert torch.equal(kv[0, 1, 1, 1].float(), wire[1, 0, 1, :, 1].float())
    back = cache.export_blocks(kv, blocks)
    assert back.dtype == wire.dtype
    assert torch.equal(back.float(), wire.float())


@pytest.mark.parametrize("dtype", SCALED_KV_DTYPES)
def test_codes_and_scales_match_the_portable_ones(dtype: str) -> None:
    """For values of all magnitudes, zeros, infinities and NaN, in rows that are not contiguous."""
    spec = KVSpec(num_layers=2, num_kv_heads=3, head_size=40, block_size=8, dtype=dtype)
    kv = cache.allocate(spec, 10, torch.device("cpu"))
    assert isinstance(kv, cache.ScaledKV)
    key, value = views(60, 3, 3)
    for x in (key, value):
        x *= 10.0 ** torch.arange(-29, 31)[:, None, None]
        x[3], x[5, 1], x[7, 2, 9], x[8, 0, 1], x[9, 1, 39] = 0, 1e-40, math.nan, math.inf, -math.inf
    slots = (8 + torch.randperm(72, generator=torch.Generator().manual_seed(0)))[:60]

    cache.write(kv, 1, key, value, meta(slots.tolist()))

    for side, x in enumerate((key, value)):
        codes, scales = kv_codes.quantize(x, dtype)
        block, offset = slots // 8, slots % 8
        written = kv.scales[1, block, :, side, offset]
        assert torch.equal(written.isnan(), scales.isnan())
        assert torch.equal(written.nan_to_num(), scales.nan_to_num())
        bits = kv.codes[1, block, :, side, offset]
        assert torch.equal(bits, codes.view(torch.int8))

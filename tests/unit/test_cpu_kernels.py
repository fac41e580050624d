"""Every CPU kernel against plain float64 loops, on every instruction set that this machine runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from portalm.backend import SCALED_KV_DTYPES, AttentionSpec, Experts, KVSpec, StepMeta
from portalm.errors import BackendError
from portalm_backends.cpu.backend import CpuBackend
from portalm_backends.portable import kv_codes
from tests.unit import cpu_isas

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NMSE = {"float32": 1e-11, "float16": 1e-6, "bfloat16": 1e-4}


@pytest.fixture(params=cpu_isas.isas())
def backend(request) -> Iterator[CpuBackend]:
    with cpu_isas.backend_on(request.param) as backend:
        yield backend


def rounded(shape, dtype, seed=0, scale=1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DTYPES[dtype])


def f64(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.float64).numpy()


def assert_near(actual: torch.Tensor, expected: np.ndarray, dtype: str) -> None:
    difference = f64(actual) - expected
    assert np.isfinite(difference).all()
    error = float((difference**2).sum() / max(float((expected**2).sum()), 1e-30))
    assert error < NMSE[dtype], f"NMSE {error:.2e}, allowed {NMSE[dtype]:.0e}"


# -- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (3, 64), (5, 41), (64, 2048), (2, 7)], ids=str)
def test_rms_norm_scales_rows_to_unit_mean_square(backend, shape, dtype):
    x, weight = rounded(shape, dtype, 1, 3.0), rounded(shape[1:], dtype, 2)

    actual = backend.rms_norm(x, weight, 1e-5)

    rows = f64(x)
    scale = 1 / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    assert_near(actual, rows * scale * f64(weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_takes_the_last_dimension_of_heads_inside_wider_rows(backend, dtype):
    qkv, weight = rounded((5, 8 * 24), dtype, 1), rounded((24,), dtype, 2)
    heads = qkv.view(5, 8, 24)[:, 2:5]

    actual = backend.rms_norm(heads, weight, 1e-6)

    x = f64(heads)
    expected = x / np.sqrt((x**2).mean(axis=2, keepdims=True) + 1e-6) * f64(weight)
    assert actual.shape == heads.shape
    assert_near(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (5, 41), (64, 256)], ids=str)
def test_add_rms_norm_returns_the_sum_rounded_once(backend, shape, dtype):
    x, residual = rounded(shape, dtype, 1, 3.0), rounded(shape, dtype, 2, 3.0)
    weight = rounded(shape[1:], dtype, 3)
    before = x.clone(), residual.clone()

    actual, total = backend.add_rms_norm(x, residual, weight, 1e-5)

    assert torch.equal(total, (x.float() + residual.float()).to(x.dtype))
    rows = f64(total)
    scale = 1 / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    assert_near(actual, rows * scale * f64(weight), dtype)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 41, 1536])
def test_silu_mul_gates_the_second_half_with_the_first(backend, size, dtype):
    gate_up = rounded((3, 2 * size), dtype, 1, 4.0)
    gate_up[0, 0] = -90.0  # silu underflows to 0 here, exp(90) overflows nothing
    gate_up[1, 0] = 90.0

    actual = backend.silu_mul(gate_up)

    x = f64(gate_up)
    gate, up = x[:, :size], x[:, size:]
    assert_near(actual, gate / (1 + np.exp(-gate)) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (80, 80), (64, 20), (40, 2)])
def test_rope_rotates_leading_dimensions_and_keeps_the_rest(
    backend, head_size, rotary_dim, is_interleaved, dtype
):
    num_heads, num_kv_heads = 3, 2
    row = rounded((7, (num_heads + 2 * num_kv_heads) * head_size), dtype, 1)
    query = row[:, : num_heads * head_size].view(7, num_heads, head_size)
    key = row[:, num_heads * head_size : (num_heads + num_kv_heads) * head_size]
    key = key.view(7, num_kv_heads, head_size)
    positions = torch.tensor([0, 1, 5, 63, 2, 2, 40], dtype=torch.int32)
    angle = np.outer(np.arange(64), 1e4 ** -(np.arange(rotary_dim // 2) / (rotary_dim / 2)))
    cos_sin = torch.tensor(np.hstack([np.cos(angle), np.sin(angle)]), dtype=torch.float32)
    before = row.clone()

    q, k = backend.rope(query, key, positions, cos_sin, is_interleaved=is_interleaved)

    table = f64(cos_sin)[positions.numpy()]
    for x, actual in ((query, q), (key, k)):
        expected = rotated(f64(x), table, rotary_dim, is_interleaved)
        assert_near(actual, expected, dtype)
    assert torch.equal(row, before)


def rotated(x, table, rotary_dim, is_interleaved) -> np.ndarray:
    half = rotary_dim // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    first = slice(0, rotary_dim, 2) if is_interleaved else slice(0, half)
    second = slice(1, rotary_dim, 2) if is_interleaved else slice(half, rotary_dim)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_and_take_rows_copy_rows(backend, dtype):
    table = rounded((50, 41), dtype)
    ids = torch.tensor([0, 49, 7, 7], dtype=torch.int32)

    assert torch.equal(backend.embed(ids, table), table[ids.long()])
    assert torch.equal(backend.take_rows(table[:, 3:30], ids), table[:, 3:30][ids.long()])


# -- experts ----------------------------------------------------------------------------------


def make_experts(backend, dtype, num_experts, hidden, inner, **more) -> tuple[Experts, list, list]:
    """Packed experts, and their weights [2 I, C] and [C, I] as tensors."""
    wide = [rounded((2 * inner, hidden), dtype, e, hidden**-0.5) for e in range(num_experts)]
    narrow = [rounded((hidden, inner), dtype, 50 + e, inner**-0.5) for e in range(num_experts)]
    packed = (tuple(backend.pack(w) for w in weights) for weights in (wide, narrow))
    return Experts(**dict(zip(("gate_up", "down"), packed, strict=True)), **more), wide, narrow


def choose(num_tokens, num_experts, top_k) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids [T, k] and routing weights [T, k]; no token uses the last expert."""
    rng = np.random.default_rng(num_tokens)
    ids = np.stack([rng.permutation(num_experts - 1)[:top_k] for _ in range(num_tokens)])
    shares = rng.uniform(0.1, 0.9, ids.shape).astype(np.float32)
    return torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(shares)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "is_clamped"), [(1, False), (23, False), (23, True)])
def test_experts_equal_plain_loops(backend, num_tokens, is_clamped, dtype):
    num_experts, hidden, inner = 5, 72, 41
    biases = (rounded((num_experts, n), dtype, n) for n in (2 * inner, hidden))
    more = dict(zip(("gate_up_bias", "down_bias"), biases, strict=True)) if is_clamped else {}
    clamp = {"swiglu_limit": 1.5, "swiglu_alpha": 1.7} if is_clamped else {}
    experts, wide, narrow = make_experts(
        backend, dtype, num_experts, hidden, inner, **more, **clamp
    )
    x = rounded((num_tokens, 3 * hidden), dtype, 7)[:, hidden : 2 * hidden]
    ids, shares = choose(num_tokens, num_experts, 2)

    actual = backend.moe(x, ids, shares, experts)

    expected = np.zeros((num_tokens, hidden))
    for token, row in enumerate(f64(x)):
        for expert, share in zip(ids[token], f64(shares[token]), strict=True):
            gate, up = np.split(f64(wide[expert]) @ row, 2)
            inside = gate / (1 + np.exp(-gate)) * up
            if is_clamped:
                bias = f64(more["gate_up_bias"][expert])
                gate = np.minimum(gate + bias[:inner], 1.5)
                up = np.clip(up + bias[inner:], -1.5, 1.5)
                inside = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
            out = f64(narrow[expert]) @ inside
            out += f64(more["down_bias"][expert]) if is_clamped else 0
            expected[token] += share * out
    assert_near(actual, expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expert_output_of_a_token_does_not_depend_on_the_batch(backend, dtype):
    experts, _, _ = make_experts(backend, dtype, 4, 64, 48)
    x = rounded((700, 64), dtype, 7)  # an expert gets more rows than it processes at a time
    ids, shares = choose(700, 4, 2)

    together = backend.moe(x, ids, shares, experts)

    for row in (0, 350, 699):
        one = slice(row, row + 1)
        assert torch.equal(backend.moe(x[one], ids[one], shares[one], experts), together[one])


def test_nan_in_one_token_does_not_affect_other_tokens_of_its_experts(backend):
    experts, _, _ = make_experts(backend, "bfloat16", 4, 64, 48)
    x = rounded((9, 64), "bfloat16", 7)
    ids, shares = choose(9, 4, 2)
    clean = backend.moe(x, ids, shares, experts)
    x[4, 3] = float("nan")

    actual = backend.moe(x, ids, shares, experts)

    assert actual[4].isnan().all()
    assert torch.equal(actual[:4], clean[:4])
    assert torch.equal(actual[5:], clean[5:])


# -- attention --------------------------------------------------------------------------------


@dataclass
class Case:
    """A batch: each request's context [seq_len, H_kv, D] and the queries of its last tokens."""

    spec: AttentionSpec
    block_size: int
    query_lens: list[int]
    seq_lens: list[int]
    query: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def make_case(
    query_lens, seq_lens, *, heads=(4, 2), head_size=64, block_size=16, dtype="float32",
    window=None, soft_cap=None, seed=0, value_size=None,
) -> Case:  # fmt: skip
    num_heads, num_kv_heads = heads
    spec = AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        scale=head_size**-0.5, sliding_window=window, soft_cap=soft_cap, value_size=value_size,
    )  # fmt: skip
    total = sum(query_lens)
    case = Case(
        spec=spec,
        block_size=block_size,
        query_lens=query_lens,
        seq_lens=seq_lens,
        query=rounded((total, num_heads, head_size), dtype, seed, 2.0),
        keys=[
            rounded((n, num_kv_heads, head_size), dtype, seed + 100 + i)
            for i, n in enumerate(seq_lens)
        ],
        values=[
            rounded((n, num_kv_heads, head_size), dtype, seed + 200 + i)
            for i, n in enumerate(seq_lens)
        ],
    )
    if value_size is not None:
        case.values = case.keys
    return case


def make_meta(query_lens, seq_lens, tables, slots) -> StepMeta:
    width = max(len(table) for table in tables)
    block_table = np.zeros((len(tables), width), np.int32)
    for i, table in enumerate(tables):
        block_table[i, : len(table)] = table
    loc = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    lens = np.array(seq_lens, np.int32)
    starts = [s - q for s, q in zip(seq_lens, query_lens, strict=True)]
    positions = [np.arange(a, s) for a, s in zip(starts, seq_lens, strict=True)]
    return StepMeta(
        positions=torch.tensor(np.concatenate(positions).astype(np.int32)),
        slot_mapping=torch.tensor(np.array(slots, np.int32)),
        query_start_loc=torch.tensor(loc),
        seq_lens=torch.tensor(lens),
        block_table=torch.tensor(block_table),
        logits_rows=torch.tensor(loc[1:] - 1),
        host_query_start_loc=loc,
        host_seq_lens=lens,
        num_decodes=sum(q == 1 for q in query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


def tables_of(seq_lens, block_size, seed=0) -> list[list[int]]:
    """Block tables in random order; block 0 and a third of the blocks stay unused."""
    needed = [-(-n // block_size) for n in seq_lens]
    pool = np.random.default_rng(seed).permutation(np.arange(1, 1 + sum(needed) * 3 // 2 + 1))
    ends = np.cumsum(needed)
    return [pool[e - n : e].tolist() for e, n in zip(ends, needed, strict=True)]


def run(backend, case: Case, kv_dtype: str, *, num_layers=2, layer=1) -> torch.Tensor:
    """Write all contexts to a cache full of NaN, then attend."""
    spec = KVSpec(
        num_layers=num_layers, num_kv_heads=case.spec.num_kv_heads, dtype=kv_dtype,
        head_size=case.spec.head_size, block_size=case.block_size,
        shares_values=case.spec.value_size is not None,
    )  # fmt: skip
    tables = tables_of(case.seq_lens, case.block_size)
    num_blocks = max(max(table, default=0) for table in tables) + 2
    kv = backend.kv_alloc(spec, num_blocks)
    # 0xFF: NaN as a scale
    kv.data.fill_(0xFF if kv_dtype in SCALED_KV_DTYPES else float("nan"))
    for table, key, value in zip(tables, case.keys, case.values, strict=True):
        token = np.arange(len(key))
        slots = np.array(table)[token // case.block_size] * case.block_size
        meta = make_meta([len(key)], [len(key)], [table], slots + token % case.block_size)
        kv = backend.kv_write(kv, layer, key, value, meta)
    meta = make_meta(case.query_lens, case.seq_lens, tables, [0] * sum(case.query_lens))
    meta = backend.prepare(meta, [case.spec] * num_layers)
    return backend.attend(kv, layer, case.query, meta, case.spec)


def stored(x: torch.Tensor, kv_dtype: str) -> np.ndarray:
    """Keys or values as a cache of `kv_dtype` represents them."""
    if kv_dtype in SCALED_KV_DTYPES:
        return f64(kv_codes.dequantize(*kv_codes.quantize(x, kv_dtype)))
    return f64(x.to(DTYPES[kv_dtype]))


def expected_of(case: Case, kv_dtype: str) -> np.ndarray:
    group = case.spec.num_heads // case.spec.num_kv_heads
    out = np.zeros((*case.query.shape[:2], case.spec.out_size))
    row = 0
    for i, (query_len, seq_len) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        key, value = stored(case.keys[i], kv_dtype), stored(case.values[i], kv_dtype)
        for position in range(seq_len - query_len, seq_len):
            first = max(0, position + 1 - (case.spec.sliding_window or seq_len))
            for head in range(case.spec.num_heads):
                k = key[first : position + 1, head // group]
                scores = k @ f64(case.query)[row, head] * case.spec.scale
                if case.spec.soft_cap:
                    scores = case.spec.soft_cap * np.tanh(scores / case.spec.soft_cap)
                weights = np.exp(scores - scores.max())
                v = value[first : position + 1, head // group, : case.spec.out_size]
                out[row, head] = weights @ v / weights.sum()
            row += 1
    return out


BATCHES = {
    "prefill": ([17], [17]),
    "long prefill": ([70], [70]),
    "decode": ([1, 1, 1, 1], [5, 16, 33, 1]),
    "long decode": ([1], [700]),
    "chunked prefill": ([8], [300]),
    "mixed": ([1, 1, 24, 9], [129, 520, 24, 280]),
    "exactly one block": ([16], [16]),
    "with pad requests": ([1, 7, 0, 0], [20, 7, 0, 0]),
}


def check(backend, case: Case, dtype: str, kv_dtype: str | None = None) -> None:
    kv_dtype = kv_dtype or dtype
    actual = run(backend, case, kv_dtype)
    assert_near(actual, expected_of(case, kv_dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_equals_plain_loops(backend, batch, dtype):
    check(backend, make_case(*BATCHES[batch], dtype=dtype), dtype)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (9, 3), (10, 2), (7, 1), (64, 2)], ids=str)
def test_attention_groups_query_heads_over_their_kv_head(backend, heads, kv_dtype):
    check(backend, make_case(*BATCHES["mixed"], heads=heads, head_size=32), "float32", kv_dtype)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("head_size", [8, 24, 64, 80, 96, 120, 128, 256])
def test_attention_supports_head_sizes_that_are_multiples_of_8(backend, head_size, kv_dtype):
    check(backend, make_case(*BATCHES["mixed"], head_size=head_size), "float32", kv_dtype)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
def test_attention_supports_block_sizes_that_are_powers_of_2(backend, block_size, kv_dtype):
    check(backend, make_case(*BATCHES["mixed"], block_size=block_size), "float32", kv_dtype)


@pytest.mark.parametrize("kv_dtype", SCALED_KV_DTYPES)
@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ("mixed", {"heads": (9, 3)}),
        ("long decode", {"head_size": 24, "block_size": 8}),
        ("long prefill", {"head_size": 80, "block_size": 64, "heads": (8, 1)}),
        ("chunked prefill", {"head_size": 256, "block_size": 128}),
        ("with pad requests", {"window": 7, "block_size": 8}),
        ("long decode", {"window": 300, "heads": (4, 4), "dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_attention_over_8_bit_codes_equals_attention_over_dequantized_values(
    backend, batch, shape, kv_dtype
):
    case = make_case(*BATCHES[batch], **shape)
    for x in (*case.keys, *case.values):  # another scale for each token and head
        x *= torch.exp2(torch.arange(x[..., 0].numel()) % 5 - 2).view(x.shape[:2])[..., None]

    check(backend, case, shape.get("dtype", "float32"), kv_dtype)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 7, 16, 63, 64, 300])
@pytest.mark.parametrize("batch", ["mixed", "long prefill", "long decode"])
def test_sliding_window_includes_the_token_itself_and_the_ones_before_it(
    backend, batch, window, kv_dtype
):
    check(backend, make_case(*BATCHES[batch], window=window, dtype=kv_dtype), kv_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(80, 64, 8, 8), (48, 40, 7, 32), (576, 512, 16, 16)], ids=str)
def test_values_can_be_the_first_dimensions_of_their_keys(backend, sizes, dtype):
    head_size, value_size, num_heads, block_size = sizes
    layout = {"heads": (num_heads, 1), "head_size": head_size, "value_size": value_size}

    for batch in ("mixed", "prefill", "decode"):
        case = make_case(*BATCHES[batch], **layout, block_size=block_size, dtype=dtype)
        check(backend, case, dtype)


@pytest.mark.parametrize("batch", ["mixed", "long prefill"])
def test_soft_cap_bounds_the_scores(backend, batch):
    case = make_case(*BATCHES[batch], soft_cap=2.0)
    case.query *= 20

    check(backend, case, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_huge_scores_stays_finite(backend, dtype):
    case = make_case([3, 1], [40, 300], dtype=dtype)
    case.query *= 100

    check(backend, case, dtype)


def test_future_tokens_do_not_affect_a_row_even_if_they_are_nan(backend):
    case = make_case([40], [40], dtype="float32")
    clean = expected_of(case, "float32")
    case.keys[0][30:], case.values[0][30:] = math.nan, math.inf

    actual = run(backend, case, "float32")

    assert_near(actual[:30], clean[:30], "float32")
    assert actual[30:].isnan().all()


def test_attention_reads_a_query_inside_wider_rows(backend):
    case = make_case(*BATCHES["mixed"])
    plain = run(backend, case, "float32")
    wide = torch.full((len(case.query), 12, 64), math.nan)
    wide[:, 3:7] = case.query
    case.query = wide[:, 3:7]

    assert torch.equal(run(backend, case, "float32"), plain)


# -- exact equality ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "kv_dtype", "value_size"),
    [
        *itertools.product([None, 50, 301], DTYPES, [None]),
        *itertools.product([50], DTYPES, [48]),
        (50, "int8", None),
        (None, "fp8", None),
    ],
)
def test_attention_of_a_request_does_not_depend_on_the_batch(backend, window, kv_dtype, value_size):
    query_lens, seq_lens = [1, 1, 1, 5, 33, 90], [700, 3, 256, 517, 33, 600]
    case = make_case(
        query_lens, seq_lens, heads=(6, 2), window=window, dtype="bfloat16", value_size=value_size
    )

    together = run(backend, case, kv_dtype)

    row = 0
    for i, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        query = case.query[row : row + query_len]
        alone = Case(case.spec, 16, [query_len], [seq_len], query, [case.keys[i]], [case.values[i]])
        assert torch.equal(run(backend, alone, kv_dtype), together[row : row + query_len])
        row += query_len


@pytest.mark.parametrize(
    ("window", "kv_dtype"),
    [*itertools.product([None, 50], DTYPES), (None, "int8"), (50, "fp8")],
)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)], ids=str)
def test_chunked_prefill_equals_whole_prefill(backend, heads, window, kv_dtype):
    case = make_case([600], [600], heads=heads, window=window, dtype="bfloat16")
    whole = run(backend, case, kv_dtype)

    for start, end in ((0, 1), (0, 64), (64, 100), (255, 256), (100, 599), (599, 600)):
        part = Case(
            case.spec, 16, [end - start], [end], case.query[start:end],
            [case.keys[0][:end]], [case.values[0][:end]],
        )  # fmt: skip
        assert torch.equal(run(backend, part, kv_dtype), whole[start:end])


# -- the cache --------------------------------------------------------------------------------


def filled_cache(backend, dtype, *, block_size=16, num_blocks=7, head_size=24):
    spec = KVSpec(
        num_layers=3, num_kv_heads=2, head_size=head_size, block_size=block_size, dtype=dtype
    )
    kv = backend.kv_alloc(spec, num_blocks)
    wire = rounded((num_blocks, 3, 2, block_size, 2, head_size), dtype)
    everything = torch.arange(num_blocks, dtype=torch.int32)
    return backend.kv_import(kv, everything, wire), wire


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_export_returns_what_import_wrote(backend, block_size, dtype):
    kv, wire = filled_cache(backend, dtype, block_size=block_size)
    blocks = torch.tensor([5, 0, 3], dtype=torch.int32)

    assert torch.equal(backend.kv_export(kv, blocks), wire[blocks.long()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_copies_blocks_in_all_layers(backend, dtype):
    kv, wire = filled_cache(backend, dtype)

    kv = backend.kv_copy(
        kv, torch.tensor([1, 6], dtype=torch.int32), torch.tensor([4, 2], dtype=torch.int32)
    )

    wire[4], wire[2] = wire[1], wire[6]
    assert torch.equal(backend.kv_export(kv, torch.arange(7, dtype=torch.int32)), wire)


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 90])
def test_write_stores_tokens_in_their_slots_of_one_layer(backend, num_tokens, dtype, kv_dtype):
    kv, wire = filled_cache(backend, kv_dtype)
    slots = 16 + np.random.default_rng(0).permutation(6 * 16)[:num_tokens]
    qkv = rounded((num_tokens, 9, 24), dtype, 3)
    key, value = qkv[:, 4:6], qkv[:, 7:9]
    meta = make_meta([num_tokens], [num_tokens], [[0]], slots)

    kv = backend.kv_write(kv, 1, key, value, meta)

    for token, slot in enumerate(slots):
        wire[slot // 16, 1, 0, slot % 16] = key[token].to(wire.dtype)
        wire[slot // 16, 1, 1, slot % 16] = value[token].to(wire.dtype)
    assert torch.equal(backend.kv_export(kv, torch.arange(7, dtype=torch.int32)), wire)


@pytest.mark.parametrize("kv_dtype", SCALED_KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_equal_the_portable_ones_on_every_instruction_set(backend, dtype, kv_dtype):
    spec = KVSpec(num_layers=2, num_kv_heads=2, head_size=24, block_size=16, dtype=kv_dtype)
    kv = backend.kv_alloc(spec, 8)
    kv.data.fill_(0xFF)
    exponents = torch.arange(90) % 29 - 14 if dtype == "float16" else torch.arange(90) * 2 - 100
    x = rounded((90, 9, 24), "float32", 3) * torch.exp2(exponents)[:, None, None]
    x = x.to(DTYPES[dtype])
    key, value = x[:, 4:6], x[:, 7:9]
    key[3], value[4, 1, 23], key[5, 0, 8], value[6] = 0, math.nan, -math.inf, 0
    slots = 16 + np.random.default_rng(0).permutation(6 * 16)[:90]

    kv = backend.kv_write(kv, 1, key, value, make_meta([90], [90], [[0]], slots))

    wire = backend.kv_export(kv, torch.arange(8, dtype=torch.int32))
    assert wire[:, 0].isnan().all()
    for side, rows in enumerate((key, value)):
        held = wire[torch.tensor(slots) // 16, 1, side, torch.tensor(slots) % 16]
        expected = kv_codes.dequantize(*kv_codes.quantize(rows, kv_dtype))
        assert torch.equal(held.isnan(), expected.isnan())
        assert torch.equal(held.nan_to_num(), expected.nan_to_num())


# -- threads ----------------------------------------------------------------------------------


def test_use_threads_sets_the_size_of_the_team() -> None:
    native = cpu_isas.installed()
    backend, before = CpuBackend(), native.num_threads()
    try:
        backend.use_threads(1)
        assert native.num_threads() == 1
    finally:
        native.set_num_threads(before)


def test_more_threads_than_usable_cores_are_refused() -> None:
    usable = cpu_isas.installed().usable_cores()

    with pytest.raises(BackendError, match=f"may use {usable} cores"):
        CpuBackend().use_threads(usable + 1)

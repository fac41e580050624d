"""Compute a layer's experts: sort tokens by expert, multiply them in tiles, add up the results.

Choice t * k + j is token t with the j-th of its k experts. `_sort` divides the choices of each
expert into tiles of ROWS and pads the last one; `_product` computes the tiles, first gate and up
with their activation, then down; `_add_up` adds the k results of each token. The launches depend
only on the number of choices, not on the chosen experts, so the step can be captured.

    expert_ids    int32 [T, k]              distinct within a row
    choices       int32 [most tiles, ROWS]  T k is padding; tiles after the last are not written
    tile_experts  int32 [most tiles]
    num_tiles     int32 [1]
    addresses     int64 [3, E]              of each expert's values, scales and minimums
    results       [T k, N]                  in x's dtype; every row is written

Mapping:  `_sort`: one program per expert, which reads all ids. `_product`: one program per tile and
          BLOCK_N rows of its expert's weight; programs of BAND tiles are adjacent, so that they
          read these rows from the cache (of one die: dies.py); programs after the last tile return
          at once. The weight
          is the left operand, as in matmul.py, whose `add_group` is used.
Bound by: memory while experts have few tokens each: the weights of the chosen experts.
Meaning:  TorchBackend.moe, except that the activation is computed in float32 and rounded once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from portalm.backend import Experts
from portalm.errors import BackendError
from portalm_backends.gpu_common.kernels import fp8
from portalm_backends.gpu_common.kernels.dependent_launch import options, wait_for_inputs
from portalm_backends.gpu_common.kernels.dies import in_ranges
from portalm_backends.gpu_common.kernels.matmul import add_group
from portalm_backends.gpu_common.weights import ExpertWeights

CHUNK = 4096
"""Most ids that a program of `_sort` reads at a time."""
BAND = 8
"""Tiles whose programs share the rows of a weight in the cache."""
_BLOCK = 1024
"""Columns per program of `_add_up`."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A step's choices, sorted by expert and divided into tiles."""

    rows: int
    """Choices per tile, padding included."""
    choices: torch.Tensor
    """int32 [most tiles, rows]"""
    experts: torch.Tensor
    """int32 [most tiles], expert of each tile."""
    count: torch.Tensor
    """int32 [1], number of tiles."""
    num_choices: int
    """T k"""


def moe(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    experts: Experts,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    *,
    family: str,
    num_dies: int = 1,
) -> torch.Tensor:
    """`Backend.moe` for x [T, C] with the weights of `experts` as `group_experts` returns them.

    `family` is the device's `Arch.family`, and `num_dies` its dies with an L2 cache of their own.
    Returns [T, C].
    """
    top_k = expert_ids.shape[1]
    if not len(x):
        return torch.empty_like(x)
    tiles = sort(expert_ids.contiguous(), len(experts.down))
    inner = product(
        x, gate_up, tiles, experts.gate_up_bias, top_k=top_k, gate=experts,
        family=family, num_dies=num_dies,
    )  # fmt: skip
    results = product(inner, down, tiles, experts.down_bias, family=family, num_dies=num_dies)
    return add_up(results, expert_weights.contiguous())


def sort(expert_ids: torch.Tensor, num_experts: int) -> Tiles:
    """Sort the chosen experts, int32 [T, k] and contiguous, into tiles."""
    num_choices = expert_ids.numel()
    rows = tile_rows(num_choices, num_experts)
    most = (num_choices + min(num_choices, num_experts) * (rows - 1)) // rows

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expert_ids.device)

    tiles = Tiles(rows, empty(most, rows), empty(most), empty(1), num_choices)
    chunk = min(max(triton.next_power_of_2(num_choices), 1024), CHUNK)
    _sort[(num_experts,)](
        expert_ids, tiles.choices, tiles.experts, tiles.count, num_choices, num_experts,
        rows, triton.next_power_of_2(num_experts + 1), chunk, num_warps=chunk // 512,
        enable_fp_fusion=True, **options(),
    )  # fmt: skip
    return tiles


def tile_rows(num_choices: int, num_experts: int) -> int:
    """Tile size: the average number of choices per expert, rounded up to a supported size."""
    average = num_choices / num_experts
    return 16 if average <= 16 else 64 if average <= 64 else 128


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """Tile sizes and launch options of `_product`."""

    block_n: int
    """Rows of the weight per program; for gate and up, this many of each."""
    columns: int
    """Columns that are multiplied at once in weights without groups."""
    num_warps: int
    num_stages: int


def launch_shape(rows: int, weight: torch.dtype, family: str, *, is_gated: bool) -> LaunchShape:
    """Choose sizes for tiles of `rows`, values of dtype `weight` and GPUs of `family`.

    With few tokens a program has 64 rows of a weight, so that enough programs fill the device;
    with many tokens 128, so that each value read is used in more products.
    """
    has_codes, is_narrow = weight == torch.int8, rows == 16
    is_half = has_codes and not is_gated  # decoding codes needs many registers
    num_warps = 8 if rows == 128 or (has_codes and not is_narrow) else 4
    if family.startswith("rdna") and not is_narrow:  # operands need twice the registers there
        num_warps *= 2
    is_deep = is_narrow or (family in ("nvidia", "ampere", "ada") and not is_half)
    block_n = 64 if is_narrow or is_half else 128
    return LaunchShape(
        block_n=block_n // 2 if is_gated else block_n,
        columns=16 if weight == torch.float32 else 128 // weight.itemsize,
        num_warps=num_warps,
        num_stages=3 if is_deep else 2,
    )


def product(
    x: torch.Tensor,
    weight: ExpertWeights,
    tiles: Tiles,
    bias: torch.Tensor | None,
    *,
    top_k: int = 1,
    gate: Experts | None = None,
    family: str = "nvidia",
    num_dies: int = 1,
) -> torch.Tensor:
    """Multiply each choice's row of x with its expert's weight; add the expert's bias: [T k, N].

    Args:
        x: [T k / top_k, K], a row per choice, or a row per token shared by its `top_k` choices.
        weight: [N, K] of each expert.
        tiles: the choices, sorted by expert.
        bias: [E, N] or None.
        top_k: number of choices that share a row of x.
        gate: if given, the weight is gate and up, and its activation is applied: the result is
            [T k, N / 2].
        family: `Arch.family` of the device.
        num_dies: its dies with an L2 cache of their own.
    """
    values, scales, minimums, bits, group, n, k = weight.first
    if x.shape[1] != k or x.stride(1) != 1:
        raise BackendError(
            "shape",
            f"moe: x of shape {list(x.shape)} and strides {list(x.stride())} does not fit weights "
            f"[{n}, {k}]; x must be [M, {k}] with contiguous rows",
        )
    dtype, x_scales, is_scaled = x.dtype, x, bits == 16 and scales is not None
    if is_scaled:
        x, x_scales = fp8.quantize(x, values.dtype)
    width = n if gate is None else n // 2
    shape = launch_shape(tiles.rows, values.dtype, family, is_gated=gate is not None)
    group = group or shape.columns
    limit = None if gate is None else gate.swiglu_limit
    out = torch.empty((tiles.num_choices, width), dtype=dtype, device=x.device)
    _product[(len(tiles.experts) * triton.cdiv(width, shape.block_n),)](
        x, x_scales, weight.addresses, values, values if scales is None else scales,
        values if minimums is None else minimums, x if bias is None else bias.contiguous(),
        tiles.choices, tiles.experts, tiles.count, out,
        tiles.num_choices, weight.addresses.shape[1], top_k, n, k, x.stride(0),
        triton.cdiv(k, group), 0.0 if limit is None else limit,
        1.0 if gate is None else gate.swiglu_alpha,
        group, bits, minimums is not None, is_scaled, bias is not None, gate is not None,
        limit is not None, weight.alignment, BAND, tiles.rows, shape.block_n, num_dies,
        num_warps=shape.num_warps, num_stages=shape.num_stages, enable_fp_fusion=True, **options(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_choices"])
def _sort(
    ids_ptr, choices_ptr, tile_experts_ptr, num_tiles_ptr, num_choices, num_experts,
    ROWS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Write the tiles of one expert after those of the experts before it; keep choices in order."""
    wait_for_inputs(WAITS)
    expert = tl.program_id(0)
    bins, within = tl.arange(0, BINS), tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_choices, CHUNK):
        choices = start + within
        ids = tl.load(ids_ptr + choices, mask=choices < num_choices, other=BINS - 1)  # no expert
        counts += tl.histogram(ids, BINS)
    tiles = (counts + ROWS - 1) // ROWS
    first = tl.sum(tl.where(bins < expert, tiles, 0), axis=0)
    num_mine = tl.sum(tl.where(bins == expert, tiles, 0), axis=0)
    if expert == 0:
        tl.store(num_tiles_ptr, tl.sum(tl.where(bins < num_experts, tiles, 0), axis=0))
    for start in range(0, num_mine, CHUNK):
        tile = start + within
        tl.store(tile_experts_ptr + first + tile, expert, mask=tile < num_mine)
    place = first * ROWS
    for start in range(0, num_choices, CHUNK):
        choices = start + within
        ids = tl.load(ids_ptr + choices, mask=choices < num_choices, other=BINS - 1)
        is_mine = ids == expert
        count = tl.cumsum(is_mine.to(tl.int32), axis=0)
        tl.store(choices_ptr + place + count - 1, choices, mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32), axis=0)
    rest = place + tl.arange(0, ROWS)
    tl.store(choices_ptr + rest, num_choices, mask=rest < (first + num_mine) * ROWS)


@triton.jit(do_not_specialize=["num_choices"])
def _product(
    x_ptr, x_scales_ptr, addresses_ptr, values_ptr, scales_ptr, minimums_ptr, bias_ptr,
    choices_ptr, tile_experts_ptr, num_tiles_ptr, out_ptr,
    num_choices, num_experts, choices_per_row, n, k, x_stride, num_groups, limit, alpha,
    GROUP: tl.constexpr, BITS: tl.constexpr, HAS_MINIMUMS: tl.constexpr, HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, IS_CLAMPED: tl.constexpr,
    ALIGNMENT: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    DIES: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N columns of one tile's results; with IS_GATED, both halves and the activation.

    `values_ptr`, `scales_ptr` and `minimums_ptr` are those of the first expert and only give the
    types. HAS_SCALES: x and the weight are float8 with a scale per row.
    """
    wait_for_inputs(WAITS)
    width = n // 2 if IS_GATED else n
    blocks = tl.cdiv(width, BLOCK_N)
    num_tiles = tl.load(num_tiles_ptr)
    program = tl.program_id(0)
    if program >= num_tiles * blocks:
        return
    program = in_ranges(program, num_tiles * blocks, DIES)
    band = program // (BAND * blocks) * BAND
    height = tl.minimum(num_tiles - band, BAND)
    tile = band + program % (BAND * blocks) % height
    of_n = program % (BAND * blocks) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = of_n < width

    expert = tl.load(tile_experts_ptr + tile)
    choices = tl.load(choices_ptr + tile * ROWS + tl.arange(0, ROWS))
    is_m = choices < num_choices
    of_m = (choices // choices_per_row).to(tl.int64)
    own = addresses_ptr + expert
    values = tl.multiple_of(tl.load(own).to(values_ptr.dtype), ALIGNMENT)
    scales, minimums = values, values
    if HAS_SCALES or BITS < 16:
        scales = tl.multiple_of(tl.load(own + num_experts).to(scales_ptr.dtype), ALIGNMENT)
    if HAS_MINIMUMS:
        address = tl.load(own + 2 * num_experts).to(minimums_ptr.dtype)
        minimums = tl.multiple_of(address, ALIGNMENT)

    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    up = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for i in range(num_groups):
        of_k = i * GROUP + tl.arange(0, GROUP)
        x = tl.load(
            x_ptr + of_m[None, :] * x_stride + of_k[:, None],
            mask=is_m[None, :] & (of_k < k)[:, None],
            other=0.0,
        )
        total = add_group(
            total, x, values, scales, minimums, i, of_n, is_n, n, k,
            GROUP, BITS, HAS_MINIMUMS, BLOCK_N,
        )  # fmt: skip
        if IS_GATED:
            up = add_group(
                up, x, values, scales, minimums, i, of_n + width, is_n, n, k,
                GROUP, BITS, HAS_MINIMUMS, BLOCK_N,
            )  # fmt: skip

    x_scales = total  # any value: it is not used
    if HAS_SCALES:
        x_scales = tl.load(x_scales_ptr + of_m, mask=is_m, other=0.0)
    biases = bias_ptr + expert * n
    total = _finish(total, scales, x_scales, biases, of_n, is_n, HAS_SCALES, HAS_BIAS)
    if IS_GATED:
        up = _finish(up, scales, x_scales, biases, of_n + width, is_n, HAS_SCALES, HAS_BIAS)
        if IS_CLAMPED:  # tl.where instead of tl.clamp, so that NaN stays NaN
            total = tl.where(total > limit, limit, total)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
            total = total / (1.0 + tl.exp(-alpha * total)) * (up + 1.0)
        else:
            total = total / (1.0 + tl.exp(-total)) * up
    tl.store(
        out_ptr + choices[None, :].to(tl.int64) * width + of_n[:, None],
        total.to(out_ptr.dtype.element_ty),
        mask=is_m[None, :] & is_n[:, None],
    )


@triton.jit
def _finish(
    total, scales_ptr, x_scales, bias_ptr, of_n, is_n,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Apply scales and bias to sums of products, float32 [BLOCK_N, ROWS]."""
    if HAS_SCALES:
        scales = tl.load(scales_ptr + of_n, mask=is_n, other=0.0)
        total = total * scales[:, None] * x_scales[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + of_n, mask=is_n, other=0.0).to(tl.float32)[:, None]
    return total


def add_up(results: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
    """Add up each token's k rows of [T k, C], weighted by float32 [T, k], in order: [T, C]."""
    num_tokens, top_k = expert_weights.shape
    width = results.shape[1]
    out = torch.empty((num_tokens, width), dtype=results.dtype, device=results.device)
    _add_up[(num_tokens, triton.cdiv(width, _BLOCK))](
        results, expert_weights, out, width, top_k, _BLOCK, enable_fp_fusion=True, **options()
    )
    return out


@triton.jit
def _add_up(
    results_ptr, weights_ptr, out_ptr, width,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK columns of one token."""
    wait_for_inputs(WAITS)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        choice = token * TOP_K + j
        weight = tl.load(weights_ptr + choice)
        result = tl.load(results_ptr + choice * width + columns, mask=mask, other=0.0)
        # the result of an expert with weight 0 may be infinite or NaN
        total += tl.where(weight == 0.0, 0.0, result.to(tl.float32) * weight)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=mask)

"""Conversion of GGUF's quantized types, compared with the gguf package's dequantization."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from portalm.backend import QUANTIZED_FORMATS
from portalm.models.loader.gguf_quantized import as_quantized

ROWS, COLUMNS = 5, 512
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
"""Byte offsets of the float16 numbers in a block."""
GRIDS = {
    "Q3_K": [108], "IQ1_S": [0], "IQ1_M": [], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0],
    "IQ3_XXS": [0], "IQ3_S": [0], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
    "MXFP4": [],
}  # fmt: skip
"""The same, for types whose codes are computed by division."""


def random_blocks(kind: GGMLQuantizationType) -> np.ndarray:
    rng = np.random.default_rng(0)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // block_size, block_bytes), dtype=np.uint8)
    for offset in {**HALVES, **GRIDS}[kind.name]:
        halves = rng.uniform(0.5, 2, blocks.shape[:2]).astype(np.float16)
        blocks[..., offset : offset + 2] = halves[..., None].view(np.uint8)
    if kind.name == "MXFP4":
        blocks[..., 0] = rng.integers(100, 140, blocks.shape[:2])
    if kind.name == "IQ1_M":  # its float16 number, 0x3C00, is in the high nibbles of four words
        blocks[..., 49::2] &= 0x0F
        blocks[..., 53] |= 0xC0
        blocks[..., 55] |= 0x30
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("name", HALVES)
def test_conversion_equals_the_gguf_package(name):
    kind = GGMLQuantizationType[name]
    blocks = random_blocks(kind)

    weight = as_quantized(kind, blocks, (ROWS, COLUMNS))

    assert weight is not None
    assert weight.scales.shape == (ROWS, COLUMNS // QUANTIZED_FORMATS[weight.format])
    np.testing.assert_array_equal(weight.dequantize().numpy(), dequantize(blocks, kind))


@pytest.mark.parametrize("name", GRIDS)
def test_grid_points_become_integer_codes(name):
    kind = GGMLQuantizationType[name]
    blocks = random_blocks(kind)
    expected = dequantize(blocks, kind)

    weight = as_quantized(kind, blocks, (ROWS, COLUMNS))

    assert weight is not None
    assert weight.scales.shape == (ROWS, COLUMNS // QUANTIZED_FORMATS[weight.format])
    np.testing.assert_allclose(weight.dequantize().numpy(), expected, rtol=1e-6)
    assert len(np.unique(weight.codes.numpy())) > 2 and np.isfinite(expected).all()


def test_a_nan_scale_makes_nan_weights():
    blocks = random_blocks(GGMLQuantizationType.IQ4_NL)
    blocks[2, :2] = np.array([np.nan], np.float16).view(np.uint8)

    weight = as_quantized(GGMLQuantizationType.IQ4_NL, blocks, (ROWS, COLUMNS))

    is_nan = np.isnan(weight.dequantize().numpy())
    assert is_nan[2, :32].all() and is_nan.sum() == 32


def test_unquantized_types_and_vectors_are_not_converted():
    assert as_quantized(GGMLQuantizationType.F16, np.zeros((1, 64), np.uint8), (1, 32)) is None
    assert as_quantized(GGMLQuantizationType.Q8_0, np.zeros((1, 34), np.uint8), (32,)) is None

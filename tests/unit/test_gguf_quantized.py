"""GGUF's integer formats taken apart: the same numbers as the gguf package's dequantisation."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from portalm.backend import QUANTIZED_FORMATS
from portalm.models.loader.gguf_quantized import as_quantized

ROWS, COLUMNS = 5, 512
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
"""Where a block has float16 numbers, in bytes."""


def random_blocks(kind: GGMLQuantizationType) -> np.ndarray:
    rng = np.random.default_rng(0)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // block_size, block_bytes), dtype=np.uint8)
    for offset in HALVES[kind.name]:
        halves = rng.uniform(0.5, 2, blocks.shape[:2]).astype(np.float16)
        blocks[..., offset : offset + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("name", HALVES)
def test_dequantised_it_is_what_the_gguf_package_says(name):
    kind = GGMLQuantizationType[name]
    blocks = random_blocks(kind)

    weight = as_quantized(kind, blocks, (ROWS, COLUMNS))

    assert weight is not None
    assert weight.scales.shape == (ROWS, COLUMNS // QUANTIZED_FORMATS[weight.format])
    np.testing.assert_array_equal(weight.dequantize().numpy(), dequantize(blocks, kind))


def test_other_formats_have_no_such_form():
    kind = GGMLQuantizationType.Q5_K

    assert as_quantized(kind, np.zeros((1, 176), np.uint8), (1, 256)) is None
    assert as_quantized(GGMLQuantizationType.Q8_0, np.zeros((1, 34), np.uint8), (32,)) is None

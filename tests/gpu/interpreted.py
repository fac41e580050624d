"""The kernels behind the seam, on CPU tensors: what Triton's interpreter can say about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from portalm.backend import Capabilities, QuantizedWeight, SampleOutput, SampleParams
from portalm_backends.gpu_common import weights
from portalm_backends.gpu_common.kernels import linear, norms, rope, sampling, silu_mul
from portalm_backends.reference.backend import ReferenceBackend

complete = pytest.mark.gpu_interpreted


def some(values: Iterable[Any], is_usual: Callable[[Any], bool]) -> list[Any]:
    """Parameters of a test: the usual ones in every run, all others under `gpu_interpreted`."""
    return [value if is_usual(value) else pytest.param(value, marks=complete) for value in values]


class InterpretedBackend(ReferenceBackend):
    """The reference's attention and cache; every operation that has a kernel is interpreted.

    float32 and float16 only: the interpreter multiplies the bits of bfloat16.
    """

    name = "interpreted"
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "float16"}),
        kv_dtypes=frozenset({"float32", "float16"}),
        quantizations=weights.QUANTIZATIONS,
    )

    def pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> Any:
        return weights.pack(weight, self.device(), quantization=quantization, for_logits=for_logits)

    def linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear.linear(x, weight, bias)

    def logits(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        return linear.logits(x, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norms.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return norms.add_rms_norm(x, residual, weight, eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return norms.layer_norm(x, weight, bias, eps)

    def rope(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rope.rope(query, key, positions, cos_sin, is_interleaved=is_interleaved)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_mul.silu_mul(gate_up)

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        return sampling.sample(logits, params)

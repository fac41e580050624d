"""A model's own code over the float64 operations of `reference`: one whole request, no cache.

The backend under test is not involved. The model family's code defines what is computed; tests of
its own compare it with transformers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import (
    AttentionSpec,
    Backend,
    Capabilities,
    Experts,
    QuantizedWeight,
    Weights,
)
from portalm.conformance import reference
from portalm.engine.engine import Engine
from portalm.models.loader import open_checkpoint
from portalm.models.model import Model
from portalm.models.registry import model_class

Array = npt.NDArray[np.float64]


def forward(engine: Engine, token_ids: list[int]) -> Array:
    """Return logits of all positions in float64, [N, V], from the checkpoint's weights."""
    model, oracle, weights, states = _run(engine, token_ids)
    return _array(model.logits(oracle, weights, states))


def encode(engine: Engine, token_ids: list[int]) -> Array:
    """Return hidden states after an encoder's last layer in float64, [N, C]."""
    return _array(_run(engine, token_ids)[-1])


def _run(engine: Engine, token_ids: list[int]) -> tuple[Model, Backend, Weights, torch.Tensor]:
    config = engine.model_config
    model = model_class(config.architecture)(config, "float64")
    oracle = cast(Backend, Oracle())
    weights = model.load(open_checkpoint(engine.model_path, engine.config), oracle)
    positions = torch.arange(len(token_ids), dtype=torch.int32)
    meta: Any = SimpleNamespace(
        positions=positions, logits_rows=positions, token_types=torch.zeros_like(positions)
    )
    _, hidden = model.forward(oracle, weights, {}, torch.tensor(token_ids), meta)
    return model, oracle, weights, hidden


def _array(x: torch.Tensor) -> Array:
    return np.asarray(x.double().numpy(), np.float64)


class Oracle:
    """The operations of models, on float64 tensors on the host."""

    name = "oracle"
    capabilities = Capabilities(
        dtypes=frozenset({"float64"}),
        kv_dtypes=frozenset({"float64"}),
        features=frozenset({"sliding_window"}),
    )

    def device(self) -> torch.device:
        """Return the host."""
        return torch.device("cpu")

    def pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> torch.Tensor:
        """Return the weight itself."""
        assert isinstance(weight, torch.Tensor)
        return weight

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply [T, K] by [N, K] transposed: [T, N]."""
        added = None if bias is None else _array(bias)
        return torch.from_numpy(reference.linear(_array(x), _array(weight), added))

    def pack_heads(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight itself."""
        return weight

    def linear_heads(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply [T, H, K] by [H, N, K], head by head: [T, H, N]."""
        return torch.from_numpy(reference.linear_heads(_array(x), _array(weight)))

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply [R, C] by [V, C] transposed: [R, V]."""
        return self.linear(x, weight)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Select rows [T] of [V, C]."""
        return table[token_ids.long()]

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Select rows [R] of [T, C]."""
        return x[rows.long()]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalize over the last dimension."""
        return torch.from_numpy(reference.rms_norm(_array(x), _array(weight), eps))

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of the sum, and the sum."""
        return self.rms_norm(x + residual, weight, eps), x + residual

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Normalize over the last dimension."""
        normed = reference.layer_norm(_array(x), _array(weight), _array(bias), eps)
        return torch.from_numpy(normed)

    def rope(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query [T, H, D] and key [T, H_kv, D]."""
        places, table = positions.numpy(), _array(cos_sin)
        turned = (reference.rope(_array(x), places, table, is_interleaved) for x in (query, key))
        rotated_query, rotated_key = (torch.from_numpy(x) for x in turned)
        return rotated_query, rotated_key

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 I]: [T, I]."""
        return torch.from_numpy(reference.silu_mul(_array(gate_up)))

    def gelu_tanh_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gelu_tanh(gate) * up of [T, 2 I]: [T, I]."""
        return torch.from_numpy(reference.gelu_tanh_mul(_array(gate_up)))

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Exact GELU."""
        return torch.from_numpy(reference.gelu(_array(x)))

    def gelu_tanh(self, x: torch.Tensor) -> torch.Tensor:
        """GELU by tanh."""
        return torch.from_numpy(reference.gelu_tanh(_array(x)))

    def moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Experts,
    ) -> torch.Tensor:
        """Apply each token's experts and sum their outputs by weight."""
        biases = None
        if experts.gate_up_bias is not None and experts.down_bias is not None:
            biases = _array(experts.gate_up_bias), _array(experts.down_bias)
        out = reference.moe(
            _array(x),
            expert_ids.numpy(),
            _array(expert_weights),
            [_array(weight) for weight in experts.gate_up],
            [_array(weight) for weight in experts.down],
            biases,
            experts.swiglu_limit,
            experts.swiglu_alpha,
        )
        return torch.from_numpy(out)

    def kv_write(
        self,
        kv: dict[int, tuple[torch.Tensor, torch.Tensor]],
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: object,
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keep the layer's keys and values."""
        return {**kv, layer: (key, value)}

    def rope_kv_write(
        self,
        kv: dict[int, tuple[torch.Tensor, torch.Tensor]],
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: Any,
        cos_sin: torch.Tensor,
        *,
        is_interleaved: bool,
    ) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """Apply `rope`, then `kv_write`."""
        turned, key = self.rope(query, key, meta.positions, cos_sin, is_interleaved=is_interleaved)
        return self.kv_write(kv, layer, key, value, meta), turned

    def attend(
        self,
        kv: dict[int, tuple[torch.Tensor, torch.Tensor]],
        layer: int,
        query: torch.Tensor,
        meta: object,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of [T, H, D]."""
        key, value = kv[layer]
        parts = _array(query), _array(key), _array(value[..., : spec.out_size])
        extra = None if sinks is None else _array(sinks)
        return torch.from_numpy(reference.attention(*parts, spec, extra))

    def attend_encoder(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: object,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """Bidirectional attention of [T, H, D], one request."""
        parts = _array(query), _array(key), _array(value)
        return torch.from_numpy(reference.encoder_attention(*parts, spec))

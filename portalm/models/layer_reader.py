"""Reads a model's layers from a checkpoint; each call states a tensor's name and its shape.

A family's `build` runs twice: without a checkpoint, to list the tensors that the model has, and
with one, to read them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from portalm.backend import Capabilities, Experts, PackedWeight, QuantizedWeight
from portalm.layers.linear import Linear, Packer, pack_linear, pack_weight
from portalm.layers.norms import LayerNorm, RMSNorm
from portalm.models.loader.checkpoint import HF_FORM, RowOrder, TensorReader, reorder_rows
from portalm.models.model import AS_CAST, Quantization


class ShapeRecorder:
    """Replaces the checkpoint: records names and shapes, and returns tensors without data."""

    def __init__(self) -> None:
        """Start without any recorded tensor."""
        self.form = HF_FORM
        self.shapes: dict[str, tuple[int, ...]] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Record the tensor, and return one of its shape on the meta device."""
        self.shapes[name] = shape
        return torch.empty(shape, device="meta")

    weight = tensor


class NoDevice:
    """Replaces the backend: packs tensors without data."""

    capabilities = Capabilities(dtypes=frozenset(), kv_dtypes=frozenset())

    def device(self) -> torch.device:
        """Torch's meta device."""
        return torch.device("meta")

    def pack(
        self,
        weight: torch.Tensor | QuantizedWeight,
        *,
        quantization: str | None = None,
        for_logits: bool = False,
    ) -> PackedWeight:
        """Return the weight unchanged."""
        return weight

    def pack_heads(self, weight: torch.Tensor) -> PackedWeight:
        """Return the weight unchanged."""
        return weight


class LayerReader:
    """Reads layers by their tensors' names, packs them and moves them to the device."""

    def __init__(
        self,
        reader: TensorReader | ShapeRecorder,
        backend: Packer,
        dtype: str,
        quantization: Quantization = AS_CAST,
    ) -> None:
        """Read from `reader`, and pack for `backend` in `dtype` or as `quantization` says."""
        self._reader = reader
        self.form = reader.form
        self._backend = backend
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._quantization = quantization

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Read a tensor in the model's dtype."""
        return self._host(name, shape).to(self.dtype).to(self._backend.device(), copy=True)

    def float32(self, name: str, *shape: int) -> torch.Tensor:
        """Read a tensor in float32."""
        return self._host(name, shape).float().to(self._backend.device(), copy=True)

    def linear(
        self,
        *names: str,
        rows: tuple[int, ...],
        columns: int,
        has_bias: bool = False,
        order: RowOrder | None = None,
        is_transposed: bool = False,
    ) -> Linear:
        """Read a linear layer; several names are concatenated by rows.

        Args:
            names: layers with the same input; each has a tensor `name`.weight.
            rows: N of each layer.
            columns: K of all layers.
            has_bias: each layer also has `name`.bias [N].
            order: reorders the rows of each weight and bias from the order of Hugging Face's
                checkpoints to the model's.
            is_transposed: Hugging Face's checkpoints store [K, N].
        """
        is_transposed = is_transposed and not self.form.has_rows_first
        if self.form.has_model_row_order:
            order = None
        weights, biases = [], []
        for name, n in zip(names, rows, strict=True):
            shape = (columns, n) if is_transposed else (n, columns)
            weight = self._weight(f"{name}.weight", shape)
            if is_transposed and not isinstance(weight, QuantizedWeight):
                weight = weight.T
            weights.append(weight if order is None else reorder_rows(weight, order))
            if has_bias:
                bias = self._host(f"{name}.bias", (n,))
                biases.append(bias if order is None else order(bias))
        return pack_linear(self._backend, weights, biases, self.dtype, self._quantization.layers)

    def router(self, name: str, rows: int, columns: int, *, has_bias: bool = False) -> Linear:
        """Read a small linear layer, such as a router, that is never quantized."""
        weight = self._host(f"{name}.weight", (rows, columns))
        biases = [self._host(f"{name}.bias", (rows,))] if has_bias else []
        return pack_linear(self._backend, [weight], biases, self.dtype)

    def scores(self, name: str, rows: int, columns: int) -> PackedWeight:
        """Read a router's weight for `Backend.logits`, whose result is float32."""
        weight = self._host(f"{name}.weight", (rows, columns))
        return pack_weight(self._backend, [weight], self.dtype, for_logits=True)

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Read `name`.weight on the host, dequantized, for `heads`."""
        return self._host(f"{name}.weight", (rows, columns))

    def heads(self, weight: torch.Tensor) -> PackedWeight:
        """Pack part of a matrix, [H, N, K], for `Backend.linear_heads`; it is never quantized."""
        return self._backend.pack_heads(weight.to(self.dtype))

    def experts(
        self,
        name: str,
        count: int,
        *,
        inner: int,
        columns: int,
        names: tuple[str, str, str],
        has_bias: bool = False,
    ) -> Experts:
        """Read experts that each have their own tensors, `name`.0.gate_proj.weight and so on.

        Args:
            name: common prefix of the tensors' names.
            count: number of experts E.
            inner: width I of an expert.
            columns: hidden size C.
            names: names of gate, up and down.
            has_bias: each weight has a bias, `name`.0.gate_proj.bias and so on.
        """
        gate, up, down = names
        wide_bias, narrow_bias = {gate: inner, up: inner}, {down: columns}
        wide, narrow = (inner, columns), (columns, inner)
        return Experts(
            gate_up=tuple(
                self._packed(
                    self._weight(f"{name}.{i}.{gate}.weight", wide),
                    self._weight(f"{name}.{i}.{up}.weight", wide),
                )
                for i in range(count)
            ),
            down=tuple(
                self._packed(self._weight(f"{name}.{i}.{down}.weight", narrow))
                for i in range(count)
            ),
            gate_up_bias=self._expert_biases(name, count, wide_bias) if has_bias else None,
            down_bias=self._expert_biases(name, count, narrow_bias) if has_bias else None,
        )

    def _expert_biases(self, name: str, count: int, sizes: Mapping[str, int]) -> torch.Tensor:
        """Read biases [E, N] of all experts; `sizes` are the parts of N by name."""
        biases = [
            torch.cat([self._host(f"{name}.{i}.{part}.bias", (n,)) for part, n in sizes.items()])
            for i in range(count)
        ]
        return torch.stack(biases).to(self.dtype).to(self._backend.device())

    def stacked_experts(
        self, name: str, count: int, *, inner: int, columns: int, order: RowOrder
    ) -> Experts:
        """Read experts stored as [E, C, 2 I] and [E, I, C] tensors, with biases.

        `order` reorders the 2 I rows of gate and up to the model's order.
        """
        gate_up = self._host(f"{name}.gate_up_proj", (count, columns, 2 * inner))
        down = self._host(f"{name}.down_proj", (count, inner, columns))
        return Experts(
            gate_up=tuple(self._packed(order(weight.T)) for weight in gate_up),
            down=tuple(self._packed(weight.T) for weight in down),
            gate_up_bias=self._gate_up_bias(name, (count, 2 * inner), order),
            down_bias=self.tensor(f"{name}.down_proj_bias", count, columns),
        )

    def unbiased_experts(
        self, gate_up: str, down: str, count: int, *, inner: int, columns: int
    ) -> Experts:
        """Read experts stored as tensors `gate_up` [E, 2 I, C], gate rows first, and [E, C, I]."""
        wide = self._host(gate_up, (count, 2 * inner, columns))
        narrow = self._host(down, (count, columns, inner))
        return Experts(
            gate_up=tuple(self._packed(weight) for weight in wide),
            down=tuple(self._packed(weight) for weight in narrow),
        )

    def experts_by_rows(
        self, name: str, count: int, *, inner: int, columns: int, order: RowOrder
    ) -> Experts:
        """Read experts whose rows are concatenated: [E 2 I, C] and [E C, I], with biases.

        `order` reorders the 2 I rows of each expert's gate and up to the model's order.
        """
        gate_up = self._weight(f"{name}.gate_up_proj.weight", (count * 2 * inner, columns))
        down = self._weight(f"{name}.down_proj.weight", (count * columns, inner))

        def expert(i: int, num_rows: int, order: RowOrder = lambda rows: rows) -> RowOrder:
            return lambda rows: order(rows[i * num_rows : (i + 1) * num_rows])

        return Experts(
            gate_up=tuple(
                self._packed(reorder_rows(gate_up, expert(i, 2 * inner, order)))
                for i in range(count)
            ),
            down=tuple(self._packed(reorder_rows(down, expert(i, columns))) for i in range(count)),
            gate_up_bias=self._gate_up_bias(name, (count, 2 * inner), order),
            down_bias=self.tensor(f"{name}.down_proj_bias", count, columns),
        )

    def _gate_up_bias(self, name: str, shape: tuple[int, int], order: RowOrder) -> torch.Tensor:
        bias = order(self._host(f"{name}.gate_up_proj_bias", shape).T).T.contiguous()
        return bias.to(self.dtype).to(self._backend.device())

    def _packed(self, *weights: torch.Tensor | QuantizedWeight) -> PackedWeight:
        return pack_weight(self._backend, weights, self.dtype, self._quantization.layers)

    def head(
        self,
        name: str,
        rows: int,
        columns: int,
        tied: torch.Tensor | None,
        *,
        is_normalized: bool = False,
    ) -> PackedWeight:
        """Read the output head [V, C].

        Args:
            name: the tensor.
            rows: V.
            columns: C.
            tied: the embedding on the device, if it is the head.
            is_normalized: scale each row to length 1, which a quantized head is dequantized for.
        """
        shape = (rows, columns)
        if is_normalized:
            unit = torch.nn.functional.normalize(self._host(name, shape).float())
            form = self._quantization.head
            return pack_weight(self._backend, [unit], self.dtype, form, for_logits=True)
        is_kept = self._quantization.keep
        weight = self._weight(name, shape) if tied is None or is_kept else tied
        form = self._quantization.head
        return pack_weight(self._backend, [weight], self.dtype, form, for_logits=True)

    def rms_norm(self, name: str, size: int, eps: float, *, is_shifted: bool = False) -> RMSNorm:
        """Read an RMS norm; `is_shifted`: Hugging Face's checkpoints store its weight minus 1."""
        return RMSNorm(self._norm_weight(f"{name}.weight", size, is_shifted=is_shifted), eps)

    def _norm_weight(self, name: str, size: int, *, is_shifted: bool) -> torch.Tensor:
        if not is_shifted or self.form.has_full_norms:
            return self.tensor(name, size)
        weight = self._host(name, (size,)).float() + 1.0
        return weight.to(self.dtype).to(self._backend.device())

    def layer_norm(
        self,
        name: str,
        size: int,
        eps: float,
        *,
        has_bias: bool = True,
        is_shifted: bool = False,
    ) -> LayerNorm:
        """Read a layer norm from `name`.weight and `name`.bias; `is_shifted` as in `rms_norm`."""
        weight = self._norm_weight(f"{name}.weight", size, is_shifted=is_shifted)
        bias = self.tensor(f"{name}.bias", size) if has_bias else torch.zeros_like(weight)
        return LayerNorm(weight, bias, eps)

    def _host(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._reader.tensor(name, shape)

    def _weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | QuantizedWeight:
        if self._quantization.keep:
            return self._reader.weight(name, shape)
        return self._reader.tensor(name, shape)


def ungroup_qkv(num_kv_heads: int, head_size: int) -> RowOrder:
    """Reorder rows grouped by KV head (its queries, key, value) to all queries, keys, values."""

    def order(rows: torch.Tensor) -> torch.Tensor:
        rest = rows.shape[1:]
        groups = rows.reshape(num_kv_heads, -1, head_size, *rest)
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return torch.cat([part.reshape(-1, *rest) for part in parts])

    return order

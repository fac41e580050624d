"""Granite with experts: Granite 3 MoE, and those Granite 4 models that have no state layers.

IBM, "Granite 3.0 language models", 2024, and "Granite 4.0", 2025. Granite 4 has a shared
feed-forward, which is the only one in its dense sizes, and in some sizes no rotary embedding.
"""

from __future__ import annotations

from dataclasses import replace

from portalm.backend import Experts
from portalm.config import ModelConfig
from portalm.errors import UnsupportedModel
from portalm.layers.attention import Attention
from portalm.layers.blocks import Block, SequentialBlock
from portalm.layers.mlp import FeedForward, GatedMLP
from portalm.layers.moe import MoE, SoftmaxRouter
from portalm.models.granite import Granite
from portalm.models.layer_reader import LayerReader


class GraniteMoe(Granite):
    """Granite 3 MoE decoder; see `portalm.models.model.Model`."""

    defaults = {**Granite.defaults, "num_experts_per_tok": 2, "num_local_experts": 8}
    reads = Granite.reads | {"num_local_experts"}
    feed_forward = "block_sparse_moe"

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a router and experts."""
        values = self.config.values
        num_experts = int(values["num_local_experts"])
        self.activation(frozenset({"silu"}))
        return MoE(
            router=SoftmaxRouter(
                read.router(f"{name}.router.layer", num_experts, self.config.hidden_size),
                top_k=int(values["num_experts_per_tok"]),
                is_normalized=True,
            ),
            experts=self._experts(read, name, num_experts),
        )

    def _experts(self, read: LayerReader, name: str, num_experts: int) -> Experts:
        """Read experts in the form that the checkpoint stores them."""
        inner, hidden = self.config.intermediate_size, self.config.hidden_size
        if read.form.has_separate_experts:
            return read.experts(
                f"{name}.experts",
                num_experts,
                inner=inner,
                columns=hidden,
                names=("gate_proj", "up_proj", "down_proj"),
            )
        return read.unbiased_experts(
            f"{name}.input_linear.weight",
            f"{name}.output_linear.weight",
            num_experts,
            inner=inner,
            columns=hidden,
        )


class GraniteMoeShared(GraniteMoe):
    """Granite MoE decoder with a shared feed-forward."""

    defaults = {**GraniteMoe.defaults, "shared_intermediate_size": 0}

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer with experts, a shared feed-forward, or both."""
        block = super().block(read, layer, name)
        assert isinstance(block, SequentialBlock)
        shared = self.shared_mlp(read, f"{name}.shared_mlp")
        if shared is None:
            return block
        mlp = replace(block.mlp, shared=shared) if isinstance(block.mlp, MoE) else shared
        return replace(block, mlp=mlp)

    def shared_mlp(self, read: LayerReader, name: str) -> GatedMLP | None:
        """Read the shared feed-forward; None: the model has none."""
        hidden, inner = self.config.hidden_size, int(self.config.values["shared_intermediate_size"])
        if not inner:
            return None
        if read.form.has_separate_experts:
            return self.gated_mlp(read, name, inner)
        return GatedMLP(
            gate_up=read.linear(f"{name}.input_linear", rows=(2 * inner,), columns=hidden),
            down=read.linear(f"{name}.output_linear", rows=(hidden,), columns=inner),
            activation=self.activation(),
        )


class GraniteMoeHybrid(GraniteMoeShared):
    """Granite 4 decoder of which every layer is attention."""

    defaults = {
        **GraniteMoeShared.defaults,
        "position_embedding_type": None,
        "shared_intermediate_size": 1024,
    }
    names = {"layer_types": ("layers_block_type",)}
    reads = GraniteMoeShared.reads | {"layer_types"}

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """Create the model; raise `UnsupportedModel` for state layers and other settings."""
        kinds = config.values.get("layer_types") or ["linear_attention"]
        for kind in kinds:
            if kind not in ("attention", "full_attention"):
                raise UnsupportedModel(
                    f"config.json: layer_types has {kind!r}: layers with a state (Mamba) are not "
                    f"supported; Granite 4 models whose name has no h (micro, 1b, 350m) have none"
                )
        super().__init__(config, dtype)

    def layer_type(self, layer: int) -> str:
        """Every layer attends to its whole context."""
        return "full_attention"

    def mlp(self, read: LayerReader, layer: int, name: str) -> FeedForward:
        """Read a router and experts, or in the dense sizes the shared feed-forward alone."""
        if int(self.config.values["num_local_experts"]):
            return super().mlp(read, layer, name)
        shared = self.shared_mlp(read, f"{name.rpartition('.')[0]}.shared_mlp")
        assert shared is not None
        return shared

    def block(self, read: LayerReader, layer: int, name: str) -> Block:
        """Read a layer with experts and a shared feed-forward, or with the latter alone."""
        if int(self.config.values["num_local_experts"]):
            return super().block(read, layer, name)
        return Granite.block(self, read, layer, name)

    def attention(self, read: LayerReader, layer: int, name: str) -> Attention:
        """Read attention; without position_embedding_type rope it has no rotary embedding."""
        attention = super().attention(read, layer, name)
        has_rope = self.config.values["position_embedding_type"] == "rope"
        return attention if has_rope else replace(attention, rope=None)

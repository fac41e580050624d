"""The attention function that transformers' modules call when PortaLM runs them.

transformers looks attention functions up by name. Under `ATTENTION` its modules create no mask, and
the step, which is passed through the modules as a keyword argument, computes attention over its own
KV cache. `CHECKED_ATTENTION` is the same with the masks that transformers' eager attention would
use: each is compared with the mask that the step implies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from portalm.backend import KV, AttentionSpec, Backend, StepMeta
from portalm.errors import UnsupportedModel

ATTENTION = "portalm"
CHECKED_ATTENTION = "portalm_checked"

STEP = "portalm_step"
"""Keyword argument that passes the step to the attention function."""

_SUPPORTED = frozenset({"scaling", "sliding_window", "softcap", "s_aux", "is_causal"})
_HARMLESS = frozenset(
    {"dropout", "position_ids", "use_cache", "cache_position", "output_attentions",
     "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"}
)  # fmt: skip
"""Keyword arguments of attention functions that do not change the result here."""


class Step(Protocol):
    """Computes the attention of one step."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the layer's new keys and values, and attend: [T, H, D] -> [T, H, D]."""
        ...


@dataclass(slots=True)
class RecordingStep:
    """Records the attention of every layer and computes nothing."""

    specs: dict[int, AttentionSpec] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Record `spec`; raise `UnsupportedModel` if the layer has one already."""
        if layer in self.specs:
            raise UnsupportedModel(f"layer {layer} calls attention twice")
        self.specs[layer] = spec
        return query


@dataclass(slots=True)
class BackendStep:
    """Runs a step's attention on the backend."""

    backend: Backend
    kv: KV
    meta: StepMeta

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write keys and values to the KV cache, and attend over it."""
        self.kv = self.backend.kv_write(self.kv, layer, key, value, self.meta)
        return self.backend.attend(self.kv, layer, query, self.meta, spec, sinks)


def register() -> None:
    """Add both attention functions, and the masks of the checked one, to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionInterface.register(CHECKED_ATTENTION, _checked_attention)
    AttentionMaskInterface.register(CHECKED_ATTENTION, _whole_mask)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention that transformers calls: [1, H, T, D], 2 x [1, H_kv, T, D] -> [1, T, H, D]."""
    step: Step | None = options.pop(STEP, None)
    if step is None:
        raise UnsupportedModel("it does not pass keyword arguments to its attention")
    unsupported = [
        k for k, v in options.items() if v is not None and k not in _SUPPORTED | _HARMLESS
    ]
    if unsupported or attention_mask is not None:
        what = ", ".join(unsupported) or "a mask of its own"
        raise UnsupportedModel(f"its attention uses {what}, which is not supported")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedModel("its attention is not causal")
    if value.shape != key.shape:
        raise UnsupportedModel("its values and keys have different sizes")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModel("its attention modules have no layer_idx")
    sinks, scale = options.get("s_aux"), options.get("scaling")
    spec = AttentionSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_size=query.shape[3],
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        sliding_window=options.get("sliding_window"),
        soft_cap=options.get("softcap"),
        has_sinks=sinks is not None,
    )
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, H, D]
    out = step.attend(int(layer), q, k, v, spec, None if sinks is None else sinks.float())
    return out[None], None


def _checked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`_attention` of one prompt; refuses a mask that is not causal within the layer's window."""
    layer = getattr(module, "layer_idx", None)
    if attention_mask is None:
        raise UnsupportedModel(f"layer {layer} attends without a causal mask")
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position  # [T, T]
    visible, window = distance >= 0, options.get("sliding_window")
    if window is not None:
        visible &= distance < window
    if attention_mask.shape[-2:] != visible.shape or not torch.equal(
        attention_mask, visible.expand_as(attention_mask)
    ):
        inside = "" if window is None else f" within its window of {window} tokens"
        raise UnsupportedModel(f"the mask of layer {layer} is not causal{inside}")
    return _attention(module, query, key, value, None, **options)


def _whole_mask(**options: Any) -> torch.Tensor | None:
    """The mask that transformers computes, bool [1, 1, T, T], also where it could be left out."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(
        **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )

"""The text part of models that also read images: its config, and the names of its tensors.

The text part is a decoder family of this package. Images are not read: the model is served as a
text model, and the tensors of its other parts are not loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from portalm.errors import UnsupportedModel

MULTIMODAL = frozenset(
    {
        "Gemma3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    }
)
"""Architectures whose text part can be loaded."""

_DECODERS = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
"""The text part's model_type -> architecture. Rotary positions in three axes (Qwen) are equal for
text, which makes them ordinary ones."""

_OF_THE_WHOLE = (
    "bos_token_id", "dtype", "eos_token_id", "quantization_config", "tie_word_embeddings",
    "torch_dtype",
)  # fmt: skip
"""Keys that count for the text part also where only the whole model's config has them."""

OTHER_PARTS = (
    r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector)\.",
    r"^model\.image_newline$",
)
"""Regular expressions of tensor names of the other parts."""


def text_values(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Build the config.json of the text part; None if the architecture has no other part.

    Defaults are those of transformers: published configs of these models rely on them.

    Raises:
        UnsupportedModel: transformers has no such config, or the text part is no decoder family.
    """
    architecture = str((values.get("architectures") or [""])[0])
    if architecture not in MULTIMODAL:
        return None
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"config.json: transformers, which completes the config of {architecture}, has no "
            f"model_type {kind!r}"
        )
    whole = {k: v for k, v in values.items() if k != "model_type"}
    text = CONFIG_MAPPING[kind](**whole).get_text_config().to_dict()
    decoder = _DECODERS.get(text["model_type"])
    if decoder is None:
        raise UnsupportedModel(
            f"config.json: the text part of {architecture} has model_type {text['model_type']!r}, "
            f"which is not supported; supported: {', '.join(_DECODERS)}"
        )
    inherited = {k: values[k] for k in _OF_THE_WHOLE if values.get(k) is not None}
    return {**text, **inherited, "architectures": [decoder]}


def text_name(name: str, names: Collection[str]) -> str:
    """Find tensor `name` of the decoder among the `names` of the whole model; `name` if absent."""
    found = (
        name,
        f"language_model.{name}",
        name.replace("model.", "model.language_model.", 1),
    )
    return next((n for n in found if n in names), name)

"""Model classes by the architecture name in a checkpoint's config.json."""

from __future__ import annotations

import importlib

from portalm.models.model import Model

ARCHITECTURES = {
    "ArceeForCausalLM": "portalm.models.arcee:Arcee",
    "BertForSequenceClassification": "portalm.models.bert:BertClassifier",
    "BertModel": "portalm.models.bert:Bert",
    "Cohere2ForCausalLM": "portalm.models.cohere:Cohere2",
    "CohereForCausalLM": "portalm.models.cohere:Cohere",
    "DeepseekV2ForCausalLM": "portalm.models.deepseek:DeepseekV2",
    "DeepseekV3ForCausalLM": "portalm.models.deepseek:DeepseekV3",
    "Exaone4ForCausalLM": "portalm.models.exaone4:Exaone4",
    "FalconForCausalLM": "portalm.models.falcon:Falcon",
    "Gemma2ForCausalLM": "portalm.models.gemma:Gemma2",
    "Gemma3ForCausalLM": "portalm.models.gemma:Gemma3",
    "GemmaForCausalLM": "portalm.models.gemma:Gemma",
    "Glm4ForCausalLM": "portalm.models.glm:Glm4",
    "GlmForCausalLM": "portalm.models.glm:Glm",
    "GPT2LMHeadModel": "portalm.models.gpt2:GPT2",
    "GPTNeoXForCausalLM": "portalm.models.gpt_neox:GPTNeoX",
    "GptOssForCausalLM": "portalm.models.gpt_oss:GptOss",
    "GraniteForCausalLM": "portalm.models.granite:Granite",
    "LlamaForCausalLM": "portalm.models.llama:Llama",
    "MistralForCausalLM": "portalm.models.mistral:Mistral",
    "MixtralForCausalLM": "portalm.models.mixtral:Mixtral",
    "ModernBertForSequenceClassification": "portalm.models.modernbert:ModernBertClassifier",
    "ModernBertModel": "portalm.models.modernbert:ModernBert",
    "Olmo2ForCausalLM": "portalm.models.olmo2:Olmo2",
    "Phi3ForCausalLM": "portalm.models.phi3:Phi3",
    "Qwen2ForCausalLM": "portalm.models.qwen:Qwen2",
    "Qwen2MoeForCausalLM": "portalm.models.qwen_moe:Qwen2Moe",
    "Qwen3ForCausalLM": "portalm.models.qwen:Qwen3",
    "Qwen3MoeForCausalLM": "portalm.models.qwen_moe:Qwen3Moe",
    "RobertaForSequenceClassification": "portalm.models.bert:RobertaClassifier",
    "RobertaModel": "portalm.models.bert:Bert",
    "RWForCausalLM": "portalm.models.falcon:Falcon",
    "SmolLM3ForCausalLM": "portalm.models.smollm3:SmolLM3",
    "Starcoder2ForCausalLM": "portalm.models.starcoder2:Starcoder2",
    "XLMRobertaForSequenceClassification": "portalm.models.bert:RobertaClassifier",
    "XLMRobertaModel": "portalm.models.bert:Bert",
}
"""Architecture name -> "module:class"."""


def has_head(architecture: str) -> bool:
    """False for a registered decoder without its output head, for example Qwen3Model."""
    headed = architecture.removesuffix("Model") + "ForCausalLM"
    return architecture in ARCHITECTURES or headed not in ARCHITECTURES


def model_class(architecture: str) -> type[Model]:
    """Find the class that runs `architecture`; an unregistered one runs through transformers' code.

    A decoder without its output head is run by its family's class.
    """
    if not has_head(architecture):
        architecture = architecture.removesuffix("Model") + "ForCausalLM"
    target = ARCHITECTURES.get(architecture, "portalm.models.transformers_model:TransformersModel")
    module, _, name = target.partition(":")
    found: type[Model] = getattr(importlib.import_module(module), name)
    return found

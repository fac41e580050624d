"""Model classes by the architecture name in a checkpoint's config.json."""

from __future__ import annotations

import importlib

from portalm.errors import UnsupportedModel
from portalm.models.model import Model

ARCHITECTURES = {
    "ApertusForCausalLM": "portalm.models.apertus:Apertus",
    "ArceeForCausalLM": "portalm.models.arcee:Arcee",
    "BaichuanForCausalLM": "portalm.models.baichuan:Baichuan",
    "BaiChuanForCausalLM": "portalm.models.baichuan:Baichuan",
    "BertForSequenceClassification": "portalm.models.bert:BertClassifier",
    "BertModel": "portalm.models.bert:Bert",
    "ChatGLMForConditionalGeneration": "portalm.models.glm:ChatGLM",
    "ChatGLMModel": "portalm.models.glm:ChatGLM",
    "Cohere2ForCausalLM": "portalm.models.cohere:Cohere2",
    "CohereForCausalLM": "portalm.models.cohere:Cohere",
    "DeciLMForCausalLM": "portalm.models.decilm:DeciLM",
    "DeepseekV2ForCausalLM": "portalm.models.deepseek:DeepseekV2",
    "DeepseekV3ForCausalLM": "portalm.models.deepseek:DeepseekV3",
    "Ernie4_5_MoeForCausalLM": "portalm.models.ernie:Ernie45Moe",
    "Ernie4_5ForCausalLM": "portalm.models.ernie:Ernie45",
    "Exaone4ForCausalLM": "portalm.models.exaone4:Exaone4",
    "FalconForCausalLM": "portalm.models.falcon:Falcon",
    "Gemma2ForCausalLM": "portalm.models.gemma:Gemma2",
    "Gemma3ForCausalLM": "portalm.models.gemma:Gemma3",
    "GemmaForCausalLM": "portalm.models.gemma:Gemma",
    "Glm4ForCausalLM": "portalm.models.glm:Glm4",
    "Glm4MoeForCausalLM": "portalm.models.glm_moe:Glm4Moe",
    "GlmForCausalLM": "portalm.models.glm:Glm",
    "GPT2LMHeadModel": "portalm.models.gpt2:GPT2",
    "GPTNeoXForCausalLM": "portalm.models.gpt_neox:GPTNeoX",
    "GptOssForCausalLM": "portalm.models.gpt_oss:GptOss",
    "GraniteForCausalLM": "portalm.models.granite:Granite",
    "GraniteMoeForCausalLM": "portalm.models.granite_moe:GraniteMoe",
    "GraniteMoeHybridForCausalLM": "portalm.models.granite_moe:GraniteMoeHybrid",
    "GraniteMoeSharedForCausalLM": "portalm.models.granite_moe:GraniteMoeShared",
    "HunYuanDenseV1ForCausalLM": "portalm.models.hunyuan:HunyuanDense",
    "InternLM2ForCausalLM": "portalm.models.internlm:InternLM2",
    "InternLM3ForCausalLM": "portalm.models.internlm:InternLM3",
    "LlamaForCausalLM": "portalm.models.llama:Llama",
    "MiMoForCausalLM": "portalm.models.qwen:MiMo",
    "MiniCPM3ForCausalLM": "portalm.models.minicpm:MiniCPM3",
    "MiniCPMForCausalLM": "portalm.models.minicpm:MiniCPM",
    "MiniMaxM2ForCausalLM": "portalm.models.minimax:MiniMaxM2",
    "Ministral3ForCausalLM": "portalm.models.ministral3:Ministral3",
    "MistralForCausalLM": "portalm.models.mistral:Mistral",
    "MixtralForCausalLM": "portalm.models.mixtral:Mixtral",
    "ModernBertForSequenceClassification": "portalm.models.modernbert:ModernBertClassifier",
    "ModernBertModel": "portalm.models.modernbert:ModernBert",
    "NemotronForCausalLM": "portalm.models.nemotron:Nemotron",
    "Olmo2ForCausalLM": "portalm.models.olmo2:Olmo2",
    "Olmo3ForCausalLM": "portalm.models.olmo3:Olmo3",
    "OlmoeForCausalLM": "portalm.models.olmoe:Olmoe",
    "Phi3ForCausalLM": "portalm.models.phi3:Phi3",
    "PhiForCausalLM": "portalm.models.phi:Phi",
    "PhiMoEForCausalLM": "portalm.models.phimoe:PhiMoe",
    "PhimoeForCausalLM": "portalm.models.phimoe:PhiMoe",
    "Qwen2ForCausalLM": "portalm.models.qwen:Qwen2",
    "Qwen2MoeForCausalLM": "portalm.models.qwen_moe:Qwen2Moe",
    "Qwen3ForCausalLM": "portalm.models.qwen:Qwen3",
    "Qwen3MoeForCausalLM": "portalm.models.qwen_moe:Qwen3Moe",
    "RobertaForSequenceClassification": "portalm.models.bert:RobertaClassifier",
    "RobertaModel": "portalm.models.bert:Bert",
    "RWForCausalLM": "portalm.models.falcon:Falcon",
    "SeedOssForCausalLM": "portalm.models.seed_oss:SeedOss",
    "SmolLM3ForCausalLM": "portalm.models.smollm3:SmolLM3",
    "StableLMEpochForCausalLM": "portalm.models.stablelm:StableLm",
    "StableLmForCausalLM": "portalm.models.stablelm:StableLm",
    "Starcoder2ForCausalLM": "portalm.models.starcoder2:Starcoder2",
    "XLMRobertaForSequenceClassification": "portalm.models.bert:RobertaClassifier",
    "XLMRobertaModel": "portalm.models.bert:Bert",
}
"""Architecture name -> "module:class"."""

_STATE = "it has layers with a recurrent or convolutional state, which the cache does not hold"
_SIZES = "its layers have caches of different sizes, or share one"
_SPARSE = "its attention reads only the tokens that an index chooses"

REFUSED = {
    "BailingHybridForCausalLM": _STATE,
    "BambaForCausalLM": _STATE,
    "DeepseekV32ForCausalLM": _SPARSE,
    "FalconH1ForCausalLM": _STATE,
    "FalconMambaForCausalLM": _STATE,
    "Gemma3nForCausalLM": _SIZES,
    "Gemma3nForConditionalGeneration": _SIZES,
    "Gemma4ForCausalLM": _SIZES,
    "Gemma4ForConditionalGeneration": _SIZES,
    "Gemma4UnifiedForCausalLM": _SIZES,
    "Gemma4UnifiedForConditionalGeneration": _SIZES,
    "GlmMoeDsaForCausalLM": _SPARSE,
    "GraniteMoeHybridForCausalLM": _STATE,
    "JambaForCausalLM": _STATE,
    "KimiLinearForCausalLM": _STATE,
    "Lfm2ForCausalLM": _STATE,
    "Lfm2MoeForCausalLM": _STATE,
    "Lfm2VlForConditionalGeneration": _STATE,
    "Lfm3ForCausalLM": _STATE,
    "Mamba2ForCausalLM": _STATE,
    "MambaForCausalLM": _STATE,
    "MiniMaxForCausalLM": _STATE,
    "MiniMaxText01ForCausalLM": _STATE,
    "NemotronHForCausalLM": _STATE,
    "OlmoHybridForCausalLM": _STATE,
    "Phi4FlashForCausalLM": _STATE,
    "Qwen3NextForCausalLM": _STATE,
    "Qwen3_5ForCausalLM": _STATE,
    "Qwen3_5ForConditionalGeneration": _STATE,
    "Qwen3_5MoeForCausalLM": _STATE,
    "Qwen3_5MoeForConditionalGeneration": _STATE,
    "RecurrentGemmaForCausalLM": _STATE,
    "RwkvForCausalLM": _STATE,
    "xLSTMForCausalLM": _STATE,
    "Zamba2ForCausalLM": _STATE,
    "ZambaForCausalLM": _STATE,
}
"""Architectures that are known not to run, with the reason."""


def has_head(architecture: str) -> bool:
    """False for a registered decoder without its output head, for example Qwen3Model."""
    headed = architecture.removesuffix("Model") + "ForCausalLM"
    return architecture in ARCHITECTURES or headed not in ARCHITECTURES


def model_class(architecture: str) -> type[Model]:
    """Find the class that runs `architecture`; an unregistered one runs through transformers' code.

    A decoder without its output head is run by its family's class.

    Raises:
        UnsupportedModel: it is in `REFUSED`.
    """
    if architecture in REFUSED and architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"architecture {architecture!r} is not supported: {REFUSED[architecture]}"
        )
    if not has_head(architecture):
        architecture = architecture.removesuffix("Model") + "ForCausalLM"
    target = ARCHITECTURES.get(architecture, "portalm.models.transformers_model:TransformersModel")
    module, _, name = target.partition(":")
    found: type[Model] = getattr(importlib.import_module(module), name)
    return found

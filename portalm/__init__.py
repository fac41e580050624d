"""PortaLM: LLM inference and serving that runs fast on any accelerator.

The names below are imported on first use, so that `import portalm` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portalm.beam_search_params import BeamSearchParams as BeamSearchParams
    from portalm.llm import LLM as LLM
    from portalm.outputs import BeamSearchOutput as BeamSearchOutput
    from portalm.outputs import CompletionOutput as CompletionOutput
    from portalm.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from portalm.outputs import RequestOutput as RequestOutput
    from portalm.outputs import ScoringRequestOutput as ScoringRequestOutput
    from portalm.pooling_params import PoolingParams as PoolingParams
    from portalm.prompts import TextPrompt as TextPrompt
    from portalm.prompts import TokensPrompt as TokensPrompt
    from portalm.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "portalm.llm",
    "BeamSearchOutput": "portalm.outputs",
    "BeamSearchParams": "portalm.beam_search_params",
    "SamplingParams": "portalm.sampling_params",
    "RequestOutput": "portalm.outputs",
    "CompletionOutput": "portalm.outputs",
    "PoolingParams": "portalm.pooling_params",
    "EmbeddingRequestOutput": "portalm.outputs",
    "ScoringRequestOutput": "portalm.outputs",
    "TextPrompt": "portalm.prompts",
    "TokensPrompt": "portalm.prompts",
}

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'portalm' has no attribute {name!r}")

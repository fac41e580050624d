"""Model families by the architecture names in a checkpoint's config.json."""

from __future__ import annotations

import importlib

from portalm.errors import UnsupportedModel
from portalm.models.model import Model

ARCHITECTURES = {
    "BertForSequenceClassification": "portalm.models.bert:BertClassifier",
    "BertModel": "portalm.models.bert:Bert",
    "LlamaForCausalLM": "portalm.models.llama:Llama",
    "RobertaForSequenceClassification": "portalm.models.bert:RobertaClassifier",
    "RobertaModel": "portalm.models.bert:Bert",
    "XLMRobertaForSequenceClassification": "portalm.models.bert:RobertaClassifier",
    "XLMRobertaModel": "portalm.models.bert:Bert",
}
"""Architecture name -> module:class."""


def model_class(architecture: str) -> type[Model]:
    """The class that runs `architecture`. Raises `UnsupportedModel`, naming those that run."""
    home = ARCHITECTURES.get(architecture)
    if home is None:
        raise UnsupportedModel(
            f"architecture {architecture!r} is not supported; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    module, _, name = home.partition(":")
    found: type[Model] = getattr(importlib.import_module(module), name)
    return found

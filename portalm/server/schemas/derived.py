"""Request fields derived from SamplingParams, so that a sampling parameter is declared once.

A body inherits `derived_fields()`, and redeclares only fields whose form over HTTP is narrower
(limits on lists, null for the default) or that its API defines differently.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from portalm.sampling_params import SamplingParams

SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))


def derived_fields(*names: str) -> Any:
    """A pydantic model with fields of SamplingParams: the same names, types and defaults.

    Args:
        names: the fields to take; none: all.
    """
    types = get_type_hints(SamplingParams)
    definitions: dict[str, Any] = {}
    for field in fields(SamplingParams):
        if names and field.name not in names:
            continue
        if field.default_factory is MISSING:
            default = Field(field.default)
        else:
            default = Field(default_factory=field.default_factory)
        definitions[field.name] = (types[field.name], default)
    return create_model("DerivedFields", __config__=ConfigDict(extra="forbid"), **definitions)


def sampling_values(body: BaseModel) -> dict[str, Any]:
    """Sampling parameters in `body` by name, without those that are null (the default)."""
    values = {
        name: getattr(body, name) for name in SAMPLING_FIELDS if name in type(body).model_fields
    }
    return {name: value for name, value in values.items() if value is not None}

"""Request fields derived from SamplingParams, so that a sampling parameter is declared once.

A body inherits `derived_fields()`, and redeclares only fields whose form over HTTP is narrower
(limits on lists, null for the default) or that its API defines differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from portalm.sampling_params import SamplingParams

NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})
"""For a model without defaults of its own."""

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


def sampling_values(body: BaseModel, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters by name: those that `body` sets, then the model's `defaults`.

    A field that is null is not set.
    """
    given = {name: getattr(body, name) for name in SAMPLING_FIELDS if name in body.model_fields_set}
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}

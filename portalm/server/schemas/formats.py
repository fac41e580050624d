"""OpenAI's `response_format`: constraints on the form of an answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from portalm.errors import InvalidRequest
from portalm.sampling_params import StructuredOutputs


class JsonSchemaFormat(BaseModel):
    """The `json_schema` field of a response_format."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    """Constraint on an answer in OpenAI's form."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchemaFormat | None = None

    def structured_outputs(self) -> StructuredOutputs | None:
        """The same constraint as StructuredOutputs; None: any text. Raises `InvalidRequest`."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise InvalidRequest(
                "response_format must have json_schema if its type is json_schema, and only then",
                param="response_format",
            )
        if self.json_schema is None:
            return None if self.type == "text" else StructuredOutputs(json_object=True)
        return StructuredOutputs(
            json=self.json_schema.schema_ or {},
            additional_properties=self.json_schema.strict is False,
        )

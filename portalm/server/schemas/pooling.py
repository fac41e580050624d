"""Bodies of /v1/embeddings, /score and /rerank. Unknown fields are refused by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from portalm.config import PoolingName
from portalm.errors import InvalidRequest
from portalm.pooling_params import PoolingParams

MAX_INPUTS = 2048
"""Maximum number of texts in one request, as in OpenAI's API."""


class PoolingFields(BaseModel):
    """Fields of every pooling endpoint."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    request_id: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None
    user: str | None = None  # part of OpenAI's API, without effect here


class EmbeddingRequest(PoolingFields):
    """POST /v1/embeddings."""

    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    pooling: PoolingName | None = None

    def params(self) -> PoolingParams:
        """Pooling parameters of each input. Raises `InvalidRequest`."""
        return PoolingParams(
            pooling=self.pooling,
            normalize=self.normalize,
            dimensions=self.dimensions,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
        )

    def inputs(self) -> list[str | list[int]]:
        """The inputs as a list, whichever form was sent. Raises `InvalidRequest`."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [self.input]
        return counted("input", list(self.input))


class ScoreRequest(PoolingFields):
    """POST /score: text_1 and text_2 as in vLLM, or queries and documents as in newer versions."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None

    def texts(self) -> tuple[str | list[str], str | list[str], tuple[str, str]]:
        """First texts, second texts, and the fields that hold them. Raises `InvalidRequest`."""
        names = ("text_1", "text_2", "queries", "documents")
        given = [name for name in names if getattr(self, name) is not None]
        if given not in (["text_1", "text_2"], ["queries", "documents"]):
            raise InvalidRequest(
                "send either text_1 and text_2, or queries and documents", param="text_1"
            )
        first, second = (getattr(self, name) for name in given)
        return first, second, (given[0], given[1])


class Document(BaseModel):
    """A document in object form."""

    model_config = ConfigDict(extra="forbid")

    text: str


class RerankRequest(PoolingFields):
    """POST /rerank, as Jina's and Cohere's clients send it."""

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool = True

    def texts(self) -> list[str]:
        """Texts of the documents. Raises `InvalidRequest`."""
        texts = [one if isinstance(one, str) else one.text for one in self.documents]
        return counted("documents", texts)

    def limit(self) -> int | None:
        """Maximum number of documents to return; None: all. Raises `InvalidRequest`."""
        if self.top_n is not None and self.top_n < 1:
            raise InvalidRequest(f"top_n must be at least 1, not {self.top_n}", param="top_n")
        return self.top_n


def counted(name: str, texts: list[Any]) -> list[Any]:
    """`texts`; raises `InvalidRequest` if it has no items or more than MAX_INPUTS."""
    if not 0 < len(texts) <= MAX_INPUTS:
        raise InvalidRequest(
            f"{name} must have 1 to {MAX_INPUTS} texts, not {len(texts)}", param=name
        )
    return texts

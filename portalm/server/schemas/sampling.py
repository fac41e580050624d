"""Fields of every endpoint that generates text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from portalm.beam_search_params import BeamSearchParams
from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams, StructuredOutputs
from portalm.server.schemas.common import MAX_PROMPT, StopText, TokenIds
from portalm.server.schemas.derived import derived_fields, sampling_values
from portalm.server.schemas.formats import ResponseFormat

_WITH_BEAMS = {
    "add_generation_prompt", "best_of", "cache_salt", "chat_template", "chat_template_kwargs",
    "continue_final_message", "detokenize", "early_stopping", "ignore_eos", "length_penalty",
    "max_completion_tokens", "max_tokens", "messages", "metadata", "model", "n", "priority",
    "prompt", "request_id", "return_token_ids", "seed", "service_tier", "skip_special_tokens",
    "spaces_between_special_tokens", "store", "temperature", "truncate_prompt_tokens",
    "use_beam_search", "user",
}  # fmt: skip
"""Fields that may be used together with beam search."""


class StreamOptions(BaseModel):
    """Optional usage reports in a stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False


if TYPE_CHECKING:

    class _DerivedFields(BaseModel):
        """Derived fields that code reads by name, for the type checker."""

        n: int
        logprobs: Any
        prompt_logprobs: int | None
        ignore_eos: bool

else:
    _DerivedFields = derived_fields()


class SamplingFields(_DerivedFields):
    """Fields of every generating endpoint: SamplingParams' and those of the request."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    request_id: str | None = None
    priority: int = 0
    cache_salt: str | None = None

    # narrower than in SamplingParams: lists have limits, null means the default
    temperature: float | None = None
    top_p: float | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=64)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] = Field(default_factory=list)
    max_tokens: int | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(max_length=1 << 18)] | None = None
    bad_words: Annotated[list[StopText], Field(fail_fast=True, max_length=256)] = Field(
        default_factory=list
    )
    logits_processors: Annotated[dict[str, Any], Field(max_length=16)] = Field(default_factory=dict)

    # constraints on the answer: at most one of response_format, structured_outputs and guided_...
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    # part of OpenAI's API, without effect here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def sampling_params(self, defaults: Mapping[str, Any], **replaced: Any) -> SamplingParams:
        """The sampling parameters of the request.

        Args:
            defaults: the model's own values of parameters that the request does not set.
            **replaced: values that replace fields of the same name, where the endpoint defines
                those differently.

        Raises:
            InvalidRequest: a value is out of range, or values contradict each other.
        """
        values = {
            **sampling_values(self, defaults),
            "structured_outputs": self._structured_outputs(),
        }
        return SamplingParams(**{**values, **replaced})

    def beams(self, beam_width: int, max_tokens: int | None) -> BeamSearchParams | None:
        """Parameters of beam search; None if answers are sampled instead.

        Args:
            beam_width: number of beams.
            max_tokens: maximum length of an answer; None: up to the model's context length.

        Raises:
            InvalidRequest: a field has no effect with beam search, or a value is invalid.
        """
        given = {
            name
            for name in self.model_fields_set
            if getattr(self, name) != type(self).model_fields[name].default
        }
        if not self.use_beam_search:
            for name in given & {"length_penalty", "early_stopping"}:
                raise InvalidRequest(f"{name} needs use_beam_search: true", param=name)
            return None
        for name in sorted(given - _WITH_BEAMS):
            raise InvalidRequest(f"{name} cannot be combined with use_beam_search", param=name)
        if self.temperature not in (None, 0.0, 1.0):
            raise InvalidRequest(
                "temperature cannot be combined with use_beam_search: tokens are not sampled",
                param="temperature",
            )
        return BeamSearchParams(
            beam_width=beam_width,
            max_tokens=MAX_PROMPT if max_tokens is None else max_tokens,
            ignore_eos=self.ignore_eos,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
        )

    def _structured_outputs(self) -> StructuredOutputs | dict[str, Any] | None:
        guided = {
            name: value
            for name in ("json", "regex", "choice", "grammar", "whitespace_pattern")
            if (value := getattr(self, f"guided_{name}")) is not None
        }
        form = None if self.response_format is None else self.response_format.structured_outputs()
        given = [one for one in (form, self.structured_outputs, guided or None) if one is not None]
        if len(given) > 1:
            raise InvalidRequest(
                "response_format, structured_outputs and guided_... exclude each other: send one",
                param="structured_outputs",
            )
        return given[0] if given else None

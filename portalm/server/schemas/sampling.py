"""Fields of every endpoint that generates text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from portalm.beam_search_params import BeamSearchParams
from portalm.errors import InvalidRequest
from portalm.sampling_params import SamplingParams, StructuredOutputs
from portalm.server.schemas.common import MAX_PROMPT, StopText, TokenIds
from portalm.server.schemas.formats import ResponseFormat

_WITH_BEAMS = {
    "add_generation_prompt", "best_of", "cache_salt", "chat_template", "chat_template_kwargs",
    "continue_final_message", "detokenize", "early_stopping", "ignore_eos", "length_penalty",
    "max_completion_tokens", "max_tokens", "messages", "metadata", "model", "n", "priority",
    "prompt", "request_id", "return_token_ids", "seed", "service_tier", "skip_special_tokens",
    "spaces_between_special_tokens", "store", "temperature", "truncate_prompt_tokens",
    "use_beam_search", "user",
}  # fmt: skip
"""What may be asked of answers that are searched for."""


class StreamOptions(BaseModel):
    """What a stream reports beside its text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(BaseModel):
    """What every endpoint that generates takes: SamplingParams' fields, and whose they are."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    request_id: str | None = None
    priority: int = 0
    cache_salt: str | None = None

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=64)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] = Field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(max_length=1 << 18)] | None = None
    bad_words: Annotated[list[StopText], Field(fail_fast=True, max_length=256)] = Field(
        default_factory=list
    )

    logits_processors: Annotated[dict[str, Any], Field(max_length=16)] = Field(default_factory=dict)

    # what an answer must look like: at most one of these
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

    # of OpenAI's API; they change no answer here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def sampling_params(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        n: int | None = None,
    ) -> SamplingParams:
        """The parameters; raises `InvalidRequest` for values that cannot work.

        Args:
            max_tokens: as the endpoint spells it.
            logprobs: as the endpoint spells it.
            prompt_logprobs: instead of the field of that name.
            n: instead of the field of that name.
        """
        return SamplingParams(
            n=self.n if n is None else n,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
            detokenize=self.detokenize,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logit_bias=self.logit_bias or {},  # type: ignore[arg-type]  # keys become integers
            allowed_token_ids=None
            if self.allowed_token_ids is None
            else tuple(self.allowed_token_ids),
            bad_words=tuple(self.bad_words),
            logits_processors=self.logits_processors,
            structured_outputs=self._structured_outputs(),  # type: ignore[arg-type]  # a mapping may be
        )

    def beams(self, beam_width: int, max_tokens: int | None) -> BeamSearchParams | None:
        """How to search for the likeliest answers; None: they are drawn.

        Args:
            beam_width: as the endpoint spells it.
            max_tokens: as the endpoint spells it; None: as many as there is room for.

        Raises:
            InvalidRequest: for what a search would not look at, or cannot work.
        """
        given = {
            name
            for name in self.model_fields_set
            if getattr(self, name) != type(self).model_fields[name].default
        }
        if not self.use_beam_search:
            for name in given & {"length_penalty", "early_stopping"}:
                raise InvalidRequest(f"{name} goes with use_beam_search: true", param=name)
            return None
        for name in sorted(given - _WITH_BEAMS):
            raise InvalidRequest(f"{name} does not go with use_beam_search", param=name)
        if self.temperature not in (None, 0.0, 1.0):
            raise InvalidRequest(
                "temperature does not go with use_beam_search: nothing is drawn",
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
                "response_format, structured_outputs and guided_... exclude each other: give one",
                param="structured_outputs",
            )
        return given[0] if given else None

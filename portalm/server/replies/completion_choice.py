"""Choices of completions: the fields for the prompt and for the answer, whole or streamed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.outputs import CompletionOutput, Logprob
from portalm.sampling_params import SamplingParams
from portalm.server.replies.text_logprobs import TextLogprobs, prompt_logprobs_object
from portalm.server.schemas.completions import CompletionRequest
from portalm.text.tokenizer import Tokenizer

AnswerT = TypeVar("AnswerT", AnswerDelta, CompletionOutput)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceShape:
    """The fields of a choice, which depend on the request."""

    body: CompletionRequest
    params: SamplingParams
    """Sampling parameters of each prompt, as sent to the engine."""
    tokenizer: Tokenizer

    def prompt_part(
        self, one: ProcessedInput, prompt_logprobs: list[dict[int, Logprob] | None] | None
    ) -> dict[str, Any]:
        """Text and logprobs of an echoed prompt, and other requested fields about the prompt."""
        part: dict[str, Any] = {"text": "", "logprobs": None}
        if self.body.echo:
            part["text"] = self._echo(one)
            if self.body.logprobs is not None and prompt_logprobs is not None:
                shape = TextLogprobs(self.tokenizer, self.params, num_top=self.body.logprobs)
                part["logprobs"] = shape.of(one.prompt_token_ids, prompt_logprobs)
        if self.body.prompt_logprobs is not None:
            part["prompt_logprobs"] = prompt_logprobs_object(
                prompt_logprobs, self.body.prompt_logprobs
            )
        if self.body.return_token_ids:
            part["prompt_token_ids"] = one.prompt_token_ids
        return part

    def answer_part(
        self, answer: AnswerDelta | CompletionOutput, logprobs: TextLogprobs | None
    ) -> dict[str, Any]:
        """Fields for an answer or its next piece; `logprobs` belongs to that answer alone."""
        part: dict[str, Any] = {"text": answer.text, "logprobs": None}
        if logprobs is not None and answer.logprobs is not None:
            part["logprobs"] = logprobs.of(answer.token_ids, answer.logprobs)
        if self.body.return_token_ids:
            part["token_ids"] = answer.token_ids
        return {**part, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}

    def whole(
        self,
        one: ProcessedInput,
        prompt_logprobs: list[dict[int, Logprob] | None] | None,
        answer: CompletionOutput,
    ) -> dict[str, Any]:
        """A whole choice: the fields for the prompt and the answer combined."""
        before = self.prompt_part(one, prompt_logprobs)
        after = self.answer_part(answer, self.answer_logprobs(one))
        logprobs = after["logprobs"]
        if before["logprobs"] is not None:
            logprobs = {name: before["logprobs"][name] + logprobs[name] for name in logprobs}
        return {**before, **after, "text": before["text"] + after["text"], "logprobs": logprobs}

    def answer_logprobs(self, one: ProcessedInput) -> TextLogprobs | None:
        """Formatter for the logprobs of an answer to `one`; None if they were not requested."""
        if self.body.logprobs is None:
            return None
        return TextLogprobs(
            self.tokenizer,
            self.params,
            num_top=self.body.logprobs,
            prompt_token_ids=one.prompt_token_ids,
            offset=len(self._echo(one)) if self.body.echo else 0,
        )

    def without_forced_token(self, answer: AnswerT) -> AnswerT:
        """`answer` without the token that the engine must sample even if max_tokens is 0."""
        if not self.body.scores_only:
            return answer
        return replace(
            answer,
            text="",
            token_ids=[],
            logprobs=None if answer.logprobs is None else [],
            finish_reason="length",
            stop_reason=None,
        )

    def _echo(self, one: ProcessedInput) -> str:
        """Text of the prompt: as it was sent, or decoded from its token ids."""
        if one.prompt is not None:
            return one.prompt
        return self.tokenizer.decode(
            one.prompt_token_ids,
            skip_special_tokens=self.params.skip_special_tokens,
            spaces_between_special_tokens=self.params.spaces_between_special_tokens,
        )

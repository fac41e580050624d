"""Turn an engine's tokens into text: detokenize, find stop strings, collect by request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from portalm.core.plan import TokenLogprobs
from portalm.core.request import FinishReason
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.messages import AddRequest, TokenOutput
from portalm.errors import InvalidRequest
from portalm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from portalm.sampling_params import SamplingParams
from portalm.text.detokenizer import Detokenizer
from portalm.text.stop_strings import StopMatch, StopStrings
from portalm.text.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class AnswerDelta:
    """What one step added to one answer (or several steps, for a slow reader)."""

    request_id: str
    """The caller's request id."""
    index: int
    """Index of the answer among the request's n."""
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """In the first delta of the first answer, if requested."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    is_refused: bool = False
    """True: the request itself is invalid and can never be answered."""
    metrics: RequestMetrics
    """Times of the request so far; updated in place until the request ends."""
    final: RequestOutput | None = None
    """In the last delta of a request: the request and all its answers."""

    @property
    def is_last(self) -> bool:
        """Whether all answers of the request have ended."""
        return self.final is not None

    def merge(self, later: AnswerDelta) -> None:
        """Append the next delta of the same answer to this one."""
        self.text += later.text
        self.token_ids = self.token_ids + later.token_ids
        if later.logprobs:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.error, self.is_refused, self.final = later.error, later.is_refused, later.final


@dataclass(slots=True)
class ProcessedOutputs:
    """Results of one step's outputs."""

    deltas: list[AnswerDelta] = field(default_factory=list)
    abort_ids: list[str] = field(default_factory=list)
    """Engine-side ids of answers that ended at a stop string: to be aborted in the engine."""


class OutputProcessor:
    """Open requests of one engine and their answers so far."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Start without requests. Without a tokenizer, answers have token ids and no text."""
        self._tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}
        self._answers: dict[str, _Answer] = {}

    def add(
        self, processed: ProcessedInput, params: SamplingParams, *, arrival_time: float
    ) -> None:
        """Expect the answers of a request.

        Args:
            processed: the checked request.
            params: sampling parameters from the caller.
            arrival_time: seconds since the epoch.

        Raises:
            InvalidRequest: the id of the request, or of one of its answers, is in use.
        """
        ids = [processed.request_id, *(message.request_id for message in processed.requests)]
        for request_id in ids:
            if request_id in self._requests or request_id in self._answers:
                raise InvalidRequest(
                    f"request id {request_id!r} is in use: use another id, or wait",
                    param="request_id",
                )
        request = _Request(processed, params, arrival_time)
        for index, message in enumerate(processed.requests):
            answer = _Answer(message.request_id, index, request, self._tokenizer)
            request.answers.append(answer)
            self._answers[message.request_id] = answer
        self._requests[processed.request_id] = request

    def process(self, outputs: Sequence[TokenOutput]) -> ProcessedOutputs:
        """Process a step's outputs; those of requests that have ended are ignored."""
        processed = ProcessedOutputs()
        now = time.monotonic()
        for output in outputs:
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue
            delta = answer.take(output, now)
            if delta is None:
                continue
            processed.deltas.append(delta)
            if delta.finish_reason is not None:
                del self._answers[output.request_id]
                if output.finish_reason is None:
                    processed.abort_ids.append(output.request_id)
        return processed

    def resumed(self, message: AddRequest) -> AddRequest:
        """Return a copy of `message` that continues after the tokens the answer has."""
        answer = self._answers[message.request_id]
        request, params = answer.request, message.params
        if params.prompt_logprobs is not None and request.prompt_logprobs is not None:
            if len(request.prompt_logprobs) == len(request.prompt_token_ids):
                params = replace(params, prompt_logprobs=None)  # complete
            else:
                del request.prompt_logprobs[1:]  # the engine sends all of them again
        tokens = [*answer.output.token_ids]
        return msgspec.structs.replace(
            message,
            params=params,
            output_token_ids=tokens,
            fork_of=None if tokens else message.fork_of,
        )

    def is_finished(self, request_id: str) -> bool:
        """Whether every answer of the request has ended; True if there is no such request."""
        request = self._requests.get(request_id)
        return request is None or request.num_open == 0

    def engine_ids(self, request_id: str) -> list[str]:
        """Engine-side ids of the request's answers that have not ended."""
        request = self._requests.get(request_id)
        answers = request.answers if request is not None else []
        return [a.engine_id for a in answers if a.output.finish_reason is None]

    def abort(self, request_id: str) -> list[str]:
        """End the open answers of a request; return their engine-side ids, to abort.

        Text that was held back as the possible start of a stop string becomes part of the answer.
        """
        request, now = self._requests.get(request_id), time.monotonic()
        ended = []
        for answer in request.answers if request is not None else []:
            if self._answers.pop(answer.engine_id, None) is not None:
                output = TokenOutput(
                    request_id=answer.engine_id, token_ids=[], finish_reason="abort"
                )
                answer.take(output, now)
                ended.append(answer.engine_id)
        return ended

    def snapshot(self, request_id: str) -> RequestOutput:
        """Return a copy of the request and its answers so far."""
        return self._requests[request_id].snapshot()

    def forget(self, request_id: str) -> None:
        """Remove a request; later outputs of it are ignored."""
        request = self._requests.pop(request_id, None)
        for answer in request.answers if request is not None else []:
            self._answers.pop(answer.engine_id, None)


class _Request:
    """A caller's request: the state that its answers share."""

    def __init__(
        self, processed: ProcessedInput, params: SamplingParams, arrival_time: float
    ) -> None:
        self.request_id = processed.request_id
        self.prompt = processed.prompt
        self.prompt_token_ids = processed.prompt_token_ids
        self.params = params
        self.answers: list[_Answer] = []
        self.num_open = params.n
        self.num_cached_tokens = 0
        self.pooled: bytes | None = None
        self.error: str | None = None
        self.metrics = RequestMetrics(arrival_time)
        self._epoch = arrival_time - time.monotonic()
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )

    def note_times(self, output: TokenOutput, now: float) -> None:
        """Record the times of an output; `now` is from time.monotonic(), as the engine's."""
        metrics = self.metrics
        if output.scheduled_time is not None:
            scheduled, first = self._epoch + output.scheduled_time, metrics.first_scheduled_time
            metrics.first_scheduled_time = scheduled if first is None else min(scheduled, first)
        if output.token_ids and metrics.first_token_time is None:
            metrics.first_token_time = self._epoch + now

    def end(self, now: float) -> None:
        """Record that the last answer ended at `now`."""
        self.metrics.finished_time = self._epoch + now

    def snapshot(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[answer.snapshot() for answer in self.answers],
            finished=self.num_open == 0,
            prompt_logprobs=None if self.prompt_logprobs is None else [*self.prompt_logprobs],
            metrics=replace(self.metrics),
            num_cached_tokens=self.num_cached_tokens,
            pooled=self.pooled,
            error=self.error,
        )


class _Answer:
    """One answer being generated."""

    def __init__(
        self, engine_id: str, index: int, request: _Request, tokenizer: Tokenizer | None
    ) -> None:
        params = request.params
        self._params = params
        self.engine_id = engine_id
        self.request = request
        self.output = CompletionOutput(index=index, text="", token_ids=[])
        if params.logprobs is not None:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = tokenizer.detokenizer(
                request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        self._stops: StopStrings | None = None
        if params.stop:
            self._stops = StopStrings(
                params.stop, include_stop_str_in_output=params.include_stop_str_in_output
            )

    def snapshot(self) -> CompletionOutput:
        """Return a copy of the answer so far, which later outputs do not change."""
        now = self.output
        logprobs = None if now.logprobs is None else [*now.logprobs]
        return replace(now, token_ids=[*now.token_ids], logprobs=logprobs)

    def take(self, output: TokenOutput, now: float) -> AnswerDelta | None:
        """Add `output` and return the delta for the caller; None if there is nothing to show."""
        request, answer = self.request, self.output
        request.pooled = output.pooled
        request.num_cached_tokens = max(request.num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs and request.prompt_logprobs is not None and answer.index == 0:
            request.prompt_logprobs.extend(self._logprob(e) for e in output.prompt_logprobs)
        request.note_times(output, now)
        if not output.token_ids and output.finish_reason is None:
            return None

        is_first = answer.index == 0 and not answer.token_ids
        text, num_tokens, stop = self._text(output)
        token_ids = output.token_ids[:num_tokens]
        answer.token_ids.extend(token_ids)
        answer.text += text
        if stop is not None:
            answer.finish_reason, answer.stop_reason = "stop", stop
        elif output.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason
        delta = AnswerDelta(
            request_id=request.request_id,
            index=answer.index,
            text=text,
            token_ids=token_ids,
            logprobs=self._take_logprobs(output, num_tokens),
            prompt_logprobs=request.prompt_logprobs if is_first else None,
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
            error=output.error,
            is_refused=output.is_refused,
            metrics=request.metrics,
        )
        if answer.finish_reason is not None:
            request.num_open -= 1
            request.error = request.error or output.error
            if request.num_open == 0:
                request.end(now)
                delta.final = request.snapshot()
        return delta

    def _text(self, output: TokenOutput) -> tuple[str, int, str | None]:
        """Return the new text to show, the number of tokens used, and the stop string if found.

        Tokens after the one that completes a stop string are dropped.
        """
        token_ids = output.token_ids
        if self._detokenizer is None:
            return "", len(token_ids), None
        # the token that ended the answer is hidden
        is_hidden = output.finish_reason == "stop" and not self._params.include_stop_str_in_output
        shown = token_ids[:-1] if is_hidden else token_ids
        text = ""
        for i, token_id in enumerate(shown, start=1):
            new, stop = self._search(self._detokenizer.feed(token_id), i)
            text += new
            if stop is not None:
                return text, i, stop
        if output.finish_reason is not None:
            new, stop = self._search(self._detokenizer.flush(), len(token_ids))
            text += new
            if stop is None and self._stops is not None:
                text += self._stops.flush()
            return text, len(token_ids), stop
        return text, len(token_ids), None

    def _search(self, text: str, num_new_tokens: int) -> StopMatch:
        """Search the text of the newest token for a stop string.

        Returns the text that cannot be part of one; stop strings do not count up to min_tokens.
        """
        if self._stops is None:
            return StopMatch(text, None)
        if len(self.output.token_ids) + num_new_tokens <= self._params.min_tokens:
            return StopMatch(self._stops.skip(text), None)
        return self._stops.push(text)

    def _take_logprobs(
        self, output: TokenOutput, num_tokens: int
    ) -> list[dict[int, Logprob]] | None:
        answer = self.output
        if answer.logprobs is None or answer.cumulative_logprob is None:
            return None
        entries = (output.logprobs or [])[:num_tokens]
        new = [self._logprob(entry) for entry in entries]
        answer.logprobs.extend(new)
        answer.cumulative_logprob += sum(entry.logprob for entry in entries)
        return new

    def _logprob(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """Convert one position: the sampled token first, then the most likely ones."""
        found = {entry.token_id: Logprob(entry.logprob, entry.rank, self._token(entry.token_id))}
        for rank, (token_id, logprob) in enumerate(entry.top, start=1):
            if token_id not in found:
                found[token_id] = Logprob(logprob, rank, self._token(token_id))
        return found

    def _token(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.id_to_text(token_id)

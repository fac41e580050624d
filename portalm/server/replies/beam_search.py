"""Answers found by beam search: each beam is continued by one request a token."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import Request

from portalm.beam_search_params import BeamSearchParams
from portalm.engine.beam_search import Beam, BeamSearch, top_tokens
from portalm.engine.input_processor import ProcessedInput
from portalm.engine.output_processor import AnswerDelta
from portalm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from portalm.sampling_params import SamplingParams
from portalm.server.observability.watch import RequestWatch
from portalm.server.replies.answers import Answers
from portalm.server.replies.presence import while_connected
from portalm.server.state import ServerState, failure


class _Search:
    """The search behind one prompt, watched as one request."""

    def __init__(
        self,
        state: ServerState,
        processed: ProcessedInput,
        params: SamplingParams,
        beams: BeamSearchParams,
    ) -> None:
        ready = state.client.ready
        assert ready is not None  # the prompt was checked against it
        self.processed = processed
        self.params = params
        room = ready.max_model_len - len(processed.prompt_token_ids)
        self.search = BeamSearch(beams, ready.eos_token_ids, room=room)
        self.watch = RequestWatch(state.metrics, state.observers, processed, params)
        self._arrival = time.time()

    async def next_inputs(self, state: ServerState) -> list[ProcessedInput]:
        """What to ask of each running beam."""
        first = self.processed.requests[0]
        prompt = self.processed.prompt_token_ids
        return [
            await state.client.check(
                f"{self.processed.request_id}-{len(beam.token_ids)}-{i}",
                [*prompt, *beam.token_ids],
                self.search.step_params,
                priority=first.priority,
                cache_salt=first.cache_salt,
                tenant=first.tenant,
            )
            for i, beam in enumerate(self.search.running)
        ]

    def output(self, state: ServerState, n: int) -> RequestOutput:
        """The n best beams as answers; the watch sees them end."""
        times = RequestMetrics(self._arrival, finished_time=time.time())
        output = RequestOutput(
            request_id=self.processed.request_id,
            prompt=self.processed.prompt,
            prompt_token_ids=self.processed.prompt_token_ids,
            outputs=[self._answer(state, i, b) for i, b in enumerate(self.search.best()[:n])],
            finished=True,
            metrics=times,
        )
        for answer in output.outputs:
            self.watch.saw(
                AnswerDelta(
                    request_id=output.request_id,
                    index=answer.index,
                    text=answer.text,
                    token_ids=answer.token_ids,
                    finish_reason=answer.finish_reason,
                    metrics=times,
                    final=output,
                )
            )
        return output

    def _answer(self, state: ServerState, index: int, beam: Beam) -> CompletionOutput:
        token_ids = list(beam.token_ids)
        text = ""
        if self.params.detokenize:
            text = state.client.tokenizer.decode(
                token_ids,
                skip_special_tokens=self.params.skip_special_tokens,
                spaces_between_special_tokens=self.params.spaces_between_special_tokens,
            )
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=beam.logprob,
            finish_reason=beam.finish_reason,
        )


async def search_beams(
    request: Request,
    state: ServerState,
    inputs: Sequence[ProcessedInput],
    params: SamplingParams,
    beams: BeamSearchParams,
) -> Answers:
    """The `params.n` likeliest answers to each prompt; ended if the client leaves before.

    Raises:
        ClientDisconnect: it has left.
        InvalidRequest: more beams than can be followed.
        Overloaded: too many others wait.
    """
    num_tokens = sum(len(one.prompt_token_ids) for one in inputs)
    state.admit(len(inputs) * beams.beam_width, num_tokens)
    searches = [_Search(state, one, params, beams) for one in inputs]
    try:
        await while_connected(request.receive, _run(state, searches))
        return Answers([one.output(state, params.n) for one in searches])
    except Exception as error:
        for one in searches:
            one.watch.failed(error)
        raise
    finally:
        for one in searches:
            one.watch.ended()


async def _run(state: ServerState, searches: Sequence[_Search]) -> None:
    """Go on with all of them, a token at a time, until each is over."""
    while open_ones := [one for one in searches if one.search.running]:
        asked = [await one.next_inputs(state) for one in open_ones]
        found: dict[str, list[tuple[int, float]]] = {}
        deltas = state.client.generate(
            [beam for inputs in asked for beam in inputs],
            open_ones[0].search.step_params,
            queue_timeout_s=state.queue_timeout_s,
        )
        async for delta in deltas:
            if (error := failure(delta)) is not None:
                raise error
            if delta.final is not None:
                found[delta.request_id] = top_tokens(delta.final.outputs[0])
        for one, inputs in zip(open_ones, asked, strict=True):
            one.search.advance([found[beam.request_id] for beam in inputs])

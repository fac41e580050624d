"""Beam search: each step sends one request per beam, which adds one token."""

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
    """Beam search for one prompt, observed as a single request."""

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
        """The requests that continue the running beams by one token."""
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
        """The n best beams as answers; reports them to the observers."""
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
    """Find the `params.n` most likely answers to each prompt; stop if the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected.
        Draining: the server is shutting down.
        Overloaded: the queue is full.
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
    """Extend all searches by one token at a time until each is finished."""
    while running := [one for one in searches if one.search.running]:
        step_inputs = [await one.next_inputs(state) for one in running]
        found: dict[str, list[tuple[int, float]]] = {}
        deltas = state.client.generate(
            [beam for inputs in step_inputs for beam in inputs],
            running[0].search.step_params,
            queue_timeout_s=state.queue_timeout_s,
        )
        async for delta in deltas:
            if (error := failure(delta)) is not None:
                raise error
            if delta.final is not None:
                found[delta.request_id] = top_tokens(delta.final.outputs[0])
        for one, inputs in zip(running, step_inputs, strict=True):
            one.search.advance([found[beam.request_id] for beam in inputs])

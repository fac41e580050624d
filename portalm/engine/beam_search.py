"""Beam search: choose the continuations of a prompt to extend by the likely next tokens.

Ranking and stopping match transformers' `generate(num_beams=...)`. Each beam is extended by a
request for one token, which finds the beam's KV blocks in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from portalm.beam_search_params import BeamSearchParams
from portalm.core.request import FinishReason
from portalm.errors import InvalidRequest
from portalm.outputs import CompletionOutput
from portalm.sampling_params import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation of the prompt."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    """Sum of its tokens' log probabilities."""
    score: float = float("-inf")
    """Rank among finished beams: `logprob` over the length to the power of length_penalty."""
    finish_reason: FinishReason | None = None


class BeamSearch:
    """The beam search of one prompt."""

    def __init__(
        self, params: BeamSearchParams, eos_token_ids: Collection[int], *, room: int
    ) -> None:
        """Start with one empty beam.

        Args:
            params: parameters of the search.
            eos_token_ids: token ids that finish a beam, unless `params.ignore_eos`.
            room: maximum number of tokens after the prompt that fit the model's context.

        Raises:
            InvalidRequest: the beam width needs more logprobs per step than are computed.
        """
        self._params = params
        self._max_tokens = min(params.max_tokens, room)
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        # enough that `beam_width` of them do not end in EOS
        self._num_candidates = max(2, 1 + len(self._eos)) * params.beam_width
        if self._num_candidates > MAX_LOGPROBS:
            most = MAX_LOGPROBS * params.beam_width // self._num_candidates
            raise InvalidRequest(
                f"beam_width ({params.beam_width}) needs the {self._num_candidates} most likely "
                f"tokens of each step; at most {MAX_LOGPROBS} are computed: reduce it to {most}",
                param="beam_width",
            )
        self.running: list[Beam] = [Beam()]
        """Beams to extend, most likely first; empty when the search is over."""
        self._finished: list[Beam] = []

    @property
    def step_params(self) -> SamplingParams:
        """Sampling parameters that return a running beam's most likely next tokens."""
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            logprobs=self._num_candidates,
            ignore_eos=True,
            detokenize=False,
        )

    def advance(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Extend the running beams by one token.

        Args:
            continuations: (token id, logprob) of the most likely next tokens, per running beam.
        """
        params = self._params
        length = len(self.running[0].token_ids) + 1
        candidates = sorted(
            (
                Beam((*beam.token_ids, token_id), beam.logprob + logprob)
                for beam, tokens in zip(self.running, continuations, strict=True)
                for token_id, logprob in tokens
            ),
            key=lambda one: -one.logprob,
        )[: self._num_candidates]
        unfinished: list[Beam] = []
        for rank, beam in enumerate(candidates):
            is_eos = beam.token_ids[-1] in self._eos
            if not is_eos and length < self._max_tokens:
                unfinished.append(beam)
            elif rank < params.beam_width:  # lower candidates only fill up the running beams
                score = beam.logprob / length**params.length_penalty
                reason: FinishReason = "stop" if is_eos else "length"
                self._finished.append(Beam(beam.token_ids, beam.logprob, score, reason))
        self._finished.sort(key=lambda one: -one.score)
        del self._finished[params.beam_width :]
        self.running = [] if self._is_over(unfinished, length) else unfinished[: params.beam_width]

    def _is_over(self, unfinished: Sequence[Beam], length: int) -> bool:
        params = self._params
        if len(self._finished) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        reached = length
        if params.early_stopping == "never" and params.length_penalty > 0:
            reached = self._max_tokens
        return (
            not unfinished
            or unfinished[0].logprob / reached**params.length_penalty <= self._finished[-1].score
        )

    def best(self) -> list[Beam]:
        """Finished beams, best first."""
        return self._finished


def top_tokens(answer: CompletionOutput) -> list[tuple[int, float]]:
    """(token id, logprob) of the most likely next tokens in an answer to `step_params`."""
    assert answer.logprobs is not None
    return [(token_id, one.logprob) for token_id, one in answer.logprobs[0].items()]

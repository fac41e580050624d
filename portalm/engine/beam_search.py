"""Beam search: which continuations of a prompt to follow, given the likeliest next tokens of each.

It ranks and ends as transformers' `generate(num_beams=...)` does. The beams themselves are requests
of one token each, whose blocks the prefix cache keeps.
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
    """A continuation."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    """Of all its tokens together."""
    score: float = float("-inf")
    """By which it is ranked once it has ended."""
    finish_reason: FinishReason | None = None


class BeamSearch:
    """The search behind one prompt."""

    def __init__(
        self, params: BeamSearchParams, eos_token_ids: Collection[int], *, room: int
    ) -> None:
        """Begin with the prompt alone.

        Args:
            params: how wide and how long.
            eos_token_ids: end a beam, unless they are to be ignored.
            room: tokens that fit behind the prompt.

        Raises:
            InvalidRequest: so many beams need more likely tokens of each step than are computed.
        """
        self._params = params
        self._max_tokens = min(params.max_tokens, room)
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        # so many that enough of them go on, even if all others end
        self._num_candidates = max(2, 1 + len(self._eos)) * params.beam_width
        if self._num_candidates > MAX_LOGPROBS:
            most = MAX_LOGPROBS * params.beam_width // self._num_candidates
            raise InvalidRequest(
                f"beam_width ({params.beam_width}) needs the {self._num_candidates} likeliest "
                f"tokens of each step; {MAX_LOGPROBS} are computed: it may be {most}",
                param="beam_width",
            )
        self.running: list[Beam] = [Beam()]
        """Those to be continued, the likeliest first; empty when the search is over."""
        self._ended: list[Beam] = []

    @property
    def step_params(self) -> SamplingParams:
        """How each running beam is asked for its likeliest next tokens."""
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            logprobs=self._num_candidates,
            ignore_eos=True,
            detokenize=False,
        )

    def advance(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Go on by one token.

        Args:
            continuations: of each running beam, its likeliest next tokens and their logprobs.
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
        going_on: list[Beam] = []
        for rank, beam in enumerate(candidates):
            is_eos = beam.token_ids[-1] in self._eos
            if not is_eos and length < self._max_tokens:
                going_on.append(beam)
            elif rank < params.beam_width:  # the others are there to go on, if they do
                score = beam.logprob / length**params.length_penalty
                reason: FinishReason = "stop" if is_eos else "length"
                self._ended.append(Beam(beam.token_ids, beam.logprob, score, reason))
        self._ended.sort(key=lambda one: -one.score)
        del self._ended[params.beam_width :]
        self.running = [] if self._is_over(going_on, length) else going_on[: params.beam_width]

    def _is_over(self, going_on: Sequence[Beam], length: int) -> bool:
        params = self._params
        if len(self._ended) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        reached = length
        if params.early_stopping == "never" and params.length_penalty > 0:
            reached = self._max_tokens
        return (
            not going_on
            or going_on[0].logprob / reached**params.length_penalty <= self._ended[-1].score
        )

    def best(self) -> list[Beam]:
        """Those that have ended, the best first."""
        return self._ended


def likeliest(answer: CompletionOutput) -> list[tuple[int, float]]:
    """The likeliest next tokens that a step of `BeamSearch.step_params` reports."""
    assert answer.logprobs is not None
    return [(token_id, one.logprob) for token_id, one in answer.logprobs[0].items()]

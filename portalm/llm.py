"""The offline API: run a model in this process."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from portalm.backend import Backend
from portalm.beam_search_params import BeamSearchParams
from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.engine.beam_search import BeamSearch, top_tokens
from portalm.engine.grammars import vocabulary_of
from portalm.engine.in_process import Answers, InProcessEngine
from portalm.engine.input_processor import NO_ANSWER, InputProcessor, ProcessedInput, TextPair
from portalm.engine.messages import EngineStats
from portalm.engine.output_processor import AnswerDelta
from portalm.engine.scores import as_pairs, cosine, numbers
from portalm.errors import InvalidRequest, RequestFailed
from portalm.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from portalm.pooling_params import PoolingParams
from portalm.progress import LoadingBar, ProgressBar
from portalm.prompts import Prompt, as_prompt, as_prompts
from portalm.sampling_params import SamplingParams
from portalm.structured.compiler import GrammarCompiler
from portalm.text import load_tokenizer

if TYPE_CHECKING:
    from portalm.text.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]


class LLM:
    """A language model on an accelerator.

    The methods may be called from several threads at once: their requests are computed in one
    batch. Every call waits for its own answers only.

    >>> llm = LLM()
    >>> llm.generate("The capital of France is")[0].outputs[0].text
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        backend: Backend | None = None,
        use_tqdm: bool = True,
        **settings: Any,
    ) -> None:
        """Load `model`.

        Args:
            model: a local folder or .gguf file, or a Hugging Face id.
            backend: a started backend to use instead of the one named by `device`.
            use_tqdm: show the progress of loading.
            **settings: any of `EngineConfig`'s fields (device, dtype, max_model_len, ...).

        Raises:
            PortaLMError: the model or the device cannot be used, or a setting is invalid.
        """
        config = EngineConfig.from_dict({"model": model, **settings})
        with LoadingBar(is_shown=use_tqdm) as bar:
            self._worker = InProcessEngine(config, backend=backend, progress=bar.show)
        self.engine = self._worker.engine
        """The engine. It runs on a thread of its own: read its attributes, but call no method while
        a request runs."""
        self._tokenizer = load_tokenizer(
            self.engine.tokenizer_path,
            chat_template=config.chat_template,
            trust_remote_code=config.trust_remote_code,
        )
        self._inputs = InputProcessor(
            self._tokenizer,
            self.engine.ready,
            max_logprobs=config.max_logprobs,
            default_seed=config.seed,
        )
        self._processing = threading.Lock()
        """Held while prompts are processed: their default seeds come from one sequence."""
        tokenizer, ready = self._tokenizer, self.engine.ready  # no reference to self: see `close`
        self._compiler = GrammarCompiler(lambda: vocabulary_of(tokenizer, ready))
        self._worker.use_tokenizer(self._tokenizer)
        self._ids = itertools.count()

    # -- answers ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate answers to all prompts, in the order of the prompts.

        Args:
            prompts: a `Prompt` or a list of them.
            sampling_params: one for all prompts, or one per prompt; None: those of
                `get_default_sampling_params`.
            use_tqdm: show a progress bar.
            priority: one per prompt, lower runs first, if the scheduling policy is "priority".

        Raises:
            InvalidRequest: a prompt or its parameters are invalid; nothing was run.
        """
        self._inputs.check_task("generate")
        many = as_prompts(prompts)
        chosen = sampling_params or self.get_default_sampling_params()
        params = _spread("sampling_params", chosen, len(many))
        priorities = _spread("priority", 0 if priority is None else priority, len(many))
        processed = self._process(many, params, priorities)
        answers = self._submit(processed, params)
        with ProgressBar("Answering", len(many), unit="requests", is_shown=use_tqdm) as bar:
            return _all_outputs(processed, answers, bar)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate the model's next message in one conversation or in each of several.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
            sampling_params: as in `generate`.
            use_tqdm: show a progress bar.
            add_generation_prompt: end the prompt with the beginning of an assistant message.
            continue_final_message: continue the last message instead of starting a new one.
            chat_template: Jinja template to use instead of the model's.
            chat_template_kwargs: additional variables for the template.
        """
        self._inputs.check_task("generate")  # before the lack of a template is reported
        if not messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        conversations = cast(
            "Sequence[Sequence[Message]]",
            [messages] if isinstance(messages[0], Mapping) else messages,
        )
        prompts = [
            self._tokenizer.apply_chat_template(
                list(conversation),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template=chat_template,
                **dict(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """Find the most likely continuations of each prompt with `params.beam_width` beams.

        Each beam is extended by one request per token, whose prompt is in the prefix cache except
        for the last block.

        Args:
            prompts: a `Prompt` or a list of them.
            params: parameters of the search.

        Raises:
            InvalidRequest: a prompt or a parameter is invalid.
            RequestFailed: the device failed on a beam.
        """
        self._inputs.check_task("generate")
        many = as_prompts(prompts)
        eos = self.engine.ready.eos_token_ids
        longest = self.engine.ready.max_model_len
        searches: list[tuple[list[int], BeamSearch]] = []
        for prompt in many:
            token_ids = self._inputs.check_prompt(as_prompt(prompt).content)
            search = BeamSearch(params, eos, room=longest - len(token_ids))
            searches.append((token_ids, search))
        while open_ones := [one for one in searches if one[1].running]:
            beams = [
                ([*prompt, *beam.token_ids], search.step_params)
                for prompt, search in open_ones
                for beam in search.running
            ]
            answers = iter(
                self.generate([b[0] for b in beams], [b[1] for b in beams], use_tqdm=False)
            )
            for _, search in open_ones:
                found = [_continuation(next(answers)) for _ in search.running]
                search.advance(found)
        return [self._beam_output(prompt, search) for prompt, search in searches]

    def _beam_output(self, prompt: list[int], search: BeamSearch) -> BeamSearchOutput:
        return BeamSearchOutput(
            [
                BeamSearchSequence(
                    tokens=[*prompt, *beam.token_ids],
                    text="" if self._tokenizer is None else self._tokenizer.decode(beam.token_ids),
                    cum_logprob=beam.logprob,
                    score=beam.score,
                    finish_reason=beam.finish_reason,
                )
                for beam in search.best()
            ]
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """Embed each prompt as a vector, in the order of the prompts.

        Args:
            prompts: a `Prompt` or a list of them.
            pooling_params: parameters for all prompts; None: the model's own pooling.
            truncate_prompt_tokens: overrides that of `pooling_params`.
            use_tqdm: show a progress bar.

        Raises:
            InvalidRequest: a prompt or the parameters are invalid; nothing was run.
            RequestFailed: the device failed on a prompt.
        """
        params = pooling_params or PoolingParams()
        if truncate_prompt_tokens is not None:
            params = replace(params, truncate_prompt_tokens=truncate_prompt_tokens)
        return [
            EmbeddingRequestOutput(
                request_id=output.request_id,
                outputs=EmbeddingOutput(numbers(pooled)),
                prompt_token_ids=output.prompt_token_ids,
                num_cached_tokens=output.num_cached_tokens,
            )
            for output, pooled in self._pool(as_prompts(prompts), params, use_tqdm)
        ]

    def score(
        self,
        data_1: str | list[str],
        data_2: str | list[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """Score pairs of texts with a cross-encoder, or by the cosine similarity of their vectors.

        Args:
            data_1: one text to pair with each of `data_2`, or as many texts.
            data_2: one text, or a list.
            truncate_prompt_tokens: as in `PoolingParams`.
            use_tqdm: show a progress bar.

        Raises:
            InvalidRequest: the texts do not form pairs, or one is invalid; nothing was run.
            RequestFailed: the device failed on a pair.
        """
        pairs = as_pairs(data_1, data_2, ("data_1", "data_2"))
        if "score" in self.engine.tasks:
            params = PoolingParams(task="score", truncate_prompt_tokens=truncate_prompt_tokens)
            return [
                _scored(output, numbers(pooled)[0], output.prompt_token_ids)
                for output, pooled in self._pool([TextPair(*p) for p in pairs], params, use_tqdm)
            ]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        params = PoolingParams(truncate_prompt_tokens=truncate_prompt_tokens)
        found = dict(zip(texts, self._pool(texts, params, use_tqdm), strict=True))
        scores = []
        for first, second in pairs:
            (one, vector), (other, other_vector) = found[first], found[second]
            ids = one.prompt_token_ids + other.prompt_token_ids
            scores.append(_scored(other, cosine(vector, other_vector), ids))
        return scores

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[AnswerDelta]:
        """Yield the answer to one prompt in deltas; closing the iterator aborts the request."""
        params = [sampling_params or self.get_default_sampling_params()]
        processed = self._process([prompt], params, [0])
        answers = self._submit(processed, params, is_streamed=True)
        try:
            while not answers.are_complete:
                yield from answers.take()
        finally:
            answers.close()

    # -- the model ----------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that `generate` uses by default: the model's own, if it has any."""
        values: dict[str, Any] = dict(self.engine.ready.sampling_defaults)
        return SamplingParams(**values)

    def get_metrics(self) -> EngineStats:
        """Return the engine's statistics."""
        return self._worker.call(lambda engine: copy.copy(engine.stats()))

    def reset_prefix_cache(self) -> bool:
        """Drop cached KV blocks. Returns False, changing nothing, while requests run."""
        return self._worker.call(lambda engine: engine.reset_prefix_cache())

    def close(self) -> None:
        """Release the model and its memory; requests that have not ended raise `EngineDead`.

        The same happens when the last reference to this object is dropped.
        """
        self._worker.close()

    # -- inside -------------------------------------------------------------------------------

    def _pool(
        self, prompts: Sequence[Prompt | TextPair], params: PoolingParams, use_tqdm: bool
    ) -> list[tuple[RequestOutput, bytes]]:
        """Compute each prompt, and return it with its pooled hidden states (float32 bytes)."""
        processed = [
            self._inputs.process_pooling(
                str(next(self._ids)),
                prompt if isinstance(prompt, TextPair) else as_prompt(prompt).content,
                params,
            )
            for prompt in prompts
        ]
        answers = self._submit(processed, [NO_ANSWER] * len(processed))
        with ProgressBar("Pooling", len(processed), unit="requests", is_shown=use_tqdm) as bar:
            outputs = _all_outputs(processed, answers, bar)
        for output in outputs:
            if output.pooled is None:
                raise RequestFailed(output.error or "the request was aborted")
        return [(output, output.pooled) for output in outputs if output.pooled is not None]

    def _process(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], priorities: Sequence[int]
    ) -> list[ProcessedInput]:
        """Check all prompts and their parameters."""
        constraints = [p.structured_outputs for p in params]
        compiling = [None if one is None else self._compiler.compile(one) for one in constraints]
        grammars = [None if one is None else one.result() for one in compiling]
        checked = [as_prompt(prompt) for prompt in prompts]
        with self._processing:
            processed = [
                self._inputs.process(
                    str(next(self._ids)),
                    prompt.content,
                    p,
                    priority=priority,
                    cache_salt=prompt.cache_salt,
                    grammar=grammar,
                )
                for prompt, p, priority, grammar in zip(
                    checked, params, priorities, grammars, strict=True
                )
            ]
        return [
            one if prompt.text is None else replace(one, prompt=prompt.text)
            for one, prompt in zip(processed, checked, strict=True)
        ]

    def _submit(
        self,
        processed: Sequence[ProcessedInput],
        params: Sequence[SamplingParams],
        *,
        is_streamed: bool = False,
    ) -> Answers:
        """Add all requests, or none."""
        return self._worker.submit(
            processed, params, lambda: self._compiler.vocabulary, is_streamed=is_streamed
        )


def _all_outputs(
    processed: Sequence[ProcessedInput], answers: Answers, bar: ProgressBar
) -> list[RequestOutput]:
    """Wait for all answers; return the outputs in the order of the requests."""
    outputs: dict[str, RequestOutput] = {}
    num_tokens, started = 0, time.perf_counter()
    try:
        while not answers.are_complete:
            for delta in answers.take():
                assert delta.final is not None
                outputs[delta.request_id] = delta.final
                num_tokens += sum(len(answer.token_ids) for answer in delta.final.outputs)
                seconds = time.perf_counter() - started
                # pooling requests generate no tokens
                bar.update(f"{num_tokens / seconds:.1f} tok/s" if num_tokens else "")
    finally:
        answers.close()
    return [outputs[one.request_id] for one in processed]


def _continuation(output: RequestOutput) -> list[tuple[int, float]]:
    """Most likely next tokens of a beam."""
    if output.error is not None:
        raise RequestFailed(output.error)
    return top_tokens(output.outputs[0])


def _scored(output: RequestOutput, score: float, token_ids: list[int]) -> ScoringRequestOutput:
    return ScoringRequestOutput(output.request_id, ScoringOutput(score), token_ids)


def _spread(name: str, value: Any, count: int) -> list[Any]:
    """Return `value` as a list with one entry per prompt."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(
            f"{name} has {len(value)} entries for {count} prompts: pass one, or one per prompt",
            param=name,
        )
    return list(value)

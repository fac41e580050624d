"""The offline API: run a model in this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from portalm.backend import Backend
from portalm.beam_search_params import BeamSearchParams
from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.engine.beam_search import BeamSearch, top_tokens
from portalm.engine.engine import Engine
from portalm.engine.grammars import LoadedGrammars, vocabulary_of
from portalm.engine.input_processor import NO_ANSWER, InputProcessor, ProcessedInput, TextPair
from portalm.engine.messages import EngineStats
from portalm.engine.output_processor import AnswerDelta, OutputProcessor
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
from portalm.sampling_params import SamplingParams
from portalm.structured.compiler import GrammarCompiler
from portalm.text import load_tokenizer

if TYPE_CHECKING:
    from portalm.text.tokenizer import Tokenizer

Prompt: TypeAlias = "str | Sequence[int]"
Message: TypeAlias = Mapping[str, Any]


class LLM:
    """A language model on an accelerator.

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
            self.engine = Engine(config, backend=backend, progress=bar.show)
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
        self._compiler = GrammarCompiler(lambda: vocabulary_of(self._tokenizer, self.engine.ready))
        self._loaded_grammars = LoadedGrammars()
        self._outputs = OutputProcessor(self._tokenizer)
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
            prompts: a string, token ids, or a list of either.
            sampling_params: one for all prompts, or one per prompt; None: the defaults.
            use_tqdm: show a progress bar.
            priority: one per prompt, lower runs first, if the scheduling policy is "priority".

        Raises:
            InvalidRequest: a prompt or its parameters are invalid; nothing was run.
        """
        self._inputs.check_task("generate")
        many = _as_prompts(prompts)
        params = _spread("sampling_params", sampling_params or SamplingParams(), len(many))
        priorities = _spread("priority", 0 if priority is None else priority, len(many))
        ids = self._submit(many, params, priorities)
        with ProgressBar("Answering", len(many), unit="requests", is_shown=use_tqdm) as bar:
            self._run(ids, bar)
        return [self._take(request_id) for request_id in ids]

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
            prompts: a string, token ids, or a list of either.
            params: parameters of the search.

        Raises:
            InvalidRequest: a prompt or a parameter is invalid.
            RequestFailed: the device failed on a beam.
        """
        self._inputs.check_task("generate")
        many = _as_prompts(prompts)
        eos = self.engine.ready.eos_token_ids
        longest = self.engine.ready.max_model_len
        searches: list[tuple[list[int], BeamSearch]] = []
        for prompt in many:
            token_ids = self._inputs.check_prompt(prompt)
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
            prompts: a string, token ids, or a list of either.
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
            for output, pooled in self._pool(_as_prompts(prompts), params, use_tqdm)
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
        [request_id] = self._submit([prompt], [sampling_params or SamplingParams()], [0])
        try:
            while not self._outputs.is_finished(request_id):
                for delta in self._step():
                    if delta.request_id == request_id:
                        yield delta
        finally:
            self._drop([request_id])

    # -- the model ----------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that `generate` uses by default."""
        return SamplingParams()

    def get_metrics(self) -> EngineStats:
        """Return the engine's statistics."""
        return self.engine.stats()

    def reset_prefix_cache(self) -> bool:
        """Drop cached KV blocks. Returns False, changing nothing, while requests run."""
        return self.engine.reset_prefix_cache()

    # -- inside -------------------------------------------------------------------------------

    def _pool(
        self, prompts: Sequence[Prompt | TextPair], params: PoolingParams, use_tqdm: bool
    ) -> list[tuple[RequestOutput, bytes]]:
        """Compute each prompt, and return it with its pooled hidden states (float32 bytes)."""
        processed = [
            self._inputs.process_pooling(str(next(self._ids)), prompt, params) for prompt in prompts
        ]
        ids = self._add(processed, [NO_ANSWER] * len(processed))
        with ProgressBar("Pooling", len(ids), unit="requests", is_shown=use_tqdm) as bar:
            self._run(ids, bar)
        outputs = [self._take(request_id) for request_id in ids]
        for output in outputs:
            if output.pooled is None:
                raise RequestFailed(output.error or "the request was aborted")
        return [(output, output.pooled) for output in outputs if output.pooled is not None]

    def _submit(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], priorities: Sequence[int]
    ) -> list[str]:
        """Check and add all prompts, or none; return their request ids."""
        constraints = [p.structured_outputs for p in params]
        compiling = [None if one is None else self._compiler.compile(one) for one in constraints]
        processed = [
            self._inputs.process(
                str(next(self._ids)),
                prompt,
                p,
                priority=priority,
                grammar=None if grammar is None else grammar.result(),
            )
            for prompt, p, priority, grammar in zip(
                prompts, params, priorities, compiling, strict=True
            )
        ]
        return self._add(processed, params)

    def _add(
        self, processed: Sequence[ProcessedInput], params: Sequence[SamplingParams]
    ) -> list[str]:
        added: list[str] = []
        try:
            for one, p in zip(processed, params, strict=True):
                self._outputs.add(one, p, arrival_time=time.time())
                added.append(one.request_id)
                if one.grammar is not None:
                    load = self._loaded_grammars.need(one.grammar, self._compiler.vocabulary)
                    if load is not None:
                        self.engine.load_grammar(load)
                for message in one.requests:
                    self.engine.add(message)
        except Exception:
            self._drop(added)
            raise
        return added

    def _step(self) -> list[AnswerDelta]:
        processed = self._outputs.process(self.engine.step().outputs)
        if processed.abort_ids:
            self.engine.abort(processed.abort_ids)
        return processed.deltas

    def _run(self, ids: Sequence[str], bar: ProgressBar) -> None:
        open_ids = set(ids)
        num_tokens, started = 0, time.perf_counter()
        try:
            while open_ids:
                for delta in self._step():
                    num_tokens += len(delta.token_ids)
                    if delta.request_id in open_ids and self._outputs.is_finished(delta.request_id):
                        open_ids.remove(delta.request_id)
                        seconds = time.perf_counter() - started
                        # pooling requests generate no tokens
                        bar.update(f"{num_tokens / seconds:.1f} tok/s" if num_tokens else "")
        except BaseException:
            self._drop(ids)
            raise

    def _take(self, request_id: str) -> RequestOutput:
        output = self._outputs.snapshot(request_id)
        self._outputs.forget(request_id)
        return output

    def _drop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(self._outputs.engine_ids(request_id))
            self._outputs.forget(request_id)


def _continuation(output: RequestOutput) -> list[tuple[int, float]]:
    """Most likely next tokens of a beam."""
    if output.error is not None:
        raise RequestFailed(output.error)
    return top_tokens(output.outputs[0])


def _scored(output: RequestOutput, score: float, token_ids: list[int]) -> ScoringRequestOutput:
    return ScoringRequestOutput(output.request_id, ScoringOutput(score), token_ids)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Convert a string, token ids, or a list of either to a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    many = list(prompts)
    if many and all(isinstance(x, int) for x in many):
        return [many]  # type: ignore[list-item]
    return many  # type: ignore[return-value]


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

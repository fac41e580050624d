"""The offline API: a model in this process, prompts in, answers out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from tqdm import tqdm

from portalm.backend import Backend
from portalm.config import DEFAULT_MODEL, EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.input_processor import InputProcessor
from portalm.engine.loading_bar import LoadingBar
from portalm.engine.messages import EngineStats
from portalm.engine.output_processor import AnswerDelta, OutputProcessor
from portalm.errors import InvalidRequest
from portalm.outputs import RequestOutput
from portalm.sampling_params import SamplingParams
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
            backend: a started backend, instead of the one that `device` names.
            use_tqdm: show how loading goes.
            **settings: any of `EngineConfig`'s fields (device, dtype, max_model_len, ...).

        Raises:
            PortaLMError: the model, the device or a setting does not work; the text says why.
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
        """The answers to all prompts, in their order.

        Args:
            prompts: a text, token ids, or a list of either.
            sampling_params: one for all prompts, or one for each; None: the defaults.
            use_tqdm: show a progress bar.
            priority: one for each prompt (lower runs first) where the policy is priority.

        Raises:
            InvalidRequest: a prompt or its parameters cannot work; nothing was run.
        """
        many = _as_prompts(prompts)
        params = _spread("sampling_params", sampling_params or SamplingParams(), len(many))
        priorities = _spread("priority", 0 if priority is None else priority, len(many))
        ids = self._submit(many, params, priorities)
        with tqdm(total=len(many), desc="Answering", unit="req", disable=not use_tqdm) as bar:
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
        """The model's next message in one conversation or in each of several.

        Args:
            messages: {"role": ..., "content": ...} each; or a list of such lists.
            sampling_params: as in `generate`.
            use_tqdm: show a progress bar.
            add_generation_prompt: end the prompt where the assistant begins to speak.
            continue_final_message: the last message is the beginning of the answer.
            chat_template: Jinja text to use instead of the model's.
            chat_template_kwargs: more variables for the template.
        """
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

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[AnswerDelta]:
        """The answer to one prompt, piece by piece; closing the iterator aborts the request."""
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
        """What `generate` uses where nothing is given."""
        return SamplingParams()

    def get_metrics(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self.engine.stats()

    def reset_prefix_cache(self) -> bool:
        """Forget cached KV blocks."""
        return self.engine.reset_prefix_cache()

    # -- inside -------------------------------------------------------------------------------

    def _submit(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], priorities: Sequence[int]
    ) -> list[str]:
        """All of them or none."""
        processed = [
            self._inputs.process(str(next(self._ids)), prompt, p, priority=priority)
            for prompt, p, priority in zip(prompts, params, priorities, strict=True)
        ]
        added: list[str] = []
        try:
            for one, p in zip(processed, params, strict=True):
                self._outputs.add(one, p, arrival_time=time.time())
                added.append(one.request_id)
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

    def _run(self, ids: Sequence[str], bar: tqdm[Any]) -> None:
        open_ids = set(ids)
        num_tokens, started = 0, time.perf_counter()
        try:
            while open_ids:
                for delta in self._step():
                    num_tokens += len(delta.token_ids)
                    if delta.request_id in open_ids and self._outputs.is_finished(delta.request_id):
                        open_ids.remove(delta.request_id)
                        seconds = time.perf_counter() - started
                        bar.set_postfix_str(f"{num_tokens / seconds:.1f} tok/s", refresh=False)
                        bar.update()
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


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whatever the spelling: a text, token ids, or a list of either."""
    if isinstance(prompts, str):
        return [prompts]
    many = list(prompts)
    if many and all(isinstance(x, int) for x in many):
        return [many]  # type: ignore[list-item]
    return many  # type: ignore[return-value]


def _spread(name: str, value: Any, count: int) -> list[Any]:
    """`value` for each of `count` prompts."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(
            f"{name} has {len(value)} entries for {count} prompts: give one, or one for each",
            param=name,
        )
    return list(value)

"""Runs step plans on the device: step plan in, drawn ids out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import (
    KV,
    Backend,
    Bucket,
    HostFuture,
    SampleOutput,
    StepFn,
    StepInputs,
    StepMeta,
    Weights,
)
from portalm.config import SchedulerConfig
from portalm.core.plan import (
    Failed,
    Outcome,
    Pooled,
    Refused,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from portalm.runner.graphs import StepGraphs
from portalm.runner.input_batch import InputBatch, PaddedShape, StepArrays
from portalm.runner.pooler import PooledPart, Pooler, pooled_parts, state_rows
from portalm.runner.sampled_rows import SampledRow, sampled_rows
from portalm.runner.sampler import Sampler, num_logprobs_of

if TYPE_CHECKING:
    from portalm.models.model import Model


class ModelRunner:
    """The model on its device: weights, KV cache and the captured step.

    `dispatch` only enqueues where the backend is asynchronous; `StepInFlight.result` waits.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights,
        kv: KV,
        backend: Backend,
        config: SchedulerConfig,
        *,
        enforce_eager: bool = False,
    ) -> None:
        """Take over weights and KV cache.

        Args:
            model: its functions.
            weights: as `model.load` gave them.
            kv: as `backend.kv_alloc` gave it, with `config.num_blocks` blocks.
            backend: where both live.
            config: limits of a step.
            enforce_eager: do not capture steps.
        """
        self.batch = InputBatch(config)
        self.graphs = StepGraphs(
            backend,
            _Step(model, backend),
            max_tokens=config.max_batch_tokens,
            max_requests=config.max_batch_requests,
            max_blocks=self.batch.max_blocks,
            max_scored_rows=config.max_prompt_logprob_rows,
            draws="generate" in model.tasks,
            enforce_eager=enforce_eager,
        )
        self._backend = backend
        self._model = model
        self._weights = weights
        self._kv = kv
        self._sampler = Sampler(model.config.vocab_size)
        self._specs = list(dict.fromkeys(model.attention_specs()))
        self._drawn_rows: dict[str, int] = {}
        """By request id: the row of the last dispatched step that draws its token."""
        self._last_ids: torch.Tensor | None = None
        self._pooler = Pooler()

    def forget(self, request_ids: list[str]) -> None:
        """These requests do not run any more; their rows are free."""
        self.batch.forget(request_ids)
        self._pooler.forget(request_ids)
        self._sampler.forget(request_ids)

    def dispatch(self, plan: StepPlan) -> StepInFlight:
        """Start computing `plan`, which must not be empty."""
        with self._backend.device_errors():
            return self._dispatch(plan)

    def _dispatch(self, plan: StepPlan) -> StepInFlight:
        self.forget(plan.released)
        rows = self.batch.update(plan)
        if plan.block_copies:
            self._copy_blocks(plan.block_copies)
        sampled, parts = sampled_rows(plan), pooled_parts(plan)
        inputs = self._inputs(plan, rows, sampled, parts)
        step = self.graphs.step_for(inputs)
        self._kv, out = step(self._weights, self._kv, inputs)
        self._last_ids = out.token_ids
        self._drawn_rows = {
            row.request.request_id: i for i, row in enumerate(sampled) if row.target < 0
        }
        return StepInFlight(plan, sampled, out, self._backend, parts, self._pooler)

    def capture_next(self) -> bool:
        """Capture one more bucket, by a step of padding alone; False: there is none left.

        Nothing may be in flight. Raises `BackendError` if the device cannot.
        """
        bucket = self.graphs.next_to_capture()
        if bucket is None:
            return False
        [shape] = self.graphs.shapes(bucket)
        with self._backend.device_errors():
            inputs = self._padding(bucket, shape)
            self._try(self.graphs.step_for(inputs), inputs)
        self.graphs.note_captured()
        return True

    def capture_all(self, progress: Callable[[float], None]) -> None:
        """Capture every size that a step may have, and try each; `progress` is told the share done.

        Nothing may be in flight. Raises `BackendError` if the device cannot.
        """
        captured: list[tuple[StepFn, StepInputs]] = []
        while (bucket := self.graphs.next_to_capture()) is not None:
            examples = [self._padding(bucket, shape) for shape in self.graphs.shapes(bucket)]
            captured += [(self.graphs.step_for(inputs), inputs) for inputs in examples]
            self.graphs.note_captured()
        self._backend.build(
            [step for step, _ in captured],
            self._weights,
            self._kv,
            progress,
            identity=_identity(self._model),
        )
        for step, inputs in captured:
            self._try(step, inputs)
        if self._kv is not None:  # copies need a program too, on such a device
            self._copy_blocks([(0, 0)])

    def _try(self, step: StepFn, inputs: StepInputs) -> None:
        """Run a step of padding."""
        self._kv, out = step(self._weights, self._kv, inputs)
        self._backend.to_host(out.token_ids).result()

    def run_largest(self) -> None:
        """A step of as many tokens, requests and wanted rows as there may be, for its memory.

        All blocks are the null block. Every kind of sampling is in it.
        """
        config = self.batch.config
        num_rows = config.max_batch_requests + config.max_prompt_logprob_rows
        arrays = self.batch.largest(num_rows)
        with self._backend.device_errors():
            num_states = 0 if "generate" in self._model.tasks else num_rows
            inputs = self._on_device(arrays, arrays.logits_rows, [], None, num_states, None)
            inputs.sample = self._sampler.every_kind(num_rows, self._backend.to_device)
            self._kv, out = self.graphs.step_for(inputs)(self._weights, self._kv, inputs)
            self._backend.to_host(out.token_ids).result()

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        pairs = np.array(copies, np.int32)
        src, dst = (self._backend.to_device(np.ascontiguousarray(x)) for x in pairs.T)
        self._kv = self._backend.kv_copy(self._kv, src, dst)

    def _inputs(
        self,
        plan: StepPlan,
        rows: npt.NDArray[np.intp],
        sampled: list[SampledRow],
        parts: list[PooledPart],
    ) -> StepInputs:
        longest = max(p.start + p.num_tokens for p in plan.requests)
        num_states = sum(part.num_states for part in parts)
        bucket, pad = self.graphs.shape(
            plan.num_tokens,
            len(plan.requests),
            -(-longest // self.batch.block_size),
            len(sampled),
            num_states,
            max_query_len=max(p.num_tokens for p in plan.requests),
        )
        arrays = self.batch.build(
            plan,
            rows,
            drawn_rows=self._drawn_rows,
            pad=pad,
            least_rows=0 if num_states else 1,
        )
        wanted = arrays.logits_rows
        if num_states:
            wanted = np.concatenate([wanted, state_rows(parts, arrays.query_start_loc)])
        if pad is not None:
            wanted = np.pad(wanted, (0, pad.num_states - num_states))
            num_states = pad.num_states
        types = _token_types(plan, arrays) if self._kv is None else None
        return self._on_device(arrays, wanted, sampled, bucket, num_states, types)

    def _padding(self, bucket: Bucket, pad: PaddedShape) -> StepInputs:
        """A step of `bucket` without a single request."""
        arrays = self.batch.padding(pad)
        wanted = np.zeros(pad.num_rows + pad.num_states, np.int32)
        types = None if self._kv is not None else np.zeros(pad.num_tokens, np.int32)
        return self._on_device(arrays, wanted, [], bucket, pad.num_states, types)

    def _on_device(
        self,
        arrays: StepArrays,
        wanted: npt.NDArray[np.int32],
        sampled: list[SampledRow],
        bucket: Bucket | None,
        num_states: int,
        types: npt.NDArray[np.int32] | None,
    ) -> StepInputs:
        """Arrays, and the rows of logits and hidden states that are wanted, as a step's inputs."""
        to_device, previous = self._backend.to_device, arrays.previous_rows
        hosts = {
            "token_ids": arrays.token_ids,
            "positions": arrays.positions,
            "slot_mapping": arrays.slot_mapping,
            "query_start_loc": arrays.query_start_loc,
            "seq_lens": arrays.seq_lens,
            "block_table": arrays.block_table,
            "logits_rows": wanted,
        }
        if previous is not None:
            hosts["previous_rows"] = previous
        sent = dict(zip(hosts, self._backend.to_device_all(list(hosts.values())), strict=True))
        meta = StepMeta(
            positions=sent["positions"],
            slot_mapping=sent["slot_mapping"],
            query_start_loc=sent["query_start_loc"],
            seq_lens=sent["seq_lens"],
            block_table=sent["block_table"],
            logits_rows=sent["logits_rows"],
            host_query_start_loc=arrays.query_start_loc,
            host_seq_lens=arrays.seq_lens,
            num_decodes=arrays.num_decodes,
            max_query_len=arrays.max_query_len,
            max_seq_len=arrays.max_seq_len,
            token_types=None if types is None else to_device(types),
            bucket=bucket,
        )
        return StepInputs(
            token_ids=sent["token_ids"],
            meta=self._backend.prepare(meta, self._specs),
            sample=self._sampler.build(sampled, arrays, self.batch, to_device),
            previous_ids=None if previous is None else self._last_ids,
            previous_rows=sent.get("previous_rows"),
            num_states=num_states,
        )


def _token_types(plan: StepPlan, arrays: StepArrays) -> npt.NDArray[np.int32]:
    """[T]: 1 for tokens of the second text of a pair; pad tokens are of the first."""
    types = np.zeros(len(arrays.positions), np.int32)
    for i, planned in enumerate(plan.requests):
        second = planned.request.second_text_start
        if second is not None:
            start = int(arrays.query_start_loc[i])
            types[start + second : start + planned.num_tokens] = 1
    return types


def _identity(model: Model) -> str:
    """What a model computes, beside the sizes and dtypes of what it is given."""
    family = f"{type(model).__module__}.{type(model).__qualname__}"
    values = json.dumps(dict(model.config.values), sort_keys=True, default=repr)
    return f"{family} {model.dtype} {model.tasks} {model.config} {values}"


class _Step:
    """One step, from token ids to drawn ids and hidden states: what a backend captures."""

    def __init__(self, model: Model, backend: Backend) -> None:
        self._model = model
        self._backend = backend
        self._is_scorer = "score" in model.tasks
        self._draws = "generate" in model.tasks

    def __call__(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        token_ids = inputs.token_ids
        if inputs.previous_ids is not None and inputs.previous_rows is not None:
            rows = inputs.previous_rows
            drawn = inputs.previous_ids[rows.clamp(min=0).long()].clamp(min=0)  # -1: it failed
            token_ids = torch.where(rows >= 0, drawn, token_ids)
        kv, hidden = self._model.forward(self._backend, weights, kv, token_ids, inputs.meta)
        if not inputs.num_states and self._draws:
            logits = self._model.logits(self._backend, weights, hidden)
            return kv, self._backend.sample(logits, inputs.sample)
        num_rows = len(hidden) - inputs.num_states  # of logits
        out = SampleOutput(token_ids=token_ids[:0])
        if num_rows and self._draws:
            logits = self._model.logits(self._backend, weights, hidden[:num_rows])
            out = self._backend.sample(logits, inputs.sample)
        states = hidden[num_rows:]
        if self._is_scorer:
            states = self._model.logits(self._backend, weights, states)
        out.states = states.float()
        return kv, out


class StepInFlight:
    """A dispatched step whose ids are on their way to the host."""

    def __init__(
        self,
        plan: StepPlan,
        sampled: list[SampledRow],
        out: SampleOutput,
        backend: Backend,
        parts: list[PooledPart],
        pooler: Pooler,
    ) -> None:
        """Start the copies to the host."""
        self.plan = plan
        self._sampled = sampled
        self._parts = parts
        self._pooler = pooler
        # a padded step may give states that nobody asked for
        self._states = backend.to_host(out.states) if parts and out.states is not None else None
        self._token_ids = backend.to_host(out.token_ids)
        self._logprobs: list[HostFuture] = []
        if out.logprobs is not None:
            assert out.ranks is not None and out.top_ids is not None
            assert out.top_logprobs is not None
            self._logprobs = [
                backend.to_host(x) for x in (out.logprobs, out.ranks, out.top_ids, out.top_logprobs)
            ]

    def done(self) -> bool:
        """True once `result` would not wait."""
        return self._token_ids.done()

    def result(self) -> StepResult:
        """Wait for the step and return its outcomes; `BackendError` if the device failed."""
        ids = self._token_ids.result().tolist()
        entries = self._logprob_entries(ids) if self._logprobs else None
        outcomes: list[Outcome | None] = [None] * len(self.plan.requests)
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for i, row in enumerate(self._sampled):
            entry = None if entries is None else entries[i]
            if row.target < 0:
                outcomes[row.index] = outcome_of(row, ids[i], entry)
            elif entry is not None:
                prompt_logprobs.setdefault(row.index, []).append(entry)
        if self._parts:
            self._add_pooled(outcomes)
        return StepResult(outcomes, prompt_logprobs)

    def _add_pooled(self, outcomes: list[Outcome | None]) -> None:
        # no states where first tokens are pooled and the step has only later chunks
        states = np.empty((0, 0), np.float32) if self._states is None else self._states.result()
        for index, vector in self._pooler.take(self._parts, states).items():
            if np.isfinite(vector).all():
                outcomes[index] = Pooled(vector.tobytes())
            else:
                outcomes[index] = Failed(
                    "the model's hidden states contain NaN or infinity: they cannot be pooled"
                )

    def _logprob_entries(self, ids: list[int]) -> list[TokenLogprobs | None]:
        """For each row of logits, the logprobs of its token; None where not requested."""
        logprobs, ranks, top_ids, top_logprobs = (x.result() for x in self._logprobs)
        entries: list[TokenLogprobs | None] = []
        for i, row in enumerate(self._sampled):
            wanted = num_logprobs_of(row)
            if wanted is None or (not math.isfinite(logprobs[i]) and ids[i] < 0):
                entries.append(None)
                continue
            top = zip(top_ids[i, :wanted].tolist(), top_logprobs[i, :wanted].tolist(), strict=True)
            entries.append(TokenLogprobs(ids[i], float(logprobs[i]), int(ranks[i]), list(top)))
        return entries


def outcome_of(row: SampledRow, token_id: int, entry: TokenLogprobs | None) -> Outcome:
    """The outcome of a row that samples a token; -1 is no token."""
    if row.refusal is not None and token_id < 0:
        return Refused(row.refusal)
    if row.fault is not None:
        return Failed(row.fault)
    if token_id < 0:
        return Failed(
            f"the model's logits after token {row.position - 1} contain NaN or only -inf: no token "
            "can be sampled"
        )
    return Sampled([token_id], None if entry is None else [entry])

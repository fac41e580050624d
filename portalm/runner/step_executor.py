"""Executes steps on the device: host arrays in, a step in flight out.

Nothing here knows requests or plans: a `HostStep` is all that a device needs to compute a step.
`ModelRunner` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import (
    KV,
    Backend,
    Bucket,
    HostFuture,
    LogitBias,
    Penalties,
    SampleOutput,
    SampleParams,
    StepInputs,
    StepMeta,
    Weights,
)
from portalm.config import SchedulerConfig
from portalm.runner.graphs import StepGraphs
from portalm.runner.input_batch import IntArray, StepArrays

if TYPE_CHECKING:
    from portalm.models.model import Model

Arrays = dict[str, npt.NDArray[np.generic]]
"""Host arrays by field name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleArrays:
    """`SampleParams` on the host, without the positions."""

    rows: Arrays
    """Fields of `SampleParams` with a value per row of logits: temperature, top_k, top_p, min_p,
    seed; allowed and targets where rows have them."""
    penalties: Arrays = field(default_factory=dict)
    """Fields of `Penalties`; empty: none."""
    bias: Arrays = field(default_factory=dict)
    """Fields of `LogitBias`; empty: none."""
    is_greedy: bool
    has_filters: bool
    num_logprobs: int | None = None


@dataclass(slots=True, kw_only=True)
class HostStep:
    """One step on the host: everything that the device does not hold already."""

    arrays: StepArrays
    wanted_rows: IntArray
    """[R + P]: tokens whose logits are needed, then tokens whose hidden states are needed."""
    num_states: int
    """P, padding included."""
    returns_states: bool
    """False where hidden states are computed only as padding."""
    sample: SampleArrays
    sample_positions: npt.NDArray[np.int64]
    """[R]: position of each sampled token in its request."""
    bucket: Bucket | None
    """Size that the arrays are padded to; None: not padded."""
    token_types: IntArray | None = None
    """[T]: 1 for tokens of the second text of a pair; None for decoders."""
    block_copies: Sequence[tuple[int, int]] = ()
    """(source, destination) KV blocks to copy before the step."""


@dataclass(slots=True, kw_only=True)
class StepInFlight:
    """The output of a dispatched step on its way to the host."""

    token_ids: HostFuture
    """int32 [R]"""
    logprobs: tuple[HostFuture, HostFuture, HostFuture, HostFuture] | None
    """logprobs, ranks, top_ids and top_logprobs of `SampleOutput`."""
    states: HostFuture | None
    """float32 [P, C]"""


class StepExecutor:
    """A model on its device: weights, KV cache and captured steps."""

    def __init__(
        self,
        model: Model,
        weights: Weights,
        kv: KV,
        backend: Backend,
        config: SchedulerConfig,
        *,
        enforce_eager: bool,
    ) -> None:
        """Take over weights and KV cache.

        Args:
            model: its functions.
            weights: returned by `model.load`.
            kv: returned by `backend.kv_alloc` for `config.num_blocks` blocks; None: no KV cache.
            backend: the device that holds both.
            config: limits of a step.
            enforce_eager: do not capture steps.
        """
        self.graphs = StepGraphs(
            backend,
            _Step(model, backend),
            max_tokens=config.max_batch_tokens,
            max_requests=config.max_batch_requests,
            max_blocks=-(-config.max_model_len // config.block_size),
            max_scored_rows=config.max_prompt_logprob_rows,
            samples="generate" in model.tasks,
            enforce_eager=enforce_eager,
        )
        self._backend = backend
        self._model = model
        self._weights = weights
        self._kv = kv
        self._specs = list(dict.fromkeys(model.attention_specs()))
        self._last_ids: torch.Tensor | None = None
        """int32 [R]: token ids sampled by the last step, on the device."""

    def execute(self, step: HostStep) -> StepInFlight:
        """Enqueue a step and the copies of its output to the host.

        Raises:
            BackendError: the device failed.
        """
        with self._backend.device_errors():
            if step.block_copies:
                self._copy_blocks(step.block_copies)
            inputs = self.inputs(step)
            self._kv, out = self.graphs.step_for(inputs)(self._weights, self._kv, inputs)
            self._last_ids = out.token_ids
            return self._to_host(out, returns_states=step.returns_states)

    def try_out(self, step: HostStep) -> None:
        """Execute a step that belongs to no request, and wait for it; captures it if need be.

        Raises:
            BackendError: the device failed.
        """
        with self._backend.device_errors():
            self._run(self.inputs(step))

    def capture_all(self, steps: Sequence[HostStep], progress: Callable[[float], None]) -> None:
        """Capture a step of each of these sizes, then run each once.

        Args:
            steps: steps of padding.
            progress: called with the share that is done, 0 to 1.

        Raises:
            BackendError: the device failed.
        """
        inputs = [self.inputs(step) for step in steps]
        captured = [self.graphs.step_for(each) for each in inputs]
        self._backend.build(
            captured, self._weights, self._kv, progress, identity=_identity(self._model)
        )
        for each in inputs:
            self._run(each)
        if self._kv is not None:  # block copies are a program of their own, on such a device
            self._copy_blocks([(0, 0)])

    def _run(self, inputs: StepInputs) -> None:
        self._kv, out = self.graphs.step_for(inputs)(self._weights, self._kv, inputs)
        self._backend.to_host(out.token_ids).result()

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        pairs = np.array(copies, np.int32)
        src, dst = (self._backend.to_device(np.ascontiguousarray(x)) for x in pairs.T)
        self._kv = self._backend.kv_copy(self._kv, src, dst)

    # -- host to device -----------------------------------------------------------------------

    def inputs(self, step: HostStep) -> StepInputs:
        """Copy a step's arrays to the device, in one transfer where the backend has that.

        The order of the arrays depends on nothing but the step's bucket, up to those of rare kinds
        of sampling, which come last: a backend may rely on it to keep their addresses.
        """
        arrays, send = step.arrays, self._backend.to_device
        previous = arrays.previous_rows
        if previous is None and step.bucket is not None:
            previous = np.full(step.bucket.num_tokens, -1, np.int32)
        with self._backend.step_uploads():
            meta = StepMeta(
                positions=send(arrays.positions),
                slot_mapping=send(arrays.slot_mapping),
                query_start_loc=send(arrays.query_start_loc),
                seq_lens=send(arrays.seq_lens),
                block_table=self._backend.block_table(
                    arrays.block_ids, arrays.block_starts, arrays.table_width
                ),
                logits_rows=send(step.wanted_rows),
                host_query_start_loc=arrays.query_start_loc,
                host_seq_lens=arrays.seq_lens,
                num_decodes=arrays.num_decodes,
                max_query_len=arrays.max_query_len,
                max_seq_len=arrays.max_seq_len,
                token_types=None if step.token_types is None else send(step.token_types),
                bucket=step.bucket,
            )
            return StepInputs(
                token_ids=send(arrays.token_ids),
                previous_ids=None if arrays.previous_rows is None else self._last_ids,
                previous_rows=None if previous is None else send(previous),
                meta=self._backend.prepare(meta, self._specs),
                sample=self._sample_params(step.sample, step.sample_positions),
                num_states=step.num_states,
            )

    def _sample_params(
        self, sample: SampleArrays, positions: npt.NDArray[np.int64]
    ) -> SampleParams:
        return SampleParams(
            position=self._backend.to_device(positions),
            **self._sent(sample.rows),
            penalties=Penalties(**self._sent(sample.penalties)) if sample.penalties else None,
            bias=LogitBias(**self._sent(sample.bias)) if sample.bias else None,
            is_greedy=sample.is_greedy,
            has_filters=sample.has_filters,
            num_logprobs=sample.num_logprobs,
        )

    def _sent(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        return {name: self._backend.to_device(array) for name, array in arrays.items()}

    # -- device to host -----------------------------------------------------------------------

    def _to_host(self, out: SampleOutput, *, returns_states: bool) -> StepInFlight:
        to_host, logprobs = self._backend.to_host, None
        states = to_host(out.states) if returns_states and out.states is not None else None
        token_ids = to_host(out.token_ids)
        if out.logprobs is not None:
            assert out.ranks is not None and out.top_ids is not None
            assert out.top_logprobs is not None
            logprobs = (
                to_host(out.logprobs),
                to_host(out.ranks),
                to_host(out.top_ids),
                to_host(out.top_logprobs),
            )
        return StepInFlight(token_ids=token_ids, logprobs=logprobs, states=states)


class _Step:
    """One step, from token ids to sampled ids and hidden states: the function that is captured."""

    def __init__(self, model: Model, backend: Backend) -> None:
        self._model = model
        self._backend = backend
        self._is_scorer = "score" in model.tasks
        self._samples = "generate" in model.tasks

    def __call__(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        token_ids = inputs.token_ids
        if inputs.previous_ids is not None and inputs.previous_rows is not None:
            rows = inputs.previous_rows
            previous = inputs.previous_ids[rows.clamp(min=0).long()]
            token_ids = torch.where(rows >= 0, previous.clamp(min=0), token_ids)  # -1: it failed
        kv, hidden = self._model.forward(self._backend, weights, kv, token_ids, inputs.meta)
        if not inputs.num_states and self._samples:
            logits = self._model.logits(self._backend, weights, hidden)
            return kv, self._backend.sample(logits, inputs.sample)
        num_rows = len(hidden) - inputs.num_states  # of logits
        out = SampleOutput(token_ids=token_ids[:0])
        if num_rows and self._samples:
            logits = self._model.logits(self._backend, weights, hidden[:num_rows])
            out = self._backend.sample(logits, inputs.sample)
        states = hidden[num_rows:]
        if self._is_scorer:
            states = self._model.logits(self._backend, weights, states)
        out.states = states.float()
        return kv, out


def _identity(model: Model) -> str:
    """Everything that a traced step depends on besides the shapes and dtypes of its inputs."""
    family = f"{type(model).__module__}.{type(model).__qualname__}"
    values = json.dumps(dict(model.config.values), sort_keys=True, default=repr)
    return f"{family} {model.dtype} {model.tasks} {model.config} {values}"

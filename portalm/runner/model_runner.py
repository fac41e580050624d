"""Runs step plans: a step plan in, the outcomes of its requests out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from portalm.backend import KV, Backend, Bucket, Weights
from portalm.config import SchedulerConfig
from portalm.core.plan import StepPlan
from portalm.runner.input_batch import InputBatch, IntArray, PaddedShape, StepArrays
from portalm.runner.pooler import PooledPart, Pooler, pooled_parts, state_rows
from portalm.runner.sampled_rows import SampledRow, sampled_rows
from portalm.runner.sampler import Sampler, positions_of
from portalm.runner.step_executor import HostStep, StepExecutor
from portalm.runner.step_results import DispatchedStep

if TYPE_CHECKING:
    from portalm.models.model import Model


class ModelRunner:
    """Turns plans into host arrays, has them executed, and reads the output.

    `dispatch` only enqueues where the backend is asynchronous; `DispatchedStep.result` waits.
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
            weights: returned by `model.load`.
            kv: returned by `backend.kv_alloc` for `config.num_blocks` blocks; None: no KV cache.
            backend: the device that holds both.
            config: limits of a step.
            enforce_eager: do not capture steps.
        """
        self.batch = InputBatch(config)
        self.executor = StepExecutor(
            model, weights, kv, backend, config, enforce_eager=enforce_eager
        )
        self.graphs = self.executor.graphs
        self._sampler = Sampler(model.config.vocab_size)
        self._pooler = Pooler()
        self._samples = "generate" in model.tasks
        self._has_token_types = kv is None  # encoders
        self._sampled_rows: dict[str, int] = {}
        """By request id: the row of the last dispatched step that samples its token."""

    def forget(self, request_ids: list[str]) -> None:
        """Free the rows and drop the state of requests that no longer run."""
        self.batch.forget(request_ids)
        self._pooler.forget(request_ids)
        self._sampler.forget(request_ids)

    # -- steps --------------------------------------------------------------------------------

    def dispatch(self, plan: StepPlan) -> DispatchedStep:
        """Start computing `plan`, which must not be empty.

        Raises:
            BackendError: the device failed.
        """
        self.forget(plan.released)
        batch_rows = self.batch.update(plan)
        rows, parts = sampled_rows(plan), pooled_parts(plan)
        step = self._host_step(plan, batch_rows, rows, parts)
        in_flight = self.executor.execute(step)
        self._sampled_rows = {
            row.request.request_id: i for i, row in enumerate(rows) if row.target < 0
        }
        return DispatchedStep(plan, rows, parts, self._pooler, in_flight)

    def _host_step(
        self,
        plan: StepPlan,
        batch_rows: npt.NDArray[np.intp],
        rows: list[SampledRow],
        parts: list[PooledPart],
    ) -> HostStep:
        longest = max(p.start + p.num_tokens for p in plan.requests)
        num_states = sum(part.num_states for part in parts)
        bucket, pad = self.graphs.shape(
            plan.num_tokens,
            len(plan.requests),
            -(-longest // self.batch.block_size),
            len(rows),
            num_states,
            max_query_len=max(p.num_tokens for p in plan.requests),
        )
        arrays = self.batch.build(
            plan,
            batch_rows,
            sampled_rows=self._sampled_rows,
            pad=pad,
            min_logits_rows=0 if num_states else 1,
        )
        wanted = arrays.logits_rows
        if num_states:
            wanted = np.concatenate([wanted, state_rows(parts, arrays.query_start_loc)])
        if pad is not None:
            wanted = np.pad(wanted, (0, pad.num_states - num_states))
            num_states = pad.num_states
        return HostStep(
            arrays=arrays,
            wanted_rows=wanted,
            num_states=num_states,
            returns_states=bool(parts),
            sample=self._sampler.build(rows, arrays, self.batch),
            sample_positions=positions_of(rows, len(arrays.logits_rows)),
            bucket=bucket,
            token_types=_token_types(plan, arrays) if self._has_token_types else None,
            block_copies=plan.block_copies,
        )

    # -- captures -----------------------------------------------------------------------------

    def capture_next(self) -> bool:
        """Capture one more bucket; return False if none is left.

        Nothing may be in flight.

        Raises:
            BackendError: the device failed.
        """
        bucket = self.graphs.next_to_capture()
        if bucket is None:
            return False
        [shape] = self.graphs.shapes(bucket)
        self.executor.try_out(self._padding(bucket, shape))
        self.graphs.note_captured()
        return True

    def capture_all(self, progress: Callable[[float], None]) -> None:
        """Capture a step of every padded shape, and run each once.

        Nothing may be in flight.

        Args:
            progress: called with the share that is done, 0 to 1.

        Raises:
            BackendError: the device failed.
        """
        steps: list[HostStep] = []
        while (bucket := self.graphs.next_to_capture()) is not None:
            steps += [self._padding(bucket, shape) for shape in self.graphs.shapes(bucket)]
            self.graphs.note_captured()
        self.executor.capture_all(steps, progress)

    def run_largest(self) -> None:
        """Run a step with the maximum of tokens, requests and rows, to measure its memory.

        All of its blocks are the null block. It uses every kind of sampling.

        Raises:
            BackendError: the device failed.
        """
        config = self.batch.config
        num_rows = config.max_batch_requests + config.max_prompt_logprob_rows
        arrays = self.batch.largest(num_rows)
        self.executor.try_out(
            HostStep(
                arrays=arrays,
                wanted_rows=arrays.logits_rows,
                num_states=0 if self._samples else num_rows,
                returns_states=False,
                sample=self._sampler.every_kind(num_rows),
                sample_positions=positions_of([], num_rows),
                bucket=None,
            )
        )

    def _padding(self, bucket: Bucket, shape: PaddedShape) -> HostStep:
        """A step of padding alone."""
        arrays = self.batch.padding(shape)
        return HostStep(
            arrays=arrays,
            wanted_rows=np.zeros(shape.num_rows + shape.num_states, np.int32),
            num_states=shape.num_states,
            returns_states=False,
            sample=self._sampler.build([], arrays, self.batch),
            sample_positions=positions_of([], shape.num_rows),
            bucket=bucket,
            token_types=np.zeros(shape.num_tokens, np.int32) if self._has_token_types else None,
        )


def _token_types(plan: StepPlan, arrays: StepArrays) -> IntArray:
    """[T]: 1 for tokens of the second text of a pair, 0 for all others and for pad tokens."""
    types = np.zeros(len(arrays.positions), np.int32)
    for i, planned in enumerate(plan.requests):
        second = planned.request.second_text_start
        if second is not None:
            start = int(arrays.query_start_loc[i])
            types[start + second : start + planned.num_tokens] = 1
    return types

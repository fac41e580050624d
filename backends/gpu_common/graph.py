"""Steps captured as device graphs: per bucket graphs of the forward pass and one of sampling.

A step's inputs arrive at fixed addresses (step_uploads.py), where its graphs read them; inputs that
come another way are copied first. The captured sampling covers temperature, greedy rows, top_k,
top_p and min_p, selected per row on the device. Rarer parameters (penalties, bias, masks, logprobs,
targets) replay the forward pass and then sample without a graph.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch

from portalm.backend import (
    KV,
    Bucket,
    SampleOutput,
    SampleParams,
    StepFn,
    StepInputs,
    Weights,
)
from portalm.errors import BackendError
from portalm_backends.gpu_common.device import Gpu, Graph
from portalm_backends.gpu_common.step_uploads import StepUploads
from portalm_backends.gpu_common.transfers import Transfers

Sample = Callable[[torch.Tensor, SampleParams], SampleOutput]


class Graphs:
    """All captured steps of one backend; they share memory, because only one runs at a time."""

    def __init__(
        self, gpu: Gpu, transfers: Transfers, uploads: StepUploads, sample: Sample
    ) -> None:
        """Start with nothing captured.

        Args:
            gpu: device to capture and replay on.
            transfers: a replay waits for its downloads before it overwrites their source.
            uploads: graphs read the inputs that it uploads where they arrive.
            sample: samples outside of graphs, and is captured.
        """
        self.gpu = gpu
        self.transfers = transfers
        self.uploads = uploads
        self.sample = sample
        self.stream = gpu.new_stream()
        """Stream for captures: the default stream cannot be captured."""
        self.is_sealed = False
        self.sample_override: Callable[[torch.Tensor], SampleOutput] | None = None
        """While a step is captured, the backend's `sample` calls this with the logits [R, V]."""
        self._steps: weakref.WeakValueDictionary[tuple[int, Bucket], CapturedStep]
        self._steps = weakref.WeakValueDictionary()
        self._results: weakref.WeakValueDictionary[int, Results] = weakref.WeakValueDictionary()

    def step(self, fn: StepFn, bucket: Bucket) -> CapturedStep:
        """Return the captured step of `bucket`, for any sampling; its first call captures it.

        Raises:
            BackendError: `bucket` has no captured step yet, and the backend is sealed.
        """
        key = (id(fn), bucket)  # a captured step keeps its function alive
        found = self._steps.get(key)
        if found is None:
            self.require_open(bucket)
            found = self._steps[key] = CapturedStep(self, fn, bucket)
        return found

    def require_open(self, bucket: Bucket | None) -> None:
        """Raise `BackendError` if the backend is sealed."""
        if self.is_sealed:
            raise BackendError(
                "unsupported",
                f"cannot capture a step of {bucket} after startup: the scheduler needs a step size "
                f"that `buckets` does not list",
            )

    @contextmanager
    def sampling_with(self, sample: Callable[[torch.Tensor], SampleOutput]) -> Iterator[None]:
        """Context in which the backend samples with `sample`."""
        self.sample_override = sample
        try:
            yield
        finally:
            self.sample_override = None

    def wait_for_downloads(self) -> None:
        """Run work that is enqueued from now on after all copies to the host."""
        if self.transfers.last_download is not None:
            self.gpu.current_stream().wait_event(self.transfers.last_download)

    def results(self, fn: StepFn, num_rows: int, vocab_size: int) -> Results:
        """Output buffers for captures of `fn`: made for the largest, which must come first."""
        found = self._results.get(id(fn))
        if found is None or found.logits.shape[1] != vocab_size or len(found.ids) < num_rows:
            handle = self.gpu.handle
            found = self._results[id(fn)] = Results(
                logits=torch.empty(num_rows, vocab_size, device=handle),
                ids=torch.zeros(num_rows, dtype=torch.int32, device=handle),
                pool=self.gpu.new_pool(),
            )
        return found


@dataclasses.dataclass(eq=False)
class Results:
    """Output buffers that all captured steps share; each step overwrites the previous one's."""

    logits: torch.Tensor
    """float32 [R, V]"""
    ids: torch.Tensor
    """int32 [R]; the next step reads them here without a copy."""
    pool: Any
    """Memory pool of the graphs. It is freed with its last graph and cannot be used afterwards."""


class CapturedStep:
    """The graphs of one bucket and the buffers that they read."""

    def __init__(self, graphs: Graphs, fn: StepFn, bucket: Bucket) -> None:
        """Remember the step; its first call captures it."""
        self._graphs = graphs
        self._fn = fn
        self._bucket = bucket
        self._kv: KV = None
        self._static: StepInputs | None = None
        self._results: Results | None = None
        self._forward: dict[bool, Graph] = {}
        """By `_splits`: the forward pass. A bucket whose steps may be whole has both."""
        self._sampling: Graph | None = None

    def __call__(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        """Run the step; the next captured step overwrites the ids that this returns."""
        if inputs.num_states:  # pooled prompts are computed once: a capture gains little
            return self._fn(weights, kv, inputs)
        if not self._forward:
            self._capture(weights, kv, inputs)
        if not self._holds(inputs):
            return self._fn(weights, kv, inputs)
        if kv is not self._kv:
            raise BackendError("shape", "a captured step was called with a different KV cache")
        assert self._sampling is not None and self._results is not None
        self._copy_inputs(inputs)
        # the graph with the launches for split contexts computes every step
        self._forward.get(_splits(inputs), self._forward[True]).replay()
        if not _is_plain(inputs.sample):
            return kv, self._graphs.sample(self._rows(self._results.logits), inputs.sample)
        self._graphs.wait_for_downloads()  # this replay overwrites the ids that they read
        self._sampling.replay()
        return kv, SampleOutput(token_ids=self._rows(self._results.ids))

    # -- capturing ----------------------------------------------------------------------------

    def _capture(self, weights: Weights, kv: KV, inputs: StepInputs) -> None:
        graphs, gpu = self._graphs, self._graphs.gpu
        graphs.require_open(self._bucket)
        main = gpu.current_stream()
        graphs.stream.wait_stream(main)
        with gpu.on(graphs.stream):
            static = self._fixed(inputs)
            static.sample = _plain(static.sample)
            # run once without a graph: this compiles and loads every kernel, lets libraries
            # allocate their workspaces, and gives the number of columns of the logits
            vocab_size = self._warm_up(weights, kv, _with_splits(static, splits=True))
            num_rows = len(static.meta.logits_rows)
            self._results = graphs.results(self._fn, num_rows, vocab_size)
            static.previous_ids = self._results.ids
            self._static = static
            self._record(weights, kv)
            self._kv = kv
        main.wait_stream(graphs.stream)

    def _fixed(self, inputs: StepInputs) -> StepInputs:
        """The inputs with fixed addresses: where they are, if every step uploads to there."""
        rows = inputs.previous_rows
        if rows is None:
            rows = torch.full_like(inputs.token_ids, -1)
        ids = torch.zeros_like(inputs.meta.logits_rows)
        static = dataclasses.replace(inputs, previous_ids=ids, previous_rows=rows)
        return cast(StepInputs, _with_own_tensors(static, self._graphs.uploads.is_fixed))

    def _warm_up(self, weights: Weights, kv: KV, static: StepInputs) -> int:
        """Run the step without a graph; return the number of columns of its logits."""
        vocab_sizes = []

        def sample(logits: torch.Tensor) -> SampleOutput:
            vocab_sizes.append(logits.shape[1])
            return self._graphs.sample(logits, static.sample)

        with self._graphs.sampling_with(sample):
            self._fn(weights, kv, static)
        return vocab_sizes[-1]

    def _record(self, weights: Weights, kv: KV) -> None:
        """Record the step into graphs: one or two of the forward pass, and one that samples."""
        assert self._static is not None
        forward: dict[bool, Graph] = {}
        if any(plan.may_be_whole for plan in self._static.meta.plan.values()):
            whole = _with_splits(self._static, splits=False)
            forward[False], _ = self._record_forward(weights, kv, whole, samples=False)
        static = _with_splits(self._static, splits=True)
        forward[True], self._sampling = self._record_forward(weights, kv, static, samples=True)
        self._forward = forward

    def _record_forward(
        self, weights: Weights, kv: KV, static: StepInputs, *, samples: bool
    ) -> tuple[Graph, Graph]:
        """Record up to where the step samples, and if `samples` the rest into a second graph."""
        assert self._results is not None
        graphs, pool = self._graphs, self._results.pool
        logits, ids = self._rows(self._results.logits), self._rows(self._results.ids)
        forward, sampling = graphs.gpu.new_graph(), graphs.gpu.new_graph()
        open_graph: Graph | None = forward

        def split(raw: torch.Tensor) -> SampleOutput:
            nonlocal open_graph
            if raw.data_ptr() != logits.data_ptr():
                logits.copy_(raw)
            forward.capture_end()
            open_graph = None
            if samples:
                sampling.capture_begin(pool, _CAPTURE_MODE)
                open_graph = sampling
                ids.copy_(graphs.sample(logits, static.sample).token_ids)
            return SampleOutput(token_ids=ids)

        forward.capture_begin(pool, _CAPTURE_MODE)
        try:
            with graphs.sampling_with(split):
                self._fn(weights, kv, static)
        except BaseException:
            if open_graph is not None:
                with suppress(RuntimeError):  # the original error has the better message
                    open_graph.capture_end()
            raise
        if open_graph is not None:
            open_graph.capture_end()
        return forward, sampling

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """The bucket's rows of a shared output buffer."""
        assert self._static is not None
        return x[: len(self._static.meta.logits_rows)]

    # -- replaying ----------------------------------------------------------------------------

    def _holds(self, inputs: StepInputs) -> bool:
        """True if the sizes of `inputs` are those that were captured."""
        assert self._static is not None and self._results is not None
        # prompt logprobs need more rows of logits than there are requests
        if inputs.meta.logits_rows.shape != self._static.meta.logits_rows.shape:
            return False
        return inputs.previous_ids is None or len(inputs.previous_ids) <= len(self._results.ids)

    def _copy_inputs(self, inputs: StepInputs) -> None:
        """Copy the inputs that are not yet where the graphs read them."""
        assert self._static is not None
        self._copy_previous(inputs)
        targets: dict[torch.dtype, list[torch.Tensor]] = {}
        sources: dict[torch.dtype, list[torch.Tensor]] = {}
        pairs = zip(_leaves(self._static), _leaves(inputs), strict=True)
        for place, (target, source) in enumerate(pairs):
            if target.shape != source.shape or target.dtype != source.dtype:
                raise BackendError(
                    "shape",
                    f"input {place} of a step of {self._bucket} is {source.dtype} "
                    f"{list(source.shape)}, but {target.dtype} {list(target.shape)} was captured",
                )
            if target is source or target.data_ptr() == source.data_ptr():
                continue
            if self._graphs.uploads.is_fixed(source):  # it may overlap the target of another copy
                source = source.clone()
            targets.setdefault(target.dtype, []).append(target)
            sources.setdefault(target.dtype, []).append(source)
        for dtype, many in targets.items():
            torch._foreach_copy_(many, sources[dtype])  # one launch for all of them

    def _copy_previous(self, inputs: StepInputs) -> None:
        """Copy the previous step's ids, unless they already are in the buffer of the graphs."""
        assert self._static is not None and self._results is not None
        rows = self._static.previous_rows
        assert rows is not None
        if inputs.previous_rows is None:
            rows.fill_(-1)
        if inputs.previous_ids is None:
            return
        if inputs.previous_ids.data_ptr() != self._results.ids.data_ptr():
            self._graphs.wait_for_downloads()
            self._results.ids[: len(inputs.previous_ids)].copy_(inputs.previous_ids)


_CAPTURE_MODE = "thread_local"
"""Calls of other threads (a health probe) do not break the capture."""

_CAPTURED_PARAMS = ("temperature", "top_k", "top_p", "min_p", "seed", "position")


def _is_plain(params: SampleParams) -> bool:
    """True if the captured sampling covers `params`."""
    rare = (params.penalties, params.bias, params.allowed, params.targets, params.num_logprobs)
    return all(x is None for x in rare)


def _plain(params: SampleParams) -> SampleParams:
    """Parameters to capture sampling with, which cover every plain case."""
    columns = {name: getattr(params, name) for name in _CAPTURED_PARAMS}
    return SampleParams(**columns, is_greedy=False, has_filters=True)


def _with_own_tensors(value: Any, is_fixed: Callable[[torch.Tensor], bool]) -> Any:
    """`value` with new memory for every tensor in it that is not fixed already."""
    if isinstance(value, torch.Tensor):
        return value if is_fixed(value) else value.clone()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        own = {name: _with_own_tensors(field, is_fixed) for name, field in fields.items()}
        return dataclasses.replace(value, **own)
    if isinstance(value, dict):
        return {k: _with_own_tensors(v, is_fixed) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_own_tensors(v, is_fixed) for v in value)
    return value


def _splits(inputs: StepInputs) -> bool:
    """True if attention splits a context of the step."""
    return any(plan.splits for plan in inputs.meta.plan.values())


def _with_splits(inputs: StepInputs, *, splits: bool) -> StepInputs:
    """The same inputs, with or without the launches for split contexts."""
    plan = {
        spec: dataclasses.replace(plan, splits=splits) for spec, plan in inputs.meta.plan.items()
    }
    return dataclasses.replace(inputs, meta=dataclasses.replace(inputs.meta, plan=plan))


def _leaves(inputs: StepInputs) -> list[torch.Tensor]:
    """Tensors that the graphs read, in a fixed order; without the previous step's ids."""
    meta, sample = inputs.meta, inputs.sample
    leaves = [
        inputs.token_ids,
        meta.positions,
        meta.slot_mapping,
        meta.query_start_loc,
        meta.seq_lens,
        meta.block_table,
        meta.logits_rows,
    ]
    leaves += [getattr(sample, name) for name in _CAPTURED_PARAMS]
    if meta.token_types is not None:
        leaves.append(meta.token_types)
    leaves.extend(_tensors(meta.plan))
    return leaves


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in the result of `prepare`, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)

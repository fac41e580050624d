"""Steps captured as graphs of the device: one forward pass a bucket, and one draw behind it.

What a step reads is copied into buffers that never move; then its graph is replayed. The draw that
is captured covers temperature, greedy rows, top_k, top_p and min_p, told apart on the device. What
is rarer (penalties, bias, masks, logprobs, targets) replays the forward pass and draws as it is.
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
from portalm_backends.gpu_common.transfers import Transfers

Sample = Callable[[torch.Tensor, SampleParams], SampleOutput]


def decode_buckets(max_requests: int, max_blocks: int) -> list[Bucket]:
    """Steps of one token a request: 1, 2, 4, 8, then by 8 up to `max_requests`, which is one."""
    sizes = {n for n in (1, 2, 4) if n < max_requests}
    sizes |= {*range(8, max_requests, 8), max_requests}
    return [Bucket(n, n, max_blocks, 1) for n in sorted(sizes)]


class Graphs:
    """All captured steps of one backend: they share memory, as one runs at a time."""

    def __init__(self, gpu: Gpu, transfers: Transfers, sample: Sample) -> None:
        """Nothing is captured.

        Args:
            gpu: captures and replays.
            transfers: whose downloads a replay must not overtake.
            sample: draws.
        """
        self.gpu = gpu
        self.transfers = transfers
        self.sample = sample
        self.stream = gpu.new_stream()
        """What captures are made on: the device's own default stream cannot be captured."""
        self.is_sealed = False
        self.draw: Callable[[torch.Tensor], SampleOutput] | None = None
        """While a step is captured: what is done with its logits, [R, V]."""
        self._steps: weakref.WeakValueDictionary[tuple[int, Bucket], CapturedStep]
        self._steps = weakref.WeakValueDictionary()
        self._results: weakref.WeakValueDictionary[int, Results] = weakref.WeakValueDictionary()

    def step(self, fn: StepFn, bucket: Bucket) -> CapturedStep:
        """The captured step of `bucket`, captured when it is first called, for any sampling.

        Raises:
            BackendError: there is none yet, and no more may be captured.
        """
        key = (id(fn), bucket)  # a captured step keeps its function alive
        found = self._steps.get(key)
        if found is None:
            self.require_open(bucket)
            found = self._steps[key] = CapturedStep(self, fn, bucket)
        return found

    def require_open(self, bucket: Bucket | None) -> None:
        """`BackendError` once sealed."""
        if self.is_sealed:
            raise BackendError(
                "unsupported",
                f"a step of {bucket} was to be captured after all captures were done: service "
                f"needs a step size that `buckets` does not name",
            )

    @contextmanager
    def drawing_by(self, draw: Callable[[torch.Tensor], SampleOutput]) -> Iterator[None]:
        """Within it the backend draws by `draw`."""
        self.draw = draw
        try:
            yield
        finally:
            self.draw = None

    def wait_for_downloads(self) -> None:
        """What is enqueued from now on runs behind all copies to the host."""
        if self.transfers.last_download is not None:
            self.gpu.current_stream().wait_event(self.transfers.last_download)

    def results(self, fn: StepFn, num_rows: int, vocab_size: int) -> Results:
        """Where captures of `fn` leave logits and ids: the largest comes first, others share it."""
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
    """What every captured step writes, until the next one does."""

    logits: torch.Tensor
    """float32 [R, V]"""
    ids: torch.Tensor
    """int32 [R]: also what the step after reads, without a copy."""
    pool: Any
    """The memory of the graphs. It goes when they go: one whose graphs are gone takes no others."""


class CapturedStep:
    """One bucket's graphs and the buffers that they read."""

    def __init__(self, graphs: Graphs, fn: StepFn, bucket: Bucket) -> None:
        """To be captured by the first call."""
        self._graphs = graphs
        self._fn = fn
        self._bucket = bucket
        self._kv: KV = None
        self._static: StepInputs | None = None
        self._results: Results | None = None
        self._forward: Graph | None = None
        self._draw: Graph | None = None
        self._given: dict[int, torch.Tensor] = {}
        """By place in the inputs: the tensor that was copied there last."""
        self._reads_previous = False
        """Some row of the buffer for previous_rows is not -1."""

    def __call__(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        """The step; ids are in memory that the next captured step writes again."""
        if inputs.num_states:  # pooled prompts are not decodes: nothing is gained by a capture
            return self._fn(weights, kv, inputs)
        if self._forward is None:
            self._capture(weights, kv, inputs)
        if not self._holds(inputs):
            return self._fn(weights, kv, inputs)
        if kv is not self._kv:
            raise BackendError("shape", "a captured step was given another KV cache than before")
        assert self._forward is not None and self._draw is not None and self._results is not None
        self._take(inputs)
        self._forward.replay()
        if not _is_plain(inputs.sample):
            return kv, self._graphs.sample(self._rows(self._results.logits), inputs.sample)
        self._graphs.wait_for_downloads()  # of the ids that are written over now
        self._draw.replay()
        return kv, SampleOutput(token_ids=self._rows(self._results.ids))

    # -- capturing ----------------------------------------------------------------------------

    def _capture(self, weights: Weights, kv: KV, inputs: StepInputs) -> None:
        graphs, gpu = self._graphs, self._graphs.gpu
        graphs.require_open(self._bucket)
        main = gpu.current_stream()
        graphs.stream.wait_stream(main)
        with gpu.on(graphs.stream):
            static = dataclasses.replace(
                _copies(inputs),
                previous_ids=torch.zeros_like(inputs.meta.logits_rows),
                previous_rows=torch.full_like(inputs.token_ids, -1),
            )
            static.sample = _plain(static.sample)
            # once as it is: every kernel is compiled and loaded, libraries take their workspaces,
            # and the number of columns of the logits is known
            vocab_size = self._rehearse(weights, kv, static)
            num_rows = len(static.meta.logits_rows)
            self._results = graphs.results(self._fn, num_rows, vocab_size)
            static.previous_ids = self._results.ids
            self._static = static
            self._record(weights, kv)
            self._kv = kv
        main.wait_stream(graphs.stream)

    def _rehearse(self, weights: Weights, kv: KV, static: StepInputs) -> int:
        """Run the step as it is; the number of columns of its logits."""
        vocab_sizes = []

        def draw(logits: torch.Tensor) -> SampleOutput:
            vocab_sizes.append(logits.shape[1])
            return self._graphs.sample(logits, static.sample)

        with self._graphs.drawing_by(draw):
            self._fn(weights, kv, static)
        return vocab_sizes[-1]

    def _record(self, weights: Weights, kv: KV) -> None:
        """Run the step once, into two graphs: the second begins where it draws."""
        assert self._static is not None and self._results is not None
        graphs, static = self._graphs, self._static
        logits, ids = self._rows(self._results.logits), self._rows(self._results.ids)
        forward, draw = graphs.gpu.new_graph(), graphs.gpu.new_graph()
        open_graph, pool = forward, self._results.pool

        def split(raw: torch.Tensor) -> SampleOutput:
            nonlocal open_graph
            if raw.data_ptr() != logits.data_ptr():
                logits.copy_(raw)
            forward.capture_end()
            draw.capture_begin(pool, _CAPTURE_MODE)
            open_graph = draw
            ids.copy_(graphs.sample(logits, static.sample).token_ids)
            return SampleOutput(token_ids=ids)

        forward.capture_begin(pool, _CAPTURE_MODE)
        try:
            with graphs.drawing_by(split):
                self._fn(weights, kv, static)
        except BaseException:
            with suppress(RuntimeError):  # what broke the capture is the better message
                open_graph.capture_end()
            raise
        open_graph.capture_end()
        self._forward, self._draw = forward, draw

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """The share that the bucket has of what all captures write to."""
        assert self._static is not None
        return x[: len(self._static.meta.logits_rows)]

    # -- replaying ----------------------------------------------------------------------------

    def _holds(self, inputs: StepInputs) -> bool:
        """True if the graphs can compute this step of their bucket."""
        assert self._static is not None and self._results is not None
        # prompt logprobs want more rows than there are requests
        if inputs.meta.logits_rows.shape != self._static.meta.logits_rows.shape:
            return False
        return inputs.previous_ids is None or len(inputs.previous_ids) <= len(self._results.ids)

    def _take(self, inputs: StepInputs) -> None:
        """Copy what this step reads to where the graphs read it."""
        assert self._static is not None
        self._take_previous(inputs)
        targets: dict[torch.dtype, list[torch.Tensor]] = {}
        sources: dict[torch.dtype, list[torch.Tensor]] = {}
        pairs = zip(_leaves(self._static), _leaves(inputs), strict=True)
        for place, (target, source) in enumerate(pairs):
            if self._given.get(place) is source:
                continue
            if target.shape != source.shape or target.dtype != source.dtype:
                raise BackendError(
                    "shape",
                    f"input {place} of a step of {self._bucket} is {source.dtype} "
                    f"{list(source.shape)}, it was captured with {target.dtype} "
                    f"{list(target.shape)}",
                )
            self._given[place] = source
            targets.setdefault(target.dtype, []).append(target)
            sources.setdefault(target.dtype, []).append(source)
        for dtype, many in targets.items():
            torch._foreach_copy_(many, sources[dtype])  # one launch for all of them

    def _take_previous(self, inputs: StepInputs) -> None:
        """Ids that the step before drew: mostly they are where the graphs read them already."""
        assert self._static is not None and self._results is not None
        rows = self._static.previous_rows
        assert rows is not None
        if inputs.previous_ids is None or inputs.previous_rows is None:
            if self._reads_previous:
                rows.fill_(-1)
            self._reads_previous = False
            return
        self._reads_previous = True
        rows.copy_(inputs.previous_rows)
        if inputs.previous_ids.data_ptr() != self._results.ids.data_ptr():
            self._graphs.wait_for_downloads()
            self._results.ids[: len(inputs.previous_ids)].copy_(inputs.previous_ids)


_CAPTURE_MODE = "thread_local"
"""What other threads do meanwhile (a health probe) does not break the capture."""

_DRAWN_BY = ("temperature", "top_k", "top_p", "min_p", "seed", "position")


def _is_plain(params: SampleParams) -> bool:
    """True if the captured draw covers it."""
    rare = (params.penalties, params.bias, params.allowed, params.targets, params.num_logprobs)
    return all(x is None for x in rare)


def _plain(params: SampleParams) -> SampleParams:
    """The kind of draw that covers all plain ones."""
    columns = {name: getattr(params, name) for name in _DRAWN_BY}
    return SampleParams(**columns, is_greedy=False, has_filters=True)


def _copies(inputs: StepInputs) -> StepInputs:
    """The same, in memory of its own."""
    return cast(StepInputs, _with_own_tensors(inputs))


def _with_own_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{k: _with_own_tensors(v) for k, v in fields.items()})
    if isinstance(value, dict):
        return {k: _with_own_tensors(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_own_tensors(v) for v in value)
    return value


def _leaves(inputs: StepInputs) -> list[torch.Tensor]:
    """Every tensor that the graphs read, but for the ids of the step before; in a fixed order."""
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
    leaves += [getattr(sample, name) for name in _DRAWN_BY]
    if meta.token_types is not None:
        leaves.append(meta.token_types)
    leaves.extend(_tensors(meta.plan))
    return leaves


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those in what `prepare` made, in a fixed order."""
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

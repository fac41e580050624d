"""A step as one XLA program of fixed sizes, from token ids to sampled ids.

A program takes a step's inputs in one array (packing.py); weights stay on the device, and the KV
cache is donated and returned. Sampling other than temperatures and filters is a second, small
program on the same logits (finishing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch

from portalm.backend import KV, SampleOutput, StepFn, StepInputs, Weights
from portalm.errors import BackendError
from portalm_backends.xla import packing
from portalm_backends.xla.bridge import (
    Bridge,
    device_errors,
    leaves,
    replace_leaves,
    with_leaves,
)
from portalm_backends.xla.finishing import Finisher, is_needed
from portalm_backends.xla.sampling import SamplingArrays, sample
from portalm_backends.xla.store import Source, Store, Traced

Array: TypeAlias = Any


class Trace:
    """The step that is being traced: its sampling parameters and its logits."""

    def __init__(self, arrays: SamplingArrays) -> None:
        """Sample with `arrays`."""
        self._arrays = arrays
        self.logits: Array | None = None
        """float32 [R, V]; None if the step samples nothing."""

    def sample(self, logits: Array) -> Array:
        """Sample a token from each row of float32 [R, V]: int32 [R]; keep the logits."""
        self.logits = logits
        return sample(logits, self._arrays)


class Programs:
    """All programs of one backend, and their shared state."""

    def __init__(self, bridge: Bridge, store: Store, num_threads: int) -> None:
        """Start with no programs.

        Args:
            bridge: the devices.
            store: cache of traced programs.
            num_threads: number of threads that compile.
        """
        self.bridge = bridge
        self._store = store
        self._compilers = ThreadPoolExecutor(num_threads, "xla-compile")
        self.max_rows = 0
        """Most rows of any step: the next step reads sampled ids in an array of this size."""
        self.trace: Trace | None = None
        """The step that is being traced, if any."""
        self._last_ids: torch.Tensor | None = None
        self._padded_ids: Array = None
        """The ids in `_last_ids`, padded to `max_rows`."""
        self._finishers: dict[tuple[int, int], Finisher] = {}

    @contextmanager
    def tracing(self, trace: Trace) -> Iterator[None]:
        """Context in which torch operates on tracers and the backend samples with `trace`."""
        self.trace = trace
        try:
            with self.bridge.tracing():
                yield
        finally:
            self.trace = None

    def place(self, weights: Weights) -> None:
        """Move weights that are still on the host (all that are not packed) to the device."""
        bridge = self.bridge
        for name, value in weights.items():
            weights[name] = replace_leaves(value, lambda x: bridge.tensor(bridge.array(x)))

    def keep_ids(self, token_ids: torch.Tensor, padded_ids: Array) -> None:
        """Keep the ids that a step sampled, and their padded copy, for the next step."""
        self._last_ids, self._padded_ids = token_ids, padded_ids

    def previous(self, token_ids: torch.Tensor | None) -> Array:
        """int32 [max_rows]: `token_ids` padded; without a copy if the last step sampled them."""
        if token_ids is not None and token_ids is self._last_ids:
            return self._padded_ids
        previous = np.zeros(self.max_rows, np.int32)
        if token_ids is not None:
            previous[: len(token_ids)] = np.asarray(self.bridge.array(token_ids))
        return previous

    def compile(self, source: Source, what: str | None) -> tuple[Traced, Future[Any]]:
        """Trace a program and start compiling it on another thread.

        Args:
            source: the function and its arguments.
            what: identifies the function in the store; None: the program is not stored.

        Returns:
            The traced program and a future of the compiled one.
        """
        traced = source.trace() if what is None else self._store.traced(source, what)
        return traced, self._compilers.submit(self.bridge.compile, source, traced)

    def finisher(self, num_rows: int, vocab_size: int) -> Finisher:
        """The programs that run after steps with this many rows; created by the first call."""
        key = (num_rows, vocab_size)
        if key not in self._finishers:
            self._finishers[key] = Finisher(
                self.bridge, num_rows, vocab_size, max_rows=self.max_rows, compile=self.compile
            )
        return self._finishers[key]


class Program:
    """A step of one size: `begin` traces it, another thread compiles it, a call waits for that."""

    def __init__(self, programs: Programs, fn: StepFn, example: StepInputs) -> None:
        """Remember the step; tracing it needs weights and a cache, so `begin` does that.

        Args:
            programs: shared state of the backend's programs.
            fn: the step.
            example: inputs whose sizes the program is made for.
        """
        self._programs = programs
        self._fn = fn
        self._example = example
        self._layout = packing.Layout(packing.step_shapes(example))
        self._weights: Weights | None = None
        self._arrays: list[Array] = []
        self._compiled: Future[Any] | None = None
        self._finisher: Finisher | None = None

    def begin(self, weights: Weights, kv: KV, identity: str | None = None) -> None:
        """Trace the step, or read it from the store, and start compiling it.

        Args:
            weights: the step's weights.
            kv: the step's cache.
            identity: identifies the step, see `Backend.build`; None: the store is not used.
        """
        source = self.source(weights, kv)
        what = None if identity is None else f"{identity} {self._sizes(weights, kv)}"
        traced, self._compiled = self._programs.compile(source, what)
        logits = traced.out_tree.unflatten(traced.out_avals)[3]
        if logits is not None:
            self._finisher = self._programs.finisher(*logits.shape)

    def source(
        self, weights: Weights, kv: KV, sharding: jax.sharding.Sharding | None = None
    ) -> Source:
        """The step as a function of arrays, for these weights and this cache.

        `sharding` places all arguments and results on another device.
        """
        self._take(weights)
        bridge = self._programs.bridge

        def program(
            arrays: list[Array], layers: tuple[Any, ...], packed: Array, previous: Array
        ) -> tuple[Any, ...]:
            step_weights = with_leaves(weights, [bridge.tensor(a) for a in arrays])
            step_kv = None if kv is None else replace(kv, layers=layers)
            parts = self._layout.unpack(packed)
            trace = Trace(packing.sampling_arrays(parts))
            with self._programs.tracing(trace):
                step_kv, out = self._fn(step_weights, step_kv, self._inputs(parts, previous))
            ids = bridge.array(out.token_ids)
            padded_ids = jnp.pad(ids, (0, self._programs.max_rows - len(ids)))
            states = None if out.states is None else bridge.array(out.states)
            return () if kv is None else step_kv.layers, ids, padded_ids, trace.logits, states

        arguments = (
            self._arrays,
            () if kv is None else kv.layers,
            bridge.shape((self._layout.size,), jnp.int32),
            bridge.shape((self._programs.max_rows,), jnp.int32),
        )
        if sharding is not None:
            arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
            )
        # the cache keeps its sharding, all other results are replicated
        cache = jax.tree.map(lambda x: x.sharding, arguments[1])
        results = (cache, *[sharding or bridge.replicated] * 4)
        return Source(function=program, arguments=arguments, results=results, donated=(1,))

    def _sizes(self, weights: Weights, kv: KV) -> str:
        """Everything except arrays that the step's function reads from its inputs when traced."""
        example, meta = self._example, self._example.meta
        spec = None if kv is None else (kv.spec, kv.num_blocks)
        names = replace_leaves(weights, lambda _: "")  # the order of the arguments
        shapes = packing.step_shapes(example)
        return repr((meta.bucket, meta.max_query_len, shapes, example.num_states, spec, names))

    def wait(self) -> None:
        """Wait until the step and its finisher are compiled."""
        assert self._compiled is not None
        with device_errors("compiling a step"):
            self._compiled.result()
            if self._finisher is not None:
                self._finisher.wait()

    def step_bytes(self) -> int:
        """Bytes a step needs beyond weights and cache, by the compiled program's own analysis."""
        assert self._compiled is not None
        sizes = self._compiled.result().memory_analysis()
        if sizes is None:  # this XLA client has no such analysis
            return 0
        out = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return int(sizes.temp_size_in_bytes + out + sizes.generated_code_size_in_bytes)

    def __call__(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        """Enqueue one step; do not wait for it."""
        if self._compiled is None:
            self.begin(weights, kv)
            self.wait()
        assert self._compiled is not None
        self._take(weights)
        values = packing.step_values(inputs)
        needs_more = self._finisher is not None and is_needed(inputs.sample)
        if needs_more:  # the finisher samples instead: let the step do the least work
            values |= {"is_greedy": 1, "has_filters": 0}
        layers = () if kv is None else kv.layers
        previous = self._programs.previous(inputs.previous_ids)
        with device_errors("a step"):
            try:
                layers, ids, padded_ids, logits, states = self._compiled.result()(
                    self._arrays, layers, self._layout.pack(values), previous
                )
            except jax.errors.JaxRuntimeError as error:
                if any(array.is_deleted() for array in jax.tree.leaves(layers)):
                    raise BackendError(
                        "device_lost",
                        f"a step failed after the KV cache was donated to it, so the cache is "
                        f"lost: {error}",
                    ) from error
                raise
            if needs_more:
                assert self._finisher is not None
                out, padded_ids = self._finisher(logits, inputs.sample)
            else:
                out = SampleOutput(token_ids=self._programs.bridge.tensor(ids))
        if states is not None:
            out.states = self._programs.bridge.tensor(states)
        self._programs.keep_ids(out.token_ids, padded_ids)
        return kv if kv is None else replace(kv, layers=layers), out

    def _take(self, weights: Weights) -> None:
        """Collect the arrays of `weights`, unless they are the weights of the last call."""
        if weights is not self._weights:
            self._programs.place(weights)
            self._weights = weights
            self._arrays = [self._programs.bridge.array(tensor) for tensor in leaves(weights)]

    def _inputs(self, parts: dict[str, Array], previous: Array) -> StepInputs:
        """The step's inputs as the traced step sees them."""
        example, tensor = self._example, self._programs.bridge.tensor
        names = (
            "positions", "slot_mapping", "query_start_loc", "seq_lens", "block_table",
            "logits_rows", "token_types",
        )  # fmt: skip
        indices: dict[str, Any] = {name: tensor(parts[name]) for name in names if name in parts}
        plan = {"num_decodes": parts["num_decodes"]}
        return StepInputs(
            token_ids=tensor(parts["token_ids"]),
            meta=replace(example.meta, plan=plan, **indices),
            sample=example.sample,
            previous_ids=tensor(previous),
            previous_rows=tensor(parts["previous_rows"]),
            num_states=example.num_states,
        )

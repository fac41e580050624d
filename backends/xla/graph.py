"""A step as one XLA program of fixed sizes, from token ids to drawn ids.

What a program reads of a step comes in one array (packing.py); weights stay where they are, the
cache is donated and comes back. Whatever rows may ask for beside temperatures and filters is a
second, small program on the same logits (finishing.py).
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
from portalm_backends.xla.sampling import Draws, draw
from portalm_backends.xla.store import Source, Store, Traced

Array: TypeAlias = Any


class Trace:
    """The step that is being traced: what it samples with, and the logits it sampled from."""

    def __init__(self, draws: Draws) -> None:
        """With what the program reads of the rows."""
        self._draws = draws
        self.logits: Array | None = None
        """float32 [R, V]; None where nothing is drawn."""

    def sample(self, logits: Array) -> Array:
        """int32 [R]: what rows of float32 [R, V] draw."""
        self.logits = logits
        return draw(logits, self._draws)


class Programs:
    """All programs of one backend, and what they share."""

    def __init__(self, bridge: Bridge, store: Store, num_threads: int) -> None:
        """None yet.

        Args:
            bridge: to the device.
            store: of what was traced before.
            num_threads: that compile.
        """
        self.bridge = bridge
        self._store = store
        self._compilers = ThreadPoolExecutor(num_threads, "xla-compile")
        self.max_rows = 0
        """Of any step: how many ids a step hands to the next."""
        self.trace: Trace | None = None
        """Of the step that is being traced."""
        self._last_ids: torch.Tensor | None = None
        self._handed_on: Array = None
        """What goes with `_last_ids`: the same ids, padded to `max_rows`."""
        self._finishers: dict[tuple[int, int], Finisher] = {}

    @contextmanager
    def tracing(self, trace: Trace) -> Iterator[None]:
        """Within it torch computes on tracers, and sampling is that of `trace`."""
        self.trace = trace
        try:
            with self.bridge.tracing():
                yield
        finally:
            self.trace = None

    def place(self, weights: Weights) -> None:
        """Put what `load` left on the host (all but packed weights) on the device, for good."""
        bridge = self.bridge
        for name, value in weights.items():
            weights[name] = replace_leaves(value, lambda x: bridge.tensor(bridge.array(x)))

    def hand_on(self, token_ids: torch.Tensor, handed_on: Array) -> None:
        """Keep the ids that a step drew for the next one, which reads them as one size."""
        self._last_ids, self._handed_on = token_ids, handed_on

    def previous(self, token_ids: torch.Tensor | None) -> Array:
        """int32 [max_rows]: the ids of the step before, as that step left them on the device."""
        if token_ids is not None and token_ids is self._last_ids:
            return self._handed_on
        previous = np.zeros(self.max_rows, np.int32)
        if token_ids is not None:
            previous[: len(token_ids)] = np.asarray(self.bridge.array(token_ids))
        return previous

    def compile(self, source: Source, what: str | None) -> tuple[Traced, Future[Any]]:
        """A program as traced, and as another thread compiles it.

        Args:
            source: what it is made of.
            what: its function, for the store; None: it is not kept.
        """
        traced = source.trace() if what is None else self._store.traced(source, what)
        return traced, self._compilers.submit(self.bridge.compile, source, traced)

    def finisher(self, num_rows: int, vocab_size: int) -> Finisher:
        """The small programs behind steps of so many rows."""
        key = (num_rows, vocab_size)
        if key not in self._finishers:
            self._finishers[key] = Finisher(
                self.bridge, num_rows, vocab_size, max_rows=self.max_rows, compile=self.compile
            )
        return self._finishers[key]


class Program:
    """A step of one size: traced by `begin`, compiled by another thread, waited for when called."""

    def __init__(self, programs: Programs, fn: StepFn, example: StepInputs) -> None:
        """Nothing is traced yet: that takes weights and a cache.

        Args:
            programs: those it is one of.
            fn: the step.
            example: inputs of the sizes that it will have.
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
        """Trace the step over such weights and cache, or find it in the store; have it compiled.

        Args:
            weights: of the step.
            kv: the same.
            identity: of the step, as `Backend.build` words it; None: it is not looked for.
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
        """The step over such weights and cache; for another device, where one is named."""
        self._take(weights)
        bridge = self._programs.bridge

        def program(
            arrays: list[Array], layers: tuple[Any, ...], packed: Array, previous: Array
        ) -> tuple[Any, ...]:
            step_weights = with_leaves(weights, [bridge.tensor(a) for a in arrays])
            step_kv = None if kv is None else replace(kv, layers=layers)
            parts = self._layout.unpack(packed)
            trace = Trace(packing.draws_of(parts))
            with self._programs.tracing(trace):
                step_kv, out = self._fn(step_weights, step_kv, self._inputs(parts, previous))
            ids = bridge.array(out.token_ids)
            handed_on = jnp.pad(ids, (0, self._programs.max_rows - len(ids)))
            states = None if out.states is None else bridge.array(out.states)
            return () if kv is None else step_kv.layers, ids, handed_on, trace.logits, states

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
        # the cache comes back as it went in; the rest each device has all of
        cache = jax.tree.map(lambda x: x.sharding, arguments[1])
        results = (cache, *[sharding or bridge.whole] * 4)
        return Source(function=program, arguments=arguments, results=results, donated=(1,))

    def _sizes(self, weights: Weights, kv: KV) -> str:
        """All that the step's function reads of its inputs while it is traced, but arrays."""
        example, meta = self._example, self._example.meta
        spec = None if kv is None else (kv.spec, kv.num_blocks)
        names = replace_leaves(weights, lambda _: "")  # what lies where in the arguments
        shapes = packing.step_shapes(example)
        return repr((meta.bucket, meta.max_query_len, shapes, example.num_states, spec, names))

    def wait(self) -> None:
        """Until all is compiled."""
        assert self._compiled is not None
        with device_errors("compiling a step"):
            self._compiled.result()
            if self._finisher is not None:
                self._finisher.wait()

    def step_bytes(self) -> int:
        """What a step takes beside weights and cache, by the compiled program's own analysis."""
        assert self._compiled is not None
        sizes = self._compiled.result().memory_analysis()
        if sizes is None:  # a client that cannot tell
            return 0
        out = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return int(sizes.temp_size_in_bytes + out + sizes.generated_code_size_in_bytes)

    def __call__(self, weights: Weights, kv: KV, inputs: StepInputs) -> tuple[KV, SampleOutput]:
        """One step; it is only enqueued."""
        if self._compiled is None:
            self.begin(weights, kv)
            self.wait()
        assert self._compiled is not None
        self._take(weights)
        values = packing.step_values(inputs)
        needs_more = self._finisher is not None and is_needed(inputs.sample)
        if needs_more:  # what the step itself would draw is not looked at
            values |= {"is_greedy": 1, "has_filters": 0}
        layers = () if kv is None else kv.layers
        previous = self._programs.previous(inputs.previous_ids)
        with device_errors("a step"):
            try:
                layers, ids, handed_on, logits, states = self._compiled.result()(
                    self._arrays, layers, self._layout.pack(values), previous
                )
            except jax.errors.JaxRuntimeError as error:
                if any(array.is_deleted() for array in jax.tree.leaves(layers)):
                    raise BackendError(
                        "device_lost", f"a step failed and took the KV cache with it: {error}"
                    ) from error
                raise
            if needs_more:
                assert self._finisher is not None
                out, handed_on = self._finisher(logits, inputs.sample)
            else:
                out = SampleOutput(token_ids=self._programs.bridge.tensor(ids))
        if states is not None:
            out.states = self._programs.bridge.tensor(states)
        self._programs.hand_on(out.token_ids, handed_on)
        return kv if kv is None else replace(kv, layers=layers), out

    def _take(self, weights: Weights) -> None:
        """The arrays of `weights`, looked for once."""
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

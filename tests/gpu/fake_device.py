"""A simulated GPU: torch on the host, with the delays and faults that a real device may have.

Every torch operation under `FakeGpu.running()` is enqueued on a stream, and its result holds NaN
until the stream runs it. Streams run when the host waits, in a random order that only events
restrict. A graph records operations with the memory they use, and a replay uses the same memory.
So a buffer overwritten too early, an input that was not copied, a missing wait and a value read too
soon all lead to wrong numbers.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

Work = Callable[[], None]

_POISON = {torch.int32: -123_456_789, torch.int64: -123_456_789, torch.bool: True, torch.int8: -77}
"""Values of integer results before they are computed; out of range as an index."""


class SynchronizesInCapture(RuntimeError):
    """A value was read on the host during a capture, or a shape depends on a value."""


@dataclass(eq=False)
class FakeEvent:
    """An event, done once its stream has passed it."""

    gpu: FakeGpu
    is_done: bool = False

    def query(self) -> bool:
        with _disable_current_modes():
            for _ in range(self.gpu.random.randrange(4)):
                self.gpu.advance()
        self.gpu.check()
        return self.is_done

    def synchronize(self) -> None:
        with _disable_current_modes():
            while not self.is_done:
                assert self.gpu.advance(), "a stream waits for an event that never comes"
        self.gpu.check()


@dataclass(eq=False)
class FakeStream:
    """A queue of work that runs in order."""

    gpu: FakeGpu
    name: str
    work: deque[tuple[FakeEvent | None, Work]] = field(default_factory=deque)
    """Pairs of an event to wait for, or None, and the work."""

    def record_event(self) -> FakeEvent:
        event = FakeEvent(self.gpu)

        def done() -> None:
            event.is_done = True

        self.work.append((None, done))
        return event

    def wait_event(self, event: FakeEvent) -> None:
        assert not self.gpu.is_capturing, "events are not captured"
        self.work.append((event, lambda: None))

    def wait_stream(self, stream: FakeStream) -> None:
        self.wait_event(stream.record_event())

    @property
    def can_run(self) -> bool:
        return bool(self.work) and (self.work[0][0] is None or self.work[0][0].is_done)


class FakeGraph:
    """Recorded operations and the memory they use."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.recorded: list[Work] = []
        self.num_bytes = 0
        """Bytes of the results of its operations."""
        gpu.graphs.add(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert self.gpu.recording is None, "another graph is being captured"
        assert self.gpu.current_stream() is not self.gpu.default, (
            "cannot capture the default stream"
        )
        assert pool.graphs or not pool.was_used, "a pool cannot be reused after its last graph"
        pool.was_used = True
        pool.graphs.add(self)
        self.num_bytes = -self.gpu.bytes_made
        self.gpu.recording = self.recorded

    def capture_end(self) -> None:
        assert self.gpu.recording is self.recorded, "this graph is not being captured"
        self.gpu.recording = None
        self.num_bytes += self.gpu.bytes_made
        self.gpu.num_captures += 1

    def replay(self) -> None:
        assert not self.gpu.is_capturing
        assert self.recorded, "an empty graph"
        self.gpu.num_replays += 1
        for work in self.recorded:
            self.gpu.enqueue(work)


class FakePool:
    """A memory pool of graphs, with the rules of torch's allocator."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[FakeGraph] = weakref.WeakSet()
        self.was_used = False


class FakeGpu:
    """A simulated `portalm_backends.gpu_common.device.Gpu`."""

    handle = torch.device("cpu")
    runs_native = False
    num_cores = 8
    summary = "a fake device"

    def __init__(self, *, arch: str = "sm_90", seed: int = 0, total: int = 64 << 20) -> None:
        self.arch = arch
        self.random = random.Random(seed)
        self.total = total
        self.default = FakeStream(self, "default")
        self.streams = [self.default]
        self._current = self.default
        self.recording: list[Work] | None = None
        self.graphs: weakref.WeakSet[FakeGraph] = weakref.WeakSet()
        self.num_captures = self.num_replays = self.num_launches = self.num_waits = 0
        self.num_empty_caches = 0
        self.bytes_made = 0
        """Bytes of results since `reset_peak`; nothing is ever freed."""
        self.fail_launch: Callable[[int], Exception | None] = lambda number: None
        """Error that launch `number` raises immediately, like one of the allocator, or None."""
        self.fail_run: Callable[[int], Exception | None] = lambda number: None
        """Error of launch `number` when the device runs it, or None; the device is lost then."""
        self.lost: Exception | None = None
        self._shapes: dict[Any, Any] = {}
        """Results of operations without values, by operation and arguments."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context in which torch computes on this device; `cpu()` waits and copies to the host.

        It includes the threads of engines that start in it, until they end.
        """
        cpu, from_numpy = self._cpu, self._from_numpy = torch.Tensor.cpu, torch.from_numpy
        run_thread = threading.Thread.run

        def run_on_device(thread: threading.Thread) -> None:
            with _Launches(self) if thread.name == "portalm-engine" else nullcontext():
                run_thread(thread)

        def to_host(x: torch.Tensor) -> torch.Tensor:
            self.num_waits += 1
            self.drain()
            with _disable_current_modes():
                return _on_host(x.clone())

        torch.Tensor.cpu = to_host  # type: ignore[method-assign]
        torch.from_numpy = lambda array: _on_host(from_numpy(array))
        threading.Thread.run = run_on_device  # type: ignore[method-assign]
        try:
            with _Launches(self):
                yield
        finally:
            threading.Thread.run = run_thread  # type: ignore[method-assign]
            torch.Tensor.cpu, torch.from_numpy = cpu, from_numpy  # type: ignore[method-assign]

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Context inside `running` in which torch computes on the host, immediately."""
        cpu, from_numpy = torch.Tensor.cpu, torch.from_numpy
        torch.Tensor.cpu, torch.from_numpy = self._cpu, self._from_numpy  # type: ignore[method-assign]
        try:
            with _disable_current_modes():
                yield
        finally:
            torch.Tensor.cpu, torch.from_numpy = cpu, from_numpy  # type: ignore[method-assign]

    # -- what the backend uses ----------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        self.drain()
        return self.total - sum(graph.num_bytes for graph in self.graphs), self.total

    def allocated(self) -> int:
        return 0

    def peak_allocated(self) -> int:
        return self.bytes_made

    def reset_peak(self) -> None:
        self.bytes_made = 0

    def empty_cache(self) -> None:
        self.num_empty_caches += 1

    def pinned(self, num_bytes: int) -> torch.Tensor:
        with _disable_current_modes():
            return torch.full((num_bytes,), 0xAB, dtype=torch.uint8)

    def current_stream(self) -> FakeStream:
        return self._current

    def new_stream(self) -> FakeStream:
        self.streams.append(FakeStream(self, str(len(self.streams))))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def new_graph(self) -> FakeGraph:
        return FakeGraph(self)

    def new_pool(self) -> FakePool:
        return FakePool()

    def synchronize(self) -> None:
        self.drain()

    # -- running ------------------------------------------------------------------------------

    @property
    def is_capturing(self) -> bool:
        return self.recording is not None

    def enqueue(self, work: Work) -> None:
        number = self.num_launches
        self.num_launches += 1
        error = self.fail_launch(number)
        if error is not None:
            raise error
        if self.recording is not None:
            self.recording.append(work)
            return
        late_error = self.fail_run(number)

        def run() -> None:
            if late_error is not None:
                self.lost = self.lost or late_error
            if self.lost is None:
                work()

        self._current.work.append((None, run))

    def advance(self) -> bool:
        """Run the next work of a random stream that is ready; False if none is."""
        ready = [stream for stream in self.streams if stream.can_run]
        if not ready:
            return False
        _, work = self.random.choice(ready).work.popleft()
        work()
        return True

    def drain(self) -> None:
        with _disable_current_modes():
            while self.advance():
                pass
        assert not any(stream.work for stream in self.streams), "streams wait for each other"
        self.check()

    def check(self) -> None:
        if self.lost is not None:
            raise self.lost

    # -- launching ----------------------------------------------------------------------------

    def launch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Enqueue a torch operation on the current stream; return its future result."""
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten.index.Tensor:  # torch already converted list indices to tensors
            inputs = inputs[:1]
        if inputs and all(hasattr(x, "is_on_host") for x in inputs):
            return tree_map(_on_host, func(*args, **kwargs))
        if any(x.device.type == "meta" for x in inputs) or _is_meta(kwargs.get("device")):
            return func(*args, **kwargs)  # meta tensors have no values to compute
        if func.is_view or func is torch.ops.aten.lift_fresh.default:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.enqueue(lambda: func(*args, **kwargs))
            if not func._schema.returns:
                return None
            return kwargs["out"] if "out" in kwargs else args[0]
        try:
            out = tree_map(_poisoned, self._on_meta(func, args, kwargs))
        except RuntimeError as error:  # the result's shape depends on values: the host waits
            if self.is_capturing:
                raise SynchronizesInCapture(f"{func} in a capture") from error
            self.num_waits += 1
            self.drain()
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.bytes_made += sum(x.numel() * x.element_size() for x in tensors)

        def compute() -> None:
            made = func(*args, **kwargs)
            for target, x in zip(tree_leaves(out), tree_leaves(made), strict=True):
                target.copy_(x)

        if func not in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default):
            self.enqueue(compute)
        return out

    def _on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Result of `func` as meta tensors, which have no values."""
        leaves, tree = tree_flatten((args, kwargs))
        key = (func, str(tree), *(_kind(x) for x in leaves))
        if key not in self._shapes:
            meta_args, meta_kwargs = tree_map(_without_values, (args, kwargs))
            self._shapes[key] = func(*meta_args, **meta_kwargs)
        return self._shapes[key]


class _Launches(TorchDispatchMode):
    """Sends every torch operation to the device."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.launch(func, args, kwargs or {})


def _is_meta(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == "meta"


def _on_host(x: Any) -> Any:
    """Mark `x` as a host tensor: operations on it run immediately."""
    if isinstance(x, torch.Tensor):
        x.is_on_host = True  # type: ignore[attr-defined]
    return x


def _kind(x: Any) -> Any:
    """Everything about an argument that the result's shape may depend on."""
    if isinstance(x, torch.Tensor):
        return (x.dtype, *x.shape, "/", *x.stride())
    return (type(x), x)


def _without_values(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def _poisoned(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    out = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    return out.fill_(float("nan") if out.dtype.is_floating_point else _POISON.get(out.dtype, 0xAB))

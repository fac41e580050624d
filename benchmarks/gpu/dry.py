"""A dry GPU: Triton's real JIT and launcher, compiling for a chosen GPU that is not present.

Kernels are compiled as on that GPU, with its limits of shared memory, threads and grid sizes, and
then not launched. torch's operations on "device" tensors, which live in host memory, return
results of the right shape without computing them. So everything that happens before the device
computes is real: the launch path, captures, compiles, uploads. Values mean nothing.

    with dry_gpu("sm_90") as gpu:
        backend = backend_for(gpu)

One target per process: torch, Triton and the kernels' modules keep facts about the device.
`TRITON_INTERPRET` must be off.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SMALL_BYTES = 1 << 20
"""Results up to this size are zeros; larger ones are never touched and take no memory."""

MAX_GRID = (2**31 - 1, 65535, 65535)
"""Largest grid of a CUDA launch; AMD's limits are not smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The facts about a GPU that compiling and launching depend on."""

    target: GPUTarget
    num_cores: int
    """Multiprocessors (AMD: compute units)."""
    shared_bytes: int
    """Most bytes of shared memory (LDS) of a program."""
    fp8: torch.dtype | None = None
    """The float8 dtype of its matrix products."""


def _cuda(arch: int, num_cores: int, shared_kib: int, *, has_fp8: bool) -> Target:
    return Target(
        target=GPUTarget("cuda", arch, 32),
        num_cores=num_cores,
        shared_bytes=shared_kib << 10,
        fp8=torch.float8_e4m3fn if has_fp8 else None,
    )


def _hip(arch: str, num_cores: int, shared_kib: int, fp8: torch.dtype | None = None) -> Target:
    return Target(
        target=GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32),
        num_cores=num_cores,
        shared_bytes=shared_kib << 10,
        fp8=fp8,
    )


TARGETS = {
    "sm_80": _cuda(80, 108, 163, has_fp8=False),
    "sm_86": _cuda(86, 72, 99, has_fp8=False),
    "sm_89": _cuda(89, 142, 99, has_fp8=True),
    "sm_90": _cuda(90, 132, 227, has_fp8=True),
    "sm_100": _cuda(100, 148, 227, has_fp8=True),
    "sm_103": _cuda(103, 148, 227, has_fp8=True),
    "sm_120": _cuda(120, 188, 99, has_fp8=True),
    "gfx90a": _hip("gfx90a", 104, 64),
    "gfx942": _hip("gfx942", 304, 64, torch.float8_e4m3fnuz),
    "gfx950": _hip("gfx950", 256, 160, torch.float8_e4m3fn),
    "gfx1100": _hip("gfx1100", 96, 64),
    "gfx1201": _hip("gfx1201", 64, 64, torch.float8_e4m3fn),
}
"""By compiler name; the number of cores is that of the product in `archs.py`."""


@dataclass(slots=True)
class Compile:
    """A kernel compiled, or loaded from Triton's cache on disk."""

    kernel: str
    seconds: float
    signature: str
    """Types, sizes and options, as Triton prints them."""


@dataclass(slots=True)
class Counts:
    """What the host did since the counts were last taken."""

    launches: Counter[str] = field(default_factory=Counter)
    """Launches outside graphs by kernel or torch operation."""
    captured: Counter[str] = field(default_factory=Counter)
    """Launches recorded into graphs."""
    replays: int = 0
    captures: int = 0
    compiles: list[Compile] = field(default_factory=list)
    uploads: int = 0
    uploaded_bytes: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    """Operations that read a value on the host, which waits for the device."""


@contextlib.contextmanager
def dry_gpu(name: str) -> Iterator[DryGpu]:
    """Context in which torch and Triton work on a dry GPU of this architecture.

    Nothing of it remains afterwards: Triton's driver and hooks are restored.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: a process interprets kernels or compiles them")
    if name not in TARGETS:
        raise ValueError(f"no target {name!r}; targets: {', '.join(TARGETS)}")
    gpu = DryGpu(name)
    before = driver._active
    driver.set_active(_Driver(gpu))
    try:
        with knobs.runtime.scope(), _Operations(gpu):
            knobs.runtime.jit_cache_hook = gpu.compile_begins
            knobs.runtime.jit_post_compile_hook = gpu.compile_ended
            yield gpu
    finally:
        driver._active = before


def backend_for(gpu: DryGpu) -> Any:
    """The backend for the GPU: CUDA's or ROCm's."""
    if gpu.arch.startswith("sm_"):
        from portalm_backends.cuda.backend import CudaBackend

        return CudaBackend(gpu)
    from portalm_backends.rocm.backend import RocmBackend

    return RocmBackend(gpu)


# -- the device -------------------------------------------------------------------------------


class _Event:
    """An event that has always passed."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Stream:
    """A stream that has always finished."""

    def record_event(self) -> _Event:
        return _Event()

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


class _Graph:
    """A graph that counts what is recorded."""

    def __init__(self, gpu: DryGpu) -> None:
        self._gpu = gpu
        self._num_nodes = 0

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert not self._gpu.is_capturing, "another graph is being captured"
        self._gpu.is_capturing = True
        self._num_nodes = -self._gpu.num_recorded

    def capture_end(self) -> None:
        assert self._gpu.is_capturing, "no graph is being captured"
        self._gpu.is_capturing = False
        self._gpu.counts.captures += 1
        self._num_nodes += self._gpu.num_recorded

    def replay(self) -> None:
        assert self._num_nodes, "an empty graph is replayed"
        self._gpu.counts.replays += 1


class DryGpu:
    """A `portalm_backends.gpu_common.device.Gpu` that runs nothing and counts everything."""

    handle = torch.device("cpu")
    runs_native = False

    def __init__(self, name: str) -> None:
        """Use `TARGETS[name]`."""
        self.arch = name
        self.target = TARGETS[name]
        self.num_cores = self.target.num_cores
        self.summary = f"a dry {name}, Triton {triton.__version__}"
        self.is_capturing = False
        self.num_recorded = 0
        """Launches recorded into graphs so far."""
        self.counts = Counts()
        self._stream = _Stream()
        self._pinned: dict[int, int] = {}
        """Sizes of page-locked host memory by its address."""
        self._compile_began = 0.0

    def take(self) -> Counts:
        """The counts since the last call."""
        counts, self.counts = self.counts, Counts()
        return counts

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, as if nothing were allocated."""
        return 16 << 30, 20 << 30  # the KV cache is allocated: no more than a host may promise

    def allocated(self) -> int:
        """0: allocations are not tracked."""
        return 0

    def peak_allocated(self) -> int:
        """1 GiB: allocations are not tracked."""
        return 1 << 30

    def reset_peak(self) -> None:
        """Do nothing."""

    def empty_cache(self) -> None:
        """Do nothing."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory, uint8, whose copies count as uploads and downloads."""
        with _disable_current_modes():
            memory = torch.zeros(num_bytes, dtype=torch.uint8)
        address = memory.untyped_storage().data_ptr()
        self._pinned[address] = num_bytes
        weakref.finalize(memory.untyped_storage(), self._pinned.pop, address, None)
        return memory

    def is_pinned(self, x: torch.Tensor) -> bool:
        """True if `x` is in memory from `pinned`."""
        return x.untyped_storage().data_ptr() in self._pinned

    def current_stream(self) -> _Stream:
        """The only stream."""
        return self._stream

    def new_stream(self) -> _Stream:
        """Another stream."""
        return _Stream()

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Context without an effect: streams do not matter."""
        return contextlib.nullcontext()

    def new_graph(self) -> _Graph:
        """An empty graph."""
        return _Graph(self)

    def new_pool(self) -> object:
        """A pool of nothing."""
        return object()

    def synchronize(self) -> None:
        """Return immediately."""

    # -- counting -----------------------------------------------------------------------------

    def launched(self, name: str) -> None:
        """Count a launch, into the graph if one is being captured."""
        if self.is_capturing:
            self.num_recorded += 1
            self.counts.captured[name] += 1
        else:
            self.counts.launches[name] += 1

    def copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Count a copy between host and device, or else a launch."""
        num_bytes = target.numel() * target.element_size()
        if self.is_pinned(source):
            self.counts.uploads += 1
            self.counts.uploaded_bytes += num_bytes
        elif self.is_pinned(target):
            self.counts.downloads += 1
            self.counts.downloaded_bytes += num_bytes
        else:
            self.launched("copy_")

    def compile_begins(self, **_: Any) -> None:
        """Hook of Triton before a compilation."""
        self._compile_began = time.perf_counter()

    def compile_ended(self, *, repr: str, fn: Any, **_: Any) -> None:
        """Hook of Triton after a compilation."""
        seconds = time.perf_counter() - self._compile_began
        self.counts.compiles.append(Compile(fn.name, seconds, repr))


# -- Triton -----------------------------------------------------------------------------------


class _Utils:
    """The part of a Triton driver that loads kernels."""

    def __init__(self, gpu: DryGpu) -> None:
        self._target = gpu.target

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        """(module, function, registers, spills, most threads of a program)."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._target.shared_bytes,
            "multiprocessor_count": self._target.num_cores,
            "warpSize": self._target.target.warp_size,
            "max_num_regs": 65536,
        }


class _Driver:
    """A Triton driver for a GPU that is not there."""

    num_made = 0

    def __init__(self, gpu: DryGpu) -> None:
        self.utils = _Utils(gpu)
        self._gpu = gpu
        # Triton caches compiled kernels in memory by device number, without the target
        _Driver.num_made += 1
        self._device = 1000 + _Driver.num_made

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return the function that launches a kernel: it checks the grid, and counts."""

        def launch(grid_x: int, grid_y: int, grid_z: int, *_: Any) -> None:
            grid = (grid_x, grid_y, grid_z)
            if any(not 0 < n <= most for n, most in zip(grid, MAX_GRID, strict=True)):
                if 0 in grid:
                    return  # Triton's launchers skip it
                raise RuntimeError(
                    f"Triton Error [DRY]: {metadata.name}: grid {grid} is out of range"
                )
            self._gpu.launched(metadata.name)

        return launch

    def get_current_target(self) -> GPUTarget:
        return self._gpu.target.target

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return self._gpu.handle


# -- torch ------------------------------------------------------------------------------------

_MAKES_MEMORY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)
"""Operations that launch nothing."""


class _Operations(TorchDispatchMode):
    """Counts torch's operations, and returns results of the right shape without computing."""

    def __init__(self, gpu: DryGpu) -> None:
        super().__init__()
        self._gpu = gpu
        self._shapes: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "meta" for x in tensors) or _is_meta(kwargs.get("device")):
            return func(*args, **kwargs)
        if func.is_view or func is torch.ops.aten.lift_fresh.default:
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            self._gpu.copied(args[0], args[1])
            if self._gpu.is_pinned(args[0]) or self._gpu.is_pinned(args[1]):
                return func(*args, **kwargs)
            return args[0]
        name = func.overloadpacket.__name__
        if func._schema.is_mutable:
            self._gpu.launched(name)
            returns = func._schema.returns
            return (kwargs["out"] if "out" in kwargs else args[0]) if returns else None
        self._refuse(func, args, kwargs)
        try:
            out = self._results(func, args, kwargs)
        except RuntimeError:  # shapes or results that depend on values
            self._gpu.counts.waits[name] += 1
            return func(*args, **kwargs)
        if func not in _MAKES_MEMORY:
            self._gpu.launched(name)
        return out

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise the errors of products that the GPU does not have."""
        packet = func.overloadpacket
        if packet is torch.ops.aten._scaled_mm and args[0].dtype != self._gpu.target.fp8:
            raise RuntimeError(f"{self._gpu.arch} multiplies no {args[0].dtype}")
        is_wide = packet is torch.ops.aten.mm and func._overloadname == "dtype"
        if is_wide and self._gpu.target.target.backend == "hip":
            raise RuntimeError("torch.mm for ROCm has no out_dtype")

    def _results(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Results of an operation, without values unless they are small: then zeros."""
        flat = tree_leaves((args, kwargs))
        key = (func, str(kwargs.keys()), *map(_kind, flat))
        if key not in self._shapes:
            meta_args, meta_kwargs = tree_map(_on_meta, (args, kwargs))
            self._shapes[key] = func(*meta_args, **meta_kwargs)
        return tree_map(_made, self._shapes[key])


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _kind(x: Any) -> Any:
    """Everything about an argument that the shape of a result depends on."""
    if isinstance(x, torch.Tensor):
        return (x.dtype, *x.shape, "/", *x.stride())
    return (type(x), str(x))


def _on_meta(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    if isinstance(x, torch.Generator):
        return None
    return torch.device("meta") if isinstance(x, torch.device) else x


def _made(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    out = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    if out.numel() * out.element_size() <= SMALL_BYTES:
        out.zero_()
    return out

"""The GPU backends on CPU tensors, with their kernels in Triton's interpreter.

Only float32 and float16: the interpreter computes bfloat16 products wrongly, as if the bits were
integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from triton.runtime import interpreter

from portalm.backend import Bucket, Capabilities
from portalm.conformance import oracle
from portalm_backends.cuda.backend import CudaBackend
from portalm_backends.gpu_common.archs import CUDA, ROCM
from portalm_backends.rocm.backend import RocmBackend
from tests.gpu.fake_device import FakeGpu

complete = pytest.mark.gpu_interpreted

MODELS = frozenset({"llama", "qwen3", "gemma3", "mixtral", "deepseek v3", "modernbert"})
"""Models of the kit that are interpreted: one per kind of layer, as each takes minutes."""


def some(values: Iterable[Any], is_usual: Callable[[Any], bool]) -> list[Any]:
    """Mark parameters of a test that are not usual, to run them only under `gpu_interpreted`."""
    return [value if is_usual(value) else pytest.param(value, marks=complete) for value in values]


@contextmanager
def interpreted(gpu: FakeGpu) -> Iterator[None]:
    """Context in which torch and Triton compute on `gpu`.

    Kernel launches are delayed, recorded and replayed like torch operations. The kit's references
    are computed on the host.
    """
    launch, references = interpreter.GridExecutor.__call__, (oracle.forward, oracle.encode)

    def enqueue(executor: Any, *args: Any, **kwargs: Any) -> None:
        gpu.enqueue(lambda: launch(executor, *args, **kwargs))

    def on_host(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            gpu.drain()
            with gpu.on_host():
                return function(*args, **kwargs)

        return call

    interpreter.GridExecutor.__call__ = enqueue
    oracle.forward, oracle.encode = map(on_host, references)
    try:
        with gpu.running():
            yield
    finally:
        interpreter.GridExecutor.__call__ = launch
        oracle.forward, oracle.encode = references


def interpreted_backend(gpu: FakeGpu) -> CudaBackend | RocmBackend:
    """The backend for `gpu.arch`, whose capabilities are limited to those of the interpreter."""
    backend = CudaBackend(gpu) if gpu.arch.startswith("sm_") else RocmBackend(gpu)
    backend.capabilities = _interpretable(backend.capabilities)
    return backend


class InterpretedBackend(CudaBackend):
    """Kernels for any architecture, each launch computed immediately, for tests of operations."""

    name = "interpreted"
    archs = CUDA | ROCM

    def __init__(self, arch: str = "sm_90", buckets: Sequence[Bucket] | None = None) -> None:
        """Use the tile sizes of `arch`, and pad steps to `buckets`."""
        super().__init__(FakeGpu(arch=arch))
        self.capabilities = _interpretable(self.capabilities)
        self._buckets = buckets

    def buckets(
        self, max_tokens: int, max_requests: int, max_blocks: int
    ) -> Sequence[Bucket] | None:
        return self._buckets


def _interpretable(claims: Capabilities) -> Capabilities:
    """The capabilities without bfloat16, which the interpreter computes wrongly."""
    return replace(
        claims, dtypes=claims.dtypes - {"bfloat16"}, kv_dtypes=claims.kv_dtypes - {"bfloat16"}
    )

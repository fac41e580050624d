"""The GPU backends on CPU tensors, with their kernels in Triton's interpreter.

float32 and float16 only: the interpreter multiplies the bits of bfloat16.
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
"""Of the kit's models those that are interpreted: the kinds of layers. Each takes minutes."""


def some(values: Iterable[Any], is_usual: Callable[[Any], bool]) -> list[Any]:
    """Parameters of a test: the usual ones in every run, all others under `gpu_interpreted`."""
    return [value if is_usual(value) else pytest.param(value, marks=complete) for value in values]


@contextmanager
def interpreted(gpu: FakeGpu) -> Iterator[None]:
    """Within it torch and Triton compute on `gpu`: launches are late, recorded and replayed as
    torch's operations are. What the kit compares with is computed aside."""
    launch, references = interpreter.GridExecutor.__call__, (oracle.forward, oracle.encode)

    def enqueue(executor: Any, *args: Any, **kwargs: Any) -> None:
        gpu.enqueue(lambda: launch(executor, *args, **kwargs))

    def on_host(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            gpu.drain()
            with gpu.aside():
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
    """The backend for `gpu.arch`, which claims no more than the interpreter can do."""
    backend = CudaBackend(gpu) if gpu.arch.startswith("sm_") else RocmBackend(gpu)
    backend.capabilities = _interpretable(backend.capabilities)
    return backend


class InterpretedBackend(CudaBackend):
    """Any architecture's kernels, each launch computed at once: what a test of operations needs."""

    name = "interpreted"
    archs = CUDA | ROCM

    def __init__(self, arch: str = "sm_90", buckets: Sequence[Bucket] | None = None) -> None:
        """With the tiles of `arch`, and steps padded to `buckets`."""
        super().__init__(FakeGpu(arch=arch))
        self.capabilities = _interpretable(self.capabilities)
        self._buckets = buckets

    def buckets(
        self, max_tokens: int, max_requests: int, max_blocks: int
    ) -> Sequence[Bucket] | None:
        return self._buckets


def _interpretable(claims: Capabilities) -> Capabilities:
    """bfloat16 is not: its bits are multiplied."""
    return replace(
        claims, dtypes=claims.dtypes - {"bfloat16"}, kv_dtypes=claims.kv_dtypes - {"bfloat16"}
    )

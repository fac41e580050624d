"""The GPU backends whole, with their kernels in Triton's interpreter, on a device that stands for
one: launches are recorded and replayed as torch's operations are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter

from portalm_backends.cuda.backend import CudaBackend
from portalm_backends.rocm.backend import RocmBackend
from tests.gpu.fake_device import FakeGpu

_NOT_INTERPRETED = frozenset({"bfloat16"})
"""The interpreter multiplies its bits."""


@contextmanager
def interpreted(gpu: FakeGpu) -> Iterator[None]:
    """Within it torch and Triton compute on `gpu`."""
    launch = interpreter.GridExecutor.__call__

    def enqueue(executor: Any, *args: Any, **kwargs: Any) -> None:
        gpu.enqueue(lambda: launch(executor, *args, **kwargs))

    interpreter.GridExecutor.__call__ = enqueue
    try:
        with gpu.running():
            yield
    finally:
        interpreter.GridExecutor.__call__ = launch


def interpreted_backend(gpu: FakeGpu) -> CudaBackend | RocmBackend:
    """The backend for `gpu.arch`, which claims no more than the interpreter can do."""
    backend = CudaBackend(gpu) if gpu.arch.startswith("sm_") else RocmBackend(gpu)
    claims = backend.capabilities
    backend.capabilities = replace(
        claims,
        dtypes=claims.dtypes - _NOT_INTERPRETED,
        kv_dtypes=claims.kv_dtypes - _NOT_INTERPRETED,
    )
    return backend

"""The dry GPU as a backend by name, and the conformance kit's cases on it.

`DryCudaBackend` and `DryRocmBackend` take no arguments, so an entry point in the group
`portalm.backends` can name them. They make the whole process dry, on the thread that creates them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from portalm.backend import DeviceReport
from portalm.conformance import reference
from portalm_backends.cuda.backend import CudaBackend
from portalm_backends.rocm.backend import RocmBackend

if TYPE_CHECKING:
    from portalm.conformance.check import Item
    from portalm.conformance.subject import Subject

_process = ExitStack()
"""Contexts that end with the process."""


class DryCudaBackend(CudaBackend):
    """CUDA on a dry GPU: of the architecture in PORTALM_DRY_TARGET, by default sm_90."""

    name = "dry"
    rank = -20

    def __init__(self) -> None:
        """Make this process dry, for good."""
        super().__init__(_enter(os.environ.get("PORTALM_DRY_TARGET", "sm_90")))

    @classmethod
    def find(cls) -> DeviceReport:
        """Report a device that is always there."""
        return DeviceReport(is_available=True, summary="a dry GPU: compiles, and computes nothing")


class DryRocmBackend(RocmBackend):
    """ROCm on a dry GPU: of the architecture in PORTALM_DRY_TARGET, by default gfx942."""

    name = "dry-rocm"
    rank = -20

    def __init__(self) -> None:
        """Make this process dry, for good."""
        super().__init__(_enter(os.environ.get("PORTALM_DRY_TARGET", "gfx942")))

    find = DryCudaBackend.find


def _enter(target: str) -> Any:
    from gpu.dry import dry_gpu

    return _process.enter_context(dry_gpu(target))


def launch_cases(subject: Subject, items: Sequence[Item]) -> Iterator[str]:
    """Run cases of the kit for their launches; yield each error that is not a wrong number."""
    with _no_references():
        for item in items:
            result = item.run(subject)
            if result.is_crash:
                yield f"{item.level} {item.name}: {result.message}"


@contextmanager
def _no_references() -> Iterator[None]:
    """Context in which the slow references return zeros: nothing is compared."""

    def logits(engine: Any, token_ids: list[int]) -> Any:
        return np.zeros((len(token_ids), engine.model_config.vocab_size))

    def states(engine: Any, token_ids: list[int]) -> Any:
        return np.zeros((len(token_ids), engine.model_config.hidden_size))

    def attention(query: Any, key: Any, value: Any, spec: Any, sinks: Any = None) -> Any:
        return np.zeros((*query.shape[:2], spec.out_size))

    patches: list[tuple[Any, str, Any]] = [
        (reference, "attention", attention),
        (reference, "encoder_attention", attention),
    ]
    # whole models need packages of the engine that operations do not
    with suppress(ModuleNotFoundError):
        from portalm.conformance import models, oracle

        patches += [(oracle, "forward", logits), (oracle, "encode", states)]
        patches += [(models, "forward", logits)]
    with ExitStack() as stack:
        for module, name, function in patches:
            stack.enter_context(mock.patch.object(module, name, function))
        yield

"""GpuBackend: the seam over torch and Triton, the same for every maker's GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from portalm.backend import (
    Bucket,
    Capabilities,
    HostFuture,
    MemInfo,
    SampleOutput,
    SampleParams,
    StepFn,
    StepInputs,
)
from portalm.errors import BackendError, Unsupported
from portalm_backends.gpu_common import memory
from portalm_backends.gpu_common.archs import Arch
from portalm_backends.gpu_common.device import Gpu, error_kind
from portalm_backends.gpu_common.graph import Graphs, decode_buckets
from portalm_backends.gpu_common.transfers import Transfers
from portalm_backends.portable.backend import TorchBackend

_DTYPES = frozenset({"float32", "float16", "bfloat16"})


class GpuBackend(TorchBackend):
    """One GPU: steps are enqueued, captured as graphs, and answered a step late."""

    archs: dict[str, Arch]
    """Architectures that this backend knows, by name."""

    def __init__(self, gpu: Gpu) -> None:
        """On `gpu`, which is started. Raises `Unsupported` for one that is not known."""
        super().__init__()
        self.arch = known_arch(gpu.arch, self.archs)
        self.capabilities = capabilities(self.arch)
        self._gpu = gpu
        self._transfers = Transfers(gpu)
        self._graphs = Graphs(gpu, self._transfers, self._sample)

    # -- device and memory --------------------------------------------------------------------

    def device(self) -> torch.device:
        """The GPU."""
        return self._gpu.handle

    def memory(self) -> MemInfo:
        """The GPU's own; waits for it."""
        return memory.memory(self._gpu)

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Bytes of live tensors, as torch's allocator counts them."""
        with memory.peak(self._gpu) as used:
            yield used

    def to_device(self, host: npt.NDArray[np.generic]) -> torch.Tensor:
        """A copy, in order with the steps; the host may write its own again at once."""
        return self._transfers.upload([host])[0]

    def to_device_all(self, hosts: Sequence[npt.NDArray[np.generic]]) -> list[torch.Tensor]:
        """Copies in one transfer."""
        return self._transfers.upload(hosts)

    def to_host(self, x: torch.Tensor) -> HostFuture:
        """A copy on a stream of its own, behind what is enqueued now."""
        return self._transfers.download(x)

    @contextmanager
    def device_errors(self) -> Iterator[None]:
        """Within it what torch raises for the device comes as `BackendError`.

        Where memory ran out, what torch's allocator keeps for later is given back first.
        """
        try:
            yield
        except BackendError:
            raise
        except RuntimeError as error:
            kind = error_kind(error)
            if kind is None:
                raise
            if kind == "oom":
                self._gpu.empty_cache()
            raise BackendError(kind, str(error)) from error

    # -- KV cache -----------------------------------------------------------------------------

    def kv_export(self, kv: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks int32 [N] as [N, L, 2, B, H_kv, D] on the host; waits for it."""
        wire = kv[:, :, blocks.long()].permute(2, 0, 1, 3, 4, 5).contiguous()
        return torch.from_numpy(self.to_host(wire.view(torch.uint8)).result()).view(wire.dtype)

    # -- execution ----------------------------------------------------------------------------

    def buckets(self, max_tokens: int, max_requests: int, max_blocks: int) -> Sequence[Bucket]:
        """Decodes only: a step with prompts in it computes longer than it takes to enqueue."""
        return decode_buckets(max_requests, max_blocks)

    def compile(self, fn: StepFn, bucket: Bucket | None, example: StepInputs | None) -> StepFn:
        """A graph for `bucket`, captured by the first call, for every kind of sampling.

        Without a bucket, `fn` itself. Raises `BackendError` once sealed, but for a bucket whose
        graph is there.
        """
        if bucket is None:
            self._graphs.require_open(bucket)
            return fn
        return self._graphs.step(fn, bucket)

    @contextmanager
    def seal(self) -> Iterator[None]:
        """Within it nothing is captured."""
        self._graphs.is_sealed = True
        try:
            yield
        finally:
            self._graphs.is_sealed = False

    def sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        """One token from each row of float32 logits [R, V]."""
        if self._graphs.draw is not None:
            return self._graphs.draw(logits)
        return self._sample(logits, params)

    def _sample(self, logits: torch.Tensor, params: SampleParams) -> SampleOutput:
        return super().sample(logits, params)


def known_arch(name: str, archs: dict[str, Arch]) -> Arch:
    """The architecture called so; `Unsupported` with those there are."""
    if name not in archs:
        known = ", ".join(f"{arch.name} ({arch.product})" for arch in archs.values())
        raise Unsupported(f"no kernels for {name}; there are for {known}")
    return archs[name]


def capabilities(arch: Arch) -> Capabilities:
    """What this folder's kernels do on `arch`."""
    return Capabilities(
        dtypes=_DTYPES,
        kv_dtypes=_DTYPES,
        features=frozenset({"sliding_window", "soft_cap", "alibi", "sinks"}),
        measures_memory=True,
        max_steps_in_flight=2,
    )

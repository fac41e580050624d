"""Asynchronous copies between host and device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from portalm.errors import BackendError
from portalm_backends.gpu_common.device import Event, Gpu
from portalm_backends.gpu_common.errors import error_kind
from portalm_backends.gpu_common.step_uploads import DTYPES, aligned


class HostCopy:
    """An asynchronous copy to the host."""

    def __init__(self, source: torch.Tensor, host: torch.Tensor, done: Event) -> None:
        """Track a copy of `source`, which is kept alive, to pinned `host`, complete at `done`."""
        self._source: torch.Tensor | None = source
        self._host = host
        self._done = done

    def done(self) -> bool:
        """True if `result` would return or raise without waiting."""
        try:
            return self._done.query()
        except RuntimeError:  # `result` raises it
            return True

    def result(self) -> npt.NDArray[np.generic]:
        """Wait for the copy and return the values.

        Raises:
            BackendError: the device failed before or during the copy.
        """
        try:
            self._done.synchronize()
        except RuntimeError as error:
            # a late error comes from a kernel that already ran: the device does not recover
            raise BackendError(error_kind(error) or "device_lost", str(error)) from error
        self._source = None
        return self._host.numpy()


class Transfers:
    """Uploads on the stream of the steps, downloads on a stream of their own.

    These uploads are those outside of steps, and of arrays too large for `StepUploads`. A download
    waits for the work that was enqueued before it, and then runs in parallel with the next step.
    """

    def __init__(self, gpu: Gpu) -> None:
        """Create the stream for downloads."""
        self._gpu = gpu
        self._downloads = gpu.new_stream()
        self.last_download: Event | None = None
        """End of the last download: its source must not be overwritten before."""

    def upload(self, arrays: Sequence[npt.NDArray[np.generic]]) -> list[torch.Tensor]:
        """Copy the arrays to the device in one transfer.

        The caller may overwrite its arrays immediately.
        """
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += aligned(array.nbytes)
        pinned = self._gpu.pinned(size)
        staged = pinned.numpy()
        for start, array in zip(starts, arrays, strict=True):
            target = staged[start : start + array.nbytes].view(array.dtype)
            target.reshape(array.shape)[...] = array
        packed = torch.empty(size, dtype=torch.uint8, device=self._gpu.handle)
        packed.copy_(pinned, non_blocking=True)
        return [
            packed[start : start + array.nbytes].view(DTYPES[array.dtype]).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def download(self, x: torch.Tensor) -> HostCopy:
        """Start copying `x` to the host."""
        ready = self._gpu.current_stream().record_event()
        size = x.numel() * x.element_size()
        host = self._gpu.pinned(size).view(x.dtype).view(x.shape)
        self._downloads.wait_event(ready)
        with self._gpu.on(self._downloads):
            host.copy_(x, non_blocking=True)
        self.last_download = self._downloads.record_event()
        return HostCopy(x, host, self.last_download)

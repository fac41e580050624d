"""Convert tensors between torch and JAX, and compile torch functions as XLA programs.

Outside a program, tensors are ordinary torch tensors on the host: an operation copies them to the
device, runs there and returns a host tensor. Inside a program they are torchax tensors, which wrap
JAX tracers. Data that stays on the device between steps (weights, sampled ids) is a torchax tensor
that is never copied to the host.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import jax
import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import torchax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchax.tensor import Tensor
from torchax.view import View

from portalm.errors import BackendError, BackendErrorKind
from portalm_backends.xla.store import Source, Traced

Array: TypeAlias = Any
"""A `jax.Array`, or a tracer while a program is traced."""

DeviceTensor: Any = Tensor
"""A tensor whose values are on the device, or traced."""

_AXIS = "tensor"
"""Name of the mesh axis over which weights and KV heads are sharded."""

_VIEWS = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}
"""torch dtypes that numpy lacks: (torch dtype to view them as, dtype to view the array as)."""


class Bridge:
    """Moves tensors between torch and a set of JAX devices, and compiles programs for them."""

    def __init__(self, devices: Sequence[Any]) -> None:
        """Use these `jax.Device`s; weights and KV heads are sharded over them.

        XLA inserts the communication into the programs (Xu et al., "GSPMD", 2021).
        """
        self.devices = devices
        self._mesh = Mesh(np.array(devices), (_AXIS,))
        self.replicated = NamedSharding(self._mesh, PartitionSpec())
        """Sharding of an array that every device holds in full."""
        # the CPU client's last passes take half of the compile time and gain almost no speed
        self.compiler_options: dict[str, Any] = (
            {"xla_backend_optimization_level": 1} if devices[0].platform == "cpu" else {}
        )
        self._env = torchax.default_env()
        self._local = threading.local()

    # -- tensors ------------------------------------------------------------------------------

    def array(self, tensor: torch.Tensor) -> Array:
        """Return the tensor as an array on the device; a device tensor is not copied."""
        if isinstance(tensor, (DeviceTensor, View)):  # torchax has its own class for slices
            return tensor.jax()
        return self.put(tensor)

    def put(self, tensor: torch.Tensor, sharding: NamedSharding | None = None) -> Array:
        """Copy a host tensor to the device; no copy is made if the device is the host."""
        tensor = tensor.detach().contiguous()
        if tensor.dtype in _VIEWS:
            through, dtype = _VIEWS[tensor.dtype]
            host = tensor.view(through).numpy().view(dtype)
        else:
            host = tensor.numpy()
        return jax.device_put(host, sharding or self.replicated)

    def sharded(self, size: int, *, axis: int) -> NamedSharding:
        """Sharding of `axis`, of `size` elements, over the devices.

        Replicated if `size` is not a multiple of the number of devices.
        """
        if size % len(self.devices):
            return self.replicated
        return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, _AXIS))

    def shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Placeholder for a replicated array, to trace a program with."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

    def tensor(self, array: Array) -> torch.Tensor:
        """Wrap an array as a tensor that stays on the device."""
        wrapped: torch.Tensor = self._env.j2t_iso(array)
        return wrapped

    def result(self, array: Array) -> torch.Tensor:
        """Result of an operation: a traced tensor inside a program, else a tensor on the host."""
        return self.tensor(array) if self.is_tracing else host_tensor(array)

    # -- programs -----------------------------------------------------------------------------

    def compile(self, source: Source, traced: Traced) -> jax.stages.Compiled:
        """Compile `source`; a large program takes minutes."""
        return source.lower(traced).compile(compiler_options=self.compiler_options)

    @property
    def is_tracing(self) -> bool:
        """True inside `tracing`, in the calling thread."""
        return getattr(self._local, "is_tracing", False)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Context in which torch functions, in this thread, operate on JAX tracers."""
        self._local.is_tracing = True
        try:
            with self._env, warnings.catch_warnings():
                # JAX narrows int64 to int32, which holds every index of a step
                warnings.filterwarnings("ignore", message=".*int64.*")
                yield
        finally:
            self._local.is_tracing = False


def host_tensor(array: Array) -> torch.Tensor:
    """Copy an array to a tensor on the host; wait until it is computed."""
    host: npt.NDArray[Any] = np.array(array)
    for dtype, (through, name) in _VIEWS.items():
        if host.dtype == name:
            return torch.from_numpy(host.view(np.int16)).view(through).view(dtype)
    return torch.from_numpy(host)


class ArrayFuture:
    """An asynchronous copy of an array to the host."""

    def __init__(self, array: Array) -> None:
        """Start the copy."""
        self._array = array
        array.copy_to_host_async()

    def done(self) -> bool:
        """True once the array is computed."""
        return bool(self._array.is_ready())

    def result(self) -> npt.NDArray[Any]:
        """Wait for the copy and return the values."""
        with device_errors("a step"):
            return np.asarray(self._array)


@contextmanager
def device_errors(what: str) -> Iterator[None]:
    """Re-raise XLA errors inside this context as `BackendError`; `what` names what failed."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        kind: BackendErrorKind = "oom" if "RESOURCE_EXHAUSTED" in text else "kernel"
        if "UNAVAILABLE" in text or "DATA_LOSS" in text:
            kind = "device_lost"
        raise BackendError(kind, f"{what}: {text}") from error


# -- trees of tensors -------------------------------------------------------------------------


def leaves(tree: Any) -> list[torch.Tensor]:
    """List the tensors in nested dicts, lists, tuples and dataclasses, in order."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    replace_leaves(tree, note)
    return found


def replace_leaves(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Copy the tree with each tensor replaced by `change(tensor)`.

    Dataclasses without a changed field are returned as the same object.
    """
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: replace_leaves(value, change) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(replace_leaves(value, change) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changes = {}
        for field in dataclasses.fields(tree):
            before = getattr(tree, field.name)
            after = replace_leaves(before, change)
            if after is not before:
                changes[field.name] = after
        return dataclasses.replace(tree, **changes) if changes else tree
    return tree


def with_leaves(tree: Any, values: Sequence[Any]) -> Any:
    """Copy the tree with its tensors, in the order of `leaves`, replaced by `values`."""
    following = iter(values)
    return replace_leaves(tree, lambda _: next(following))

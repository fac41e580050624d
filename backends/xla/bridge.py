"""Between torch and JAX: tensors that cross, and torch functions as one XLA program.

Outside of a program tensors are torch's own, on the host: an operation that is called so runs on
the device and gives its result back. Inside of one they are torchax's, which are JAX's tracers in
torch's clothes. What stays on the device between steps (weights, drawn ids) is a torchax tensor
whose values nobody looks at.
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
"""A `jax.Array`, or what stands for one while a program is traced."""

DeviceTensor: Any = Tensor
"""A tensor whose values are on the device, or traced."""

_AXIS = "tensor"
"""Along which devices divide weights."""

_VIEWS = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}
"""dtypes that numpy has no name for: what to see them as on the way."""


class Bridge:
    """One device's side of it."""

    def __init__(self, devices: Sequence[Any]) -> None:
        """To these `jax.Device`s: weights and KV heads are divided among them.

        XLA puts what they have to tell each other into the programs (Xu et al., "GSPMD", 2021).
        """
        self.devices = devices
        self._mesh = Mesh(np.array(devices), (_AXIS,))
        self.whole = NamedSharding(self._mesh, PartitionSpec())
        """Each device has all of it."""
        # the CPU client's last passes take half of the compilation and win next to nothing
        self.compiler_options: dict[str, Any] = (
            {"xla_backend_optimization_level": 1} if devices[0].platform == "cpu" else {}
        )
        self._env = torchax.default_env()
        self._local = threading.local()

    # -- tensors ------------------------------------------------------------------------------

    def array(self, tensor: torch.Tensor) -> Array:
        """The tensor on the device; one that is there already is not copied."""
        if isinstance(tensor, (DeviceTensor, View)):  # a slice is a view, to torchax
            return tensor.jax()
        return self.put(tensor)

    def put(self, tensor: torch.Tensor, sharding: NamedSharding | None = None) -> Array:
        """A host tensor on the device, in one copy (none, where the device is the host)."""
        tensor = tensor.detach().contiguous()
        if tensor.dtype in _VIEWS:
            through, dtype = _VIEWS[tensor.dtype]
            host = tensor.view(through).numpy().view(dtype)
        else:
            host = tensor.numpy()
        return jax.device_put(host, sharding or self.whole)

    def divided(self, size: int, *, axis: int) -> NamedSharding:
        """An array's `axis` divided among the devices, if `size` is a multiple of their number."""
        if size % len(self.devices):
            return self.whole
        return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, _AXIS))

    def shape(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """What stands for an array that each device has all of, while a program is traced."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.whole)

    def tensor(self, array: Array) -> torch.Tensor:
        """An array as a tensor that stays on the device."""
        wrapped: torch.Tensor = self._env.j2t_iso(array)
        return wrapped

    def result(self, array: Array) -> torch.Tensor:
        """What an operation gives: within a program a part of it, else a tensor on the host."""
        return self.tensor(array) if self.is_tracing else host_tensor(array)

    # -- programs -----------------------------------------------------------------------------

    def compile(self, source: Source, traced: Traced) -> jax.stages.Compiled:
        """The program of `source`, ready to be called; minutes, for a large one."""
        return source.lower(traced).compile(compiler_options=self.compiler_options)

    @property
    def is_tracing(self) -> bool:
        """True while a program is made of what is called."""
        return getattr(self._local, "is_tracing", False)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Within it torch computes on JAX's tracers, in this thread alone."""
        self._local.is_tracing = True
        try:
            with self._env, warnings.catch_warnings():
                # int64 is int32 here: no index of a step is larger
                warnings.filterwarnings("ignore", message=".*int64.*")
                yield
        finally:
            self._local.is_tracing = False


def host_tensor(array: Array) -> torch.Tensor:
    """A device's array as a tensor on the host; waits for it."""
    host: npt.NDArray[Any] = np.array(array)
    for dtype, (through, name) in _VIEWS.items():
        if host.dtype == name:
            return torch.from_numpy(host.view(np.int16)).view(through).view(dtype)
    return torch.from_numpy(host)


class ArrayFuture:
    """A copy of an array on its way to the host."""

    def __init__(self, array: Array) -> None:
        """Begin it."""
        self._array = array
        array.copy_to_host_async()

    def done(self) -> bool:
        """True once the array is computed."""
        return bool(self._array.is_ready())

    def result(self) -> npt.NDArray[Any]:
        """The values; waits for them."""
        with device_errors("a step"):
            return np.asarray(self._array)


@contextmanager
def device_errors(what: str) -> Iterator[None]:
    """What XLA raises within it as a `BackendError` that says so of `what`."""
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
    """The tensors in dicts, lists, tuples and dataclasses, in their order."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    replace_leaves(tree, note)
    return found


def replace_leaves(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same tree with each tensor changed; what holds none is the very same object."""
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
    """The same tree with its tensors, in the order of `leaves`, replaced by `values`."""
    following = iter(values)
    return replace_leaves(tree, lambda _: next(following))

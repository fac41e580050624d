"""An on-disk cache of traced programs, so that later starts do not trace them again.

JAX caches compiled programs, keyed by the traced program; but tracing a model with many layers
takes longer than reading the compiled one. So the traced program is cached too, keyed by
everything it depends on (docs/adr/0025). It is StableHLO as `jax.export` writes it: plain data,
and reading it executes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax import export

from portalm_backends import portable, xla

Traced: TypeAlias = "export.Exported"
"""A program that is traced but not compiled."""

logger = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "libtpu", "ml_dtypes", "numpy", "torch", "torchax", "transformers")
"""Packages whose version may change a traced program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A function with its arguments, which can be traced and compiled."""

    function: Callable[..., Any]
    """A function of arrays."""
    arguments: tuple[Any, ...]
    """Trees of arrays, or of `jax.ShapeDtypeStruct`s with a sharding."""
    results: Any
    """Sharding of the results, or a tree of shardings."""
    donated: tuple[int, ...] = ()
    """Indices of the arguments whose memory the program reuses for its results."""

    def trace(self, platform: str | None = None) -> Traced:
        """Trace the function, for this platform or for the one that is named."""
        platforms = None if platform is None else [platform]
        return export.export(self._jit(self.function), platforms=platforms)(*self.arguments)

    def lower(self, traced: Traced) -> jax.stages.Lowered:
        """Lower a result of `trace`, from any process, for the devices of the arguments."""
        return self._jit(traced.call).lower(*self.arguments)

    def _jit(self, function: Callable[..., Any]) -> Any:
        return jax.jit(function, donate_argnums=self.donated, out_shardings=self.results)


class Store:
    """A folder of traced programs, one file each: digest of the key, digest of the data, data."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`; it is created by the first write."""
        self._folder = folder
        self._key = _digest(environment().encode(), code())

    def traced(self, source: Source, what: str) -> Traced:
        """Read the traced program from disk, or trace it now and write it to disk.

        Args:
            source: traced if there is no valid file.
            what: identifies what the function computes; arguments, our code and `environment`
                are added to the key here.
        """
        what = f"{what} {_describe(source)}"
        path = self._folder / _digest(what.encode()).hex()[:32]  # a new code version replaces it
        key = _digest(what.encode(), self._key)
        cached = _read(path, key)
        if cached is not None:
            return export.deserialize(bytearray(cached))
        traced = source.trace()
        try:
            _write(path, key, bytes(traced.serialize()))
        except OSError as error:  # a full disk, or a read-only folder
            logger.warning(
                "cannot cache a traced step, so the next start will trace its steps again: %s",
                error,
            )
        return traced


def _describe(source: Source) -> str:
    """Describe dtype, shape and sharding of each argument, and the sharding of the results."""
    arguments = jax.tree.map(lambda x: f"{x.dtype}{x.shape} {x.sharding}", source.arguments)
    return repr((arguments, source.donated, source.results))


def _read(path: Path, key: bytes) -> bytes | None:
    """Read the data that `_write` wrote; None if it is missing, damaged or has another key."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head, traced = data[: 2 * len(key)], data[2 * len(key) :]
    return traced if head == key + _digest(traced) else None


def _write(path: Path, key: bytes, traced: bytes) -> None:
    """Write atomically: another process may be reading the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key + _digest(traced) + traced)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def environment() -> str:
    """Versions, device and JAX flags, which every traced program depends on.

    Inputs of compilation alone (XLA flags, CPU features) are in the key of JAX's own cache.
    """
    versions = [(name, version) for name in _PACKAGES if (version := _version(name))]
    device = jax.devices()[0]
    flags = {n: v for n, v in sorted(jax.config.values.items()) if "cache" not in n}
    where = (device.platform, device.device_kind, len(jax.devices()))
    return repr((platform.python_version(), versions, where, flags))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def code() -> bytes:
    """Digest of all code of this project that may run while a step is traced."""
    return _digest(*(part for file in _files() for part in (file.name.encode(), file.read_bytes())))


def _files() -> Iterator[Path]:
    # found, not imported: backends do not import what lies above the seam
    for name in ("portalm", portable.__name__, xla.__name__):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            yield from sorted(Path(folder).rglob("*.py"))


def _digest(*parts: bytes) -> bytes:
    """SHA-256 of the parts, 32 bytes; lengths are hashed too, so that boundaries count."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()

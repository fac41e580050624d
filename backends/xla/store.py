"""Traced programs on disk: what one start has traced no later one traces again.

JAX keeps what XLA compiled, by the program that was compiled; to trace one of many layers takes
longer than to read that. So the traced program (StableHLO, as `jax.export` writes it: data, which
nothing executes when it is read) lies beside it, by all that went into it (docs/adr/0025).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
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

from portalm import backend as seam
from portalm_backends import portable, xla

Traced: TypeAlias = "export.Exported"
"""A program before it is compiled."""

logger = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib", "libtpu", "ml_dtypes", "numpy", "torch", "torchax", "transformers")
"""What a traced program may differ by, beside our own code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What becomes a program."""

    function: Callable[..., Any]
    """Of arrays."""
    arguments: tuple[Any, ...]
    """Trees of arrays, or of what has their shape, dtype and place."""
    results: Any
    """Where they go: a sharding, or a tree of those."""
    donated: tuple[int, ...] = ()
    """Arguments that the program overwrites."""

    def trace(self, platform: str | None = None) -> Traced:
        """The program before it is compiled; for another platform than this one, if named."""
        platforms = None if platform is None else [platform]
        return export.export(self._jit(self.function), platforms=platforms)(*self.arguments)

    def lower(self, traced: Traced) -> jax.stages.Lowered:
        """What `trace` gave, here or in another process, for the devices of the arguments."""
        return self._jit(traced.call).lower(*self.arguments)

    def _jit(self, function: Callable[..., Any]) -> Any:
        return jax.jit(function, donate_argnums=self.donated, out_shardings=self.results)


class Store:
    """Traced programs in a folder, one file each: a digest of what it is of, one of it, itself."""

    def __init__(self, folder: Path) -> None:
        """It need not exist."""
        self._folder = folder
        self._key = _digest(surroundings().encode(), code())

    def traced(self, source: Source, what: str) -> Traced:
        """`source`, traced: read, or traced now and kept.

        Args:
            source: what to trace, if it has to be.
            what: all that its function does, beside its arguments, our code and `surroundings`.
        """
        what = f"{what} {_described(source)}"
        path = self._folder / _digest(what.encode()).hex()[:32]  # other code takes its place
        key = _digest(what.encode(), self._key)
        kept = _read(path, key)
        if kept is not None:
            return export.deserialize(bytearray(kept))
        traced = source.trace()
        try:
            _write(path, key, bytes(traced.serialize()))
        except OSError as error:  # a full disk, or a folder that is only read
            logger.warning("the next start will trace its steps again: %s", error)
        return traced


def _described(source: Source) -> str:
    """Shape, dtype and place of each argument, and where results go."""
    arguments = jax.tree.map(lambda x: f"{x.dtype}{x.shape} {x.sharding}", source.arguments)
    return repr((arguments, source.donated, source.results))


def _read(path: Path, key: bytes) -> bytes | None:
    """What `_write` wrote; None if it is not there, of another key, or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head, traced = data[: 2 * len(key)], data[2 * len(key) :]
    return traced if head == key + _digest(traced) else None


def _write(path: Path, key: bytes, traced: bytes) -> None:
    """All of it or nothing: others may read meanwhile."""
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


def surroundings() -> str:
    """What every traced program depends on, whatever it is of: versions, the device, JAX's flags.

    What only compiling depends on (XLA's flags, the CPU's instructions) JAX looks after.
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
    """Digest of all our code that may run while a step is traced."""
    return _digest(*(part for file in _files() for part in (file.name.encode(), file.read_bytes())))


def _files() -> Iterator[Path]:
    for module in (seam, portable, xla):
        assert module.__file__ is not None
        yield from sorted(Path(module.__file__).parent.rglob("*.py"))


def _digest(*parts: bytes) -> bytes:
    """32 bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()

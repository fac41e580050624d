"""A GGUF file's header: metadata and where each tensor lies. Needs neither numpy nor torch.

The format: "GGUF" in ggml's docs/gguf.md, versions 2 and 3, little-endian. A header is believed
only as far as the file reaches: no count in it makes us allocate.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portalm.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_ARRAY, _STRING, _BOOL = 9, 8, 7
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's place in the file."""

    shape: tuple[int, ...]
    """Rows first, as torch has it (the file has it the other way round)."""
    kind: int
    """A value of gguf.GGMLQuantizationType."""
    offset: int
    """Bytes from the beginning of the data."""


class Reader:
    """Reads little-endian values and refuses to go past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def fail(self, reason: str) -> CheckpointError:
        """An error that says where the reader stands."""
        return CheckpointError(self.path, f"{reason} (at byte {self.at} of {len(self.data)})")

    def need(self, num_bytes: int, what: str) -> None:
        """Raise `CheckpointError` unless the file has so many more bytes."""
        if num_bytes > len(self.data) - self.at:
            raise self.fail(f"it is truncated or corrupt: {what} reaches past its end")

    def scalar(self, code: str) -> Any:
        """A number, of the type that struct calls `code`."""
        size = struct.calcsize("<" + code)
        self.need(size, "a value")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        """A text behind its length; what is not UTF-8 is replaced."""
        length = self.scalar("Q")
        self.need(length, "a text")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A value of one of the format's types."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"metadata of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        """An array behind its type and length."""
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            self.need(count * struct.calcsize(_SCALARS[kind]), "an array")
            values = list(struct.unpack_from(code, self.data, self.at))
            self.at += struct.calcsize(code)
            return values
        if kind != _STRING:
            raise self.fail(f"an array of unknown type {kind}")
        self.need(8 * count, "an array of texts")  # each has at least its length
        return [self.string() for _ in range(count)]


def read_metadata(path: Path) -> dict[str, Any]:
    """All metadata of a GGUF file as Python values. Raises `CheckpointError` for a broken file."""
    data = map_file(path)
    return read_header(Reader(path, data))[0]


def map_file(path: Path) -> mmap.mmap:
    """The file, mapped to be read. Raises `CheckpointError` if it cannot be, or is empty."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(path, "it is empty") from None
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error


def read_header(reader: Reader) -> tuple[dict[str, Any], int]:
    """The metadata and the number of tensors; the reader stands before the first tensor's info."""
    if reader.data[:4] != _MAGIC:
        raise reader.fail(f"it begins with {reader.data[:4]!r}, a GGUF file with {_MAGIC!r}")
    reader.at = 4
    version = reader.scalar("I")
    if version not in _VERSIONS:
        raise reader.fail(f"GGUF version {version}; versions 2 and 3 (little-endian) are read")
    num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
    # the least bytes that so many entries take
    if num_values * 13 + num_tensors * 24 > len(reader.data):
        raise reader.fail(
            f"it is corrupt: the header counts {num_tensors} tensors and {num_values} values, "
            f"more than the file has room for"
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("I"))
    return metadata, num_tensors


def read_tensor_infos(reader: Reader, num_tensors: int) -> dict[str, TensorInfo]:
    """Where the tensors lie, by their names in the file; the reader stands behind the metadata."""
    infos: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        name, num_dimensions = reader.string(), reader.scalar("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise reader.fail(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(reader.scalar("Q") for _ in range(num_dimensions))[::-1]
        infos[name] = TensorInfo(shape, reader.scalar("I"), reader.scalar("Q"))
    return infos

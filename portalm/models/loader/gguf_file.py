"""A GGUF file's header: metadata and where each tensor lies. Needs neither numpy nor torch.

The format: "GGUF" in ggml's docs/gguf.md, versions 2 and 3, little-endian. A header is believed
only as far as the file reaches: no count in it makes us allocate.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portalm.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_WINDOW = 1 << 20
_ARRAY, _STRING, _BOOL = 9, 8, 7
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Tensor types (ggml.h's ggml_type): name, values in a block, bytes of a block."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's place in the file."""

    shape: tuple[int, ...]
    """Rows first, as torch has it (the file has it the other way round)."""
    kind: int
    """One of `TYPES`, if the file is sound."""
    offset: int
    """Bytes from the beginning of the data."""

    @property
    def num_bytes(self) -> int:
        """Of a sound one."""
        _, block_size, block_bytes = TYPES[self.kind]
        return math.prod(self.shape) // block_size * block_bytes

    def parts(self) -> list[TensorInfo]:
        """Those of which the tensor is a stack: one for each of its first dimension."""
        size = self.num_bytes // self.shape[0]
        return [
            TensorInfo(self.shape[1:], self.kind, self.offset + i * size)
            for i in range(self.shape[0])
        ]


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
        return [
            self.data[start:end].decode("utf-8", errors="replace")
            for start, end in self._text_places(count)
        ]

    def skip(self, kind: int) -> None:
        """Go past a value without making anything of it."""
        if kind != _ARRAY:
            self.value(kind)
            return
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            self._text_places(count)
        elif inner in _SCALARS:
            num_bytes = count * struct.calcsize(_SCALARS[inner])
            self.need(num_bytes, "an array")
            self.at += num_bytes
        else:
            raise self.fail(f"an array of unknown type {inner}")

    def _text_places(self, count: int) -> list[tuple[int, int]]:
        """Where so many texts begin and end.

        There can be 100,000s, and a mapping takes ten times as long to look into as bytes do.
        """
        self.need(8 * count, "an array of texts")  # each has at least its length
        at, last = self.at, len(self.data)
        length_at = struct.Struct("<Q").unpack_from
        window, window_at = b"", 0
        places = []
        for _ in range(count):
            if at + 8 > window_at + len(window):
                window, window_at = self.data[at : at + _WINDOW], at
                if len(window) < 8:
                    raise self.fail("it is truncated or corrupt: a text reaches past its end")
            start = at + 8
            at = start + length_at(window, at - window_at)[0]
            if at > last:
                raise self.fail("it is truncated or corrupt: a text reaches past its end")
            places.append((start, at))
        self.at = at
        return places


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


def read_header(reader: Reader, *, skip: Collection[str] = ()) -> tuple[dict[str, Any], int]:
    """The metadata and the number of tensors; the reader stands before the first tensor's info.

    Values under the keys in `skip` are left out.
    """
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
        kind = reader.scalar("I")
        if key in skip:
            reader.skip(kind)
        else:
            metadata[key] = reader.value(kind)
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

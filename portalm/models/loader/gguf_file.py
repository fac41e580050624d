"""Reads the headers of GGUF files: metadata, and the place of each tensor, without numpy or torch.

The format is described in ggml's docs/gguf.md; versions 2 and 3, little-endian, are supported.
Every count in the header is checked against the file's size before memory is allocated for it.
A checkpoint may be split over several files, of which the first has the metadata.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from portalm.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs"),
    (b"<!doctype", "a web page, not a model: the download failed"),
    (b"<html", "a web page, not a model: the download failed"),
    (b"lmgg", "in the GGML format of 2023: convert the model again"),
    (b"fmgg", "in the GGML format of 2023: convert the model again"),
    (b"tjgg", "in the GGJT format of 2023: convert the model again"),
    (b"algg", "a GGLA adapter, not a model"),
    (b"pk\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "compressed with gzip: decompress it"),
    (b"\0" * 16, "damaged: it begins with zeros, as an incomplete download does"),
)
"""First bytes, in lower case, of files that are mistaken for GGUF files."""
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
"""Names of the parts of a split checkpoint, numbered from 1."""
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
"""Tensor types (ggml_type in ggml.h): name, values per block, bytes per block."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape, type and place of a tensor in the file."""

    shape: tuple[int, ...]
    """In torch's order, rows first; the file stores it reversed."""
    kind: int
    """A key of `TYPES`, unless the file is broken."""
    offset: int
    """Bytes from the start of the file's tensor data."""
    part: int = 0
    """Index of the file, in a checkpoint that is split over several."""

    @property
    def num_bytes(self) -> int:
        """Size in bytes; `kind` must be known."""
        _, block_size, block_bytes = TYPES[self.kind]
        return math.prod(self.shape) // block_size * block_bytes

    def parts(self) -> list[TensorInfo]:
        """Split a stacked tensor along its first dimension."""
        size = self.num_bytes // self.shape[0]
        return [
            TensorInfo(self.shape[1:], self.kind, self.offset + i * size, self.part)
            for i in range(self.shape[0])
        ]


class StringArray(Sequence[str]):
    """An array of strings in a mapped file, each decoded when it is read."""

    def __init__(self, data: mmap.mmap, spans: Sequence[tuple[int, int]]) -> None:
        """Remember where the strings are: their first bytes, and the bytes after their last."""
        self._data = data
        self._spans = spans

    def __len__(self) -> int:
        """Number of strings."""
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Decode one string or several; invalid UTF-8 is replaced."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._spans[index]
        return self._data[start:end].decode("utf-8", errors="replace")


class Reader:
    """Reads little-endian values, and raises `CheckpointError` at the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def fail(self, reason: str) -> CheckpointError:
        """An error with the reader's position, for the caller to raise."""
        return CheckpointError(self.path, f"{reason} (at byte {self.at} of {len(self.data)})")

    def need(self, num_bytes: int, what: str) -> None:
        """Raise `CheckpointError` unless the file has `num_bytes` more bytes."""
        if num_bytes > len(self.data) - self.at:
            raise self.fail(f"it is truncated or corrupt: {what} reaches past its end")

    def scalar(self, code: str) -> Any:
        """Read a number; `code` is its type in struct."""
        size = struct.calcsize("<" + code)
        self.need(size, "a value")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        """Read a string with a length prefix; invalid UTF-8 is replaced."""
        length = self.scalar("Q")
        self.need(length, "a string")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """Read a metadata value of type `kind`."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"a metadata value has unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> Sequence[Any]:
        """Read an array with a prefix of type and length; strings are decoded when read."""
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            self.need(count * struct.calcsize(_SCALARS[kind]), "an array")
            values = list(struct.unpack_from(code, self.data, self.at))
            self.at += struct.calcsize(code)
            return values
        if kind != _STRING:
            raise self.fail(f"an array has unknown type {kind}")
        return StringArray(self.data, self._string_spans(count))

    def skip(self, kind: int) -> None:
        """Skip a value."""
        if kind != _ARRAY:
            self.value(kind)
            return
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            self._string_spans(count)
        elif inner in _SCALARS:
            num_bytes = count * struct.calcsize(_SCALARS[inner])
            self.need(num_bytes, "an array")
            self.at += num_bytes
        else:
            raise self.fail(f"an array has unknown type {inner}")

    def _string_spans(self, count: int) -> list[tuple[int, int]]:
        """Read start and end of `count` strings.

        There can be hundreds of thousands, and indexing a mapping is ten times slower than indexing
        bytes, so the file is read through a window.
        """
        self.need(8 * count, "an array of strings")  # each has a length of 8 bytes
        at, last = self.at, len(self.data)
        length_at = struct.Struct("<Q").unpack_from
        window, window_at = b"", 0
        spans = []
        for _ in range(count):
            if at + 8 > window_at + len(window):
                window, window_at = self.data[at : at + _WINDOW], at
                if len(window) < 8:
                    raise self.fail("it is truncated or corrupt: a string reaches past its end")
            start = at + 8
            at = start + length_at(window, at - window_at)[0]
            if at > last:
                raise self.fail("it is truncated or corrupt: a string reaches past its end")
            spans.append((start, at))
        self.at = at
        return spans


def read_metadata(path: Path) -> dict[str, Any]:
    """Read all metadata of a GGUF file; raise `CheckpointError` for a broken file."""
    data = map_file(path)
    return read_header(Reader(path, data))[0]


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading; raise `CheckpointError` if it is empty or cannot be mapped."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(path, "it is empty") from None
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error


def read_header(reader: Reader, *, skip: Collection[str] = ()) -> tuple[dict[str, Any], int]:
    """Read metadata and the number of tensors, up to the first tensor's info.

    Keys in `skip` are left out.
    """
    _check_magic(reader)
    version = reader.scalar("I")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise reader.fail(
                "it is big-endian, which is not supported: convert it with llama.cpp's "
                "gguf_convert_endian.py"
            )
        raise reader.fail(
            f"GGUF version {version} is not supported; supported: 2 and 3, little-endian"
        )
    num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
    # the smallest size of that many entries
    if num_values * 13 + num_tensors * 24 > len(reader.data):
        raise reader.fail(
            f"it is corrupt: the header counts {num_tensors} tensors and {num_values} values, "
            f"more than the file has room for"
        )
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = reader.string()
        kind = reader.scalar("I")
        if key in metadata:
            raise reader.fail(f"its metadata has {key!r} twice")
        if key in skip:
            reader.skip(kind)
        else:
            metadata[key] = reader.value(kind)
    return metadata, num_tensors


def read_tensor_infos(reader: Reader, num_tensors: int, *, part: int = 0) -> dict[str, TensorInfo]:
    """Read infos of all tensors by their names in the file; call after `read_header`."""
    infos: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        name, num_dimensions = reader.string(), reader.scalar("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise reader.fail(
                f"tensor {name!r} has {num_dimensions} dimensions, at most {_MAX_DIMENSIONS} "
                f"are allowed"
            )
        if name in infos:
            raise reader.fail(f"it has two tensors named {name!r}")
        shape = tuple(reader.scalar("Q") for _ in range(num_dimensions))[::-1]
        infos[name] = TensorInfo(shape, reader.scalar("I"), reader.scalar("Q"), part)
    return infos


def _check_magic(reader: Reader) -> None:
    """Read the first four bytes; raise `CheckpointError` unless they are those of GGUF files."""
    begin = reader.data[:64]
    if begin[:4] == _MAGIC:
        reader.at = 4
        return
    for magic, what in _OTHER_FORMATS:
        if begin.lstrip().lower().startswith(magic):
            raise reader.fail(f"it is not a GGUF file, but {what}")
    raise reader.fail(f"it is not a GGUF file: it begins with {begin[:4]!r}, expected {_MAGIC!r}")


# -- files ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GGUFPart:
    """A GGUF file, or one of the files of a split checkpoint."""

    path: Path
    data: mmap.mmap
    metadata: dict[str, Any]
    infos: dict[str, TensorInfo]
    """The file's tensors, by their names in it."""
    start: int
    """First byte of the tensor data."""


def open_parts(path: Path, *, skip: Collection[str] = ()) -> list[GGUFPart]:
    """Map a GGUF file, and the other files of the checkpoint if it is split.

    Args:
        path: the file, or the first one.
        skip: keys of the metadata to leave out.

    Raises:
        CheckpointError: a file is missing or broken, or `path` is not the first one.
    """
    first = _open_part(path, 0, skip)
    count = first.metadata.get("split.count", 0)
    if count in (0, 1):
        return [first]
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            path,
            f"it is one of {count} files of a split checkpoint, but its name does not end with "
            f"-00001-of-{count:05}.gguf: restore the name, by which the others are found",
        )
    paths = [path.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf") for i in range(count)]
    if (number := first.metadata.get("split.no", 0)) != 0:
        raise CheckpointError(
            path, f"it is file {number + 1} of {count}: pass the first one, {paths[0].name}"
        )
    parts = [first]
    for i, other in enumerate(paths[1:], start=1):
        if not other.exists():
            raise CheckpointError(
                other, f"it is missing: the checkpoint is split over {count} files"
            )
        parts.append(_open_part(other, i, skip))
        found = parts[i].metadata.get("split.no"), parts[i].metadata.get("split.count")
        if found != (i, count):
            raise CheckpointError(
                other, f"its split.no and split.count are {found}, not {(i, count)}"
            )
    _check_tensors_of_parts(parts)
    return parts


def _check_tensors_of_parts(parts: Sequence[GGUFPart]) -> None:
    holders: dict[str, GGUFPart] = {}
    for part in parts:
        for name in part.infos:
            if name in holders:
                raise CheckpointError(
                    part.path, f"it has a tensor {name!r}, as {holders[name].path.name} has"
                )
            holders[name] = part
    wanted = parts[0].metadata.get("split.tensors.count")
    if wanted is not None and len(holders) != wanted:
        raise CheckpointError(
            parts[0].path,
            f"split.tensors.count is {wanted}, but the {len(parts)} files have {len(holders)} "
            f"tensors: one is incomplete, or of another checkpoint",
        )


def _open_part(path: Path, index: int, skip: Collection[str]) -> GGUFPart:
    """Map one file and read its header; check that every tensor is within the file."""
    data = map_file(path)
    reader = Reader(path, data)
    metadata, num_tensors = read_header(reader, skip=skip)
    infos = read_tensor_infos(reader, num_tensors, part=index)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise reader.fail(f"general.alignment must be a positive integer, not {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    for name, info in infos.items():
        _check_extent(path, name, info, start, len(data))
    _check_overlap(path, infos)
    return GGUFPart(path, data, metadata, infos, start)


def _check_extent(path: Path, name: str, info: TensorInfo, start: int, size: int) -> None:
    if info.kind not in TYPES:
        raise CheckpointError(path, f"tensor {name!r} has unknown type {info.kind}")
    kind, block_size, _ = TYPES[info.kind]
    if not info.shape or 0 in info.shape or info.shape[-1] % block_size:
        raise CheckpointError(
            path,
            f"tensor {name!r} of type {kind} has shape {list(info.shape)}; it must not be empty, "
            f"and its last dimension must be a multiple of {block_size}",
        )
    end = start + info.offset + info.num_bytes
    if end > size:
        raise CheckpointError(
            path,
            f"it is truncated: tensor {name!r} ends at byte {end}, but the file has {size} bytes; "
            f"download it again",
        )


def _check_overlap(path: Path, infos: dict[str, TensorInfo]) -> None:
    end, before = 0, ""
    for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise CheckpointError(path, f"tensors {before!r} and {name!r} overlap")
        end, before = info.offset + info.num_bytes, name

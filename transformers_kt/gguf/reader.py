"""One GGUF file over mmap: metadata, tensor table, and views of the tensor data.

The file is not trusted: every length, count and offset is compared with the size of the file before it is used, so a
damaged or hostile file ends in `GgufFormatError`, never in a crash, and costs no more than reading its header.
(A file that another process truncates while it is mapped still ends in SIGBUS; nothing in user space prevents that.)
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct
from struct import error as struct_error
from typing import Any, NoReturn, overload

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as GgmlType

from transformers_kt.errors import CheckpointNotFoundError, GgufFormatError, UnsupportedTypeError

__all__ = ["GgmlType", "GgufFile", "Metadata", "StringArray", "TensorInfo"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 had 32-bit counts and was gone within weeks
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4

# Bounds on what an honest header holds; they keep a hostile one from costing minutes and gigabytes. That of a model of
# 671 billion parameters has 1,086 tensors, some 60 keys and 8 MB; one tensor per expert would make 47,000.
_MAX_HEADER_BYTES = 128 << 20
_MAX_TENSORS = 1 << 17
_MAX_KEYS = 1 << 16
_MAX_NAME_BYTES = 65535  # the format's own limit for keys

_U32 = Struct("<I")
_U64 = Struct("<Q")
_TENSOR_TAIL = Struct("<IQ")  # type, offset
_SCALAR_CODES = {  # struct and numpy share these letters
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_SCALARS = {int(kind): Struct("<" + code) for kind, code in _SCALAR_CODES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is stored.

    ``shape`` is row-major, as torch has it: (rows, cols), or (experts, rows, cols) for a stack. ``offset`` counts from
    the start of the file ``path``; ``nbytes`` were checked to lie within it.
    """

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path


class StringArray(Sequence[str]):
    """An array of strings in the metadata. Its length is known; the strings are decoded at the first look at one.

    Raises `GgufFormatError` at that look if a string is not UTF-8.
    """

    def __init__(self, path: Path, key: str, mapped: mmap.mmap, extent: slice, count: int) -> None:
        self._path, self._key = path, key
        self._mapped, self._extent, self._count = mapped, extent, count
        self._strings: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._decoded()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __repr__(self) -> str:
        return f"<{self._count} strings of {self._key}>"

    def _decoded(self) -> list[str]:
        if self._strings is None:
            raw = self._mapped[self._extent]
            read_length = _U64.unpack_from
            strings = []
            position = 0
            try:
                for _ in range(self._count):
                    begin = position + 8
                    position = begin + read_length(raw, position)[0]
                    strings.append(raw[begin:position].decode())
            except UnicodeDecodeError as error:
                raise GgufFormatError(
                    f"{self._path}: string {len(strings)} of {_shown(self._key)} is not UTF-8 ({error}); "
                    "the file is damaged, get it again"
                ) from None
            self._strings = strings
        return self._strings


class Metadata(Mapping[str, Any]):
    """The key-value section, in file order.

    Values are int, float, bool, str, `StringArray`, or a read-only one-dimensional numpy array.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GgufFile:
    """A GGUF file of version 2 or 3, little-endian, mapped read-only; the mapping lives as long as any view of it.

    Raises `CheckpointNotFoundError` if there is no such file, `GgufFormatError` if it is not GGUF, truncated or
    contradicts itself, `UnsupportedTypeError` if a tensor has a type that ggml does not define.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._mapped = _map(self.path)
        header = _Cursor(self._mapped, self.path)
        tensor_count, key_count = _read_preamble(header)
        self.metadata = Metadata(_read_metadata(header, key_count))
        alignment = _alignment(self.metadata, self.path)
        entries = _read_tensor_table(header, tensor_count, alignment)
        self.tensors: dict[str, TensorInfo] = _place_tensors(entries, header, alignment)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without header and padding."""
        return sum(info.nbytes for info in self.tensors.values())

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of tensor ``name``: uint8, (nbytes,), a read-only view of the mapping. Reads nothing yet."""
        info = self.tensors[name]
        return np.frombuffer(self._mapped, dtype=np.uint8, count=info.nbytes, offset=info.offset)

    def drop_pages(self, name: str, end: int | None = None) -> None:
        """Stop holding in memory the whole pages of tensor ``name``, up to its byte ``end``.

        They are read anew if looked at again.
        """
        info = self.tensors[name]
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.offset + (info.nbytes if end is None else end)) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(self._mapped, "madvise"):  # Windows has none
            self._mapped.madvise(mmap.MADV_DONTNEED, start, length)


class _Cursor:
    """A position in the header that refuses to leave it."""

    __slots__ = ("_end", "mapped", "path", "position", "size", "subject")

    def __init__(self, mapped: mmap.mmap, path: Path) -> None:
        self.mapped, self.path = mapped, path
        self.size = len(mapped)
        self._end = min(self.size, _MAX_HEADER_BYTES)
        self.position = 0
        self.subject = "the header"  # what is being read, for messages

    @property
    def remaining(self) -> int:
        return self._end - self.position

    def take(self, count: int) -> int:
        """Move ``count`` bytes on; the position before."""
        start = self.position
        if count > self._end - start:
            self.refuse_end(f"needs {count} bytes at offset {start}")
        self.position = start + count
        return start

    def unpack(self, layout: Struct) -> tuple[Any, ...]:
        return layout.unpack_from(self.mapped, self.take(layout.size))

    def count(self, most: int, smallest_item: int) -> int:
        """A u64 count of items of at least ``smallest_item`` bytes each, refused where they cannot fit."""
        (count,) = self.unpack(_U64)
        if count > most:
            self.refuse(f"counts {count} items; at most {most} are accepted")
        if count * smallest_item > self.remaining:
            self.refuse_end(f"counts {count} items")
        return int(count)

    def string(self, most_bytes: int = _MAX_HEADER_BYTES) -> str:
        (length,) = self.unpack(_U64)
        if length > most_bytes and length <= self.remaining:
            self.refuse(f"holds a string of {length} bytes; at most {most_bytes} are accepted")
        start = self.take(length)
        try:
            return self.mapped[start : self.position].decode()
        except UnicodeDecodeError as error:
            self.refuse(f"holds a string that is not UTF-8 ({error})")

    def skip_strings(self, count: int) -> None:
        # 257,000 strings stand between the start of a large file and its tensor table: this loop is what opening
        # one costs. It needs no check per string, for each one moves the position forward and the first read past
        # the end raises.
        mapped, position, read_length = self.mapped, self.position, _U64.unpack_from
        try:
            for _ in range(count):
                position += 8 + read_length(mapped, position)[0]
        except (struct_error, OverflowError):
            position = self.size + 1
        if position > self._end:
            self.refuse_end(f"holds {count} strings")
        self.position = position

    def refuse_end(self, found: str) -> NoReturn:
        if self.size > _MAX_HEADER_BYTES:
            self.refuse(f"{found}; headers of up to {_MAX_HEADER_BYTES} bytes are accepted")
        raise GgufFormatError(
            f"{self.path}: {self.subject} {found}, but the file ends after {self.size} bytes. It is truncated or "
            "damaged; get it again"
        )

    def refuse(self, found: str) -> NoReturn:
        raise GgufFormatError(f"{self.path}: {self.subject} {found}. The file is damaged; get it again")


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise GgufFormatError(f"{path} is empty (0 bytes); a GGUF file is expected")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointNotFoundError(f"{path} is not a file ({error.strerror}); a GGUF file is expected") from None


def _read_preamble(header: _Cursor) -> tuple[int, int]:
    """(tensor count, key count)."""
    magic = header.mapped[:4]
    if magic != _MAGIC:
        hint = "check that the download completed"
        if header.mapped[:24] == b"version https://git-lfs.":
            hint = "it is a Git LFS pointer: run `git lfs pull`"
        raise GgufFormatError(
            f"{header.path} is not a GGUF file: it starts with {magic!r}, {_MAGIC!r} is expected; {hint}"
        )
    header.take(4)
    (version,) = header.unpack(_U32)
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise GgufFormatError(f"{header.path} is a big-endian GGUF file; little-endian ones are accepted")
        raise GgufFormatError(
            f"{header.path} is GGUF version {version}; versions {' and '.join(map(str, _VERSIONS))} are accepted. "
            "Convert the model anew"
        )
    header.subject = "the tensor count"
    tensor_count = header.count(_MAX_TENSORS, smallest_item=32)  # lengths, one dim, type, offset
    header.subject = "the key count"
    return tensor_count, header.count(_MAX_KEYS, smallest_item=13)  # length, type, one byte


def _read_metadata(header: _Cursor, key_count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(key_count):
        header.subject = f"metadata key {number} of {key_count}"
        key = header.string(_MAX_NAME_BYTES)
        if key in metadata:
            header.refuse(f"is {_shown(key)}, which was there before")
        header.subject = f"the value of {_shown(key)}"
        (kind,) = header.unpack(_U32)
        metadata[key] = _read_value(header, key, kind)
    return metadata


def _read_value(header: _Cursor, key: str, kind: int) -> Any:
    if (scalar := _SCALARS.get(kind)) is not None:
        return header.unpack(scalar)[0]
    if kind == GGUFValueType.STRING:
        return header.string()
    if kind != GGUFValueType.ARRAY:
        header.refuse(f"has type {kind}; types 0 to {max(GGUFValueType)} are accepted")
    return _read_array(header, key)


def _read_array(header: _Cursor, key: str) -> StringArray | npt.NDArray[Any]:
    (kind,) = header.unpack(_U32)
    if kind == GGUFValueType.STRING:
        count = header.count(_MAX_HEADER_BYTES, smallest_item=8)
        start = header.position
        header.skip_strings(count)
        return StringArray(header.path, key, header.mapped, slice(start, header.position), count)
    if kind not in _SCALARS:
        header.refuse(f"is an array of type {kind}; arrays of numbers, booleans or strings are accepted")
    layout = _SCALARS[kind]
    count = header.count(_MAX_HEADER_BYTES, smallest_item=layout.size)
    start = header.take(count * layout.size)
    dtype = np.dtype(np.uint8 if kind == GGUFValueType.BOOL else layout.format)
    values: npt.NDArray[Any] = np.frombuffer(header.mapped, dtype=dtype, count=count, offset=start)
    # Bytes other than 0 and 1 are no numpy booleans, hence the comparison in place of a view.
    return values != 0 if kind == GGUFValueType.BOOL else values


def _alignment(metadata: Mapping[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment % 8:
        raise GgufFormatError(f"{path}: general.alignment is {_shown(alignment)}; a positive multiple of 8 is accepted")
    return alignment


def _read_tensor_table(header: _Cursor, tensor_count: int, alignment: int) -> dict[str, TensorInfo]:
    """Name to `TensorInfo`, with offsets still relative to the data section."""
    tensors: dict[str, TensorInfo] = {}
    for number in range(tensor_count):
        header.subject = f"entry {number} of {tensor_count} in the tensor table"
        name = header.string(_MAX_NAME_BYTES)
        if name in tensors:
            header.refuse(f"is {_shown(name)}, which was there before")
        header.subject = f"the entry of tensor {_shown(name)}"
        (dim_count,) = header.unpack(_U32)
        if not 1 <= dim_count <= _MAX_DIMS:
            header.refuse(f"has {dim_count} dimensions; 1 to {_MAX_DIMS} are accepted")
        shape = tuple(header.unpack(_U64)[0] for _ in range(dim_count))[::-1]  # ggml counts from the fastest
        kind, offset = header.unpack(_TENSOR_TAIL)
        try:
            ggml_type = GgmlType(kind)
        except ValueError:
            raise UnsupportedTypeError(
                f"{header.path}: tensor {_shown(name)} has ggml type {kind}, which is not one of "
                f"{', '.join(known.name for known in GgmlType)}. Types of forks and types that ggml withdrew are not "
                "read; take a file quantized to one of these"
            ) from None
        nbytes = _stored_bytes(header, ggml_type, shape)
        if offset % alignment:
            header.refuse(f"has offset {offset}; a multiple of the alignment {alignment} is accepted")
        tensors[name] = TensorInfo(name, ggml_type, shape, offset, nbytes, header.path)
    return tensors


def _stored_bytes(header: _Cursor, ggml_type: GgmlType, shape: tuple[int, ...]) -> int:
    elements = prod(shape)
    block_elements, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if elements == 0:
        header.refuse(f"has shape {shape}; dimensions of at least 1 are accepted")
    if shape[-1] % block_elements:
        header.refuse(
            f"has rows of {shape[-1]} elements in {ggml_type.name}; multiples of its block of {block_elements} "
            "are accepted"
        )
    nbytes: int = elements // block_elements * block_bytes
    if nbytes > header.size:
        header.refuse(f"has shape {shape} in {ggml_type.name}, {nbytes} bytes in a file of {header.size}")
    return nbytes


def _place_tensors(entries: dict[str, TensorInfo], header: _Cursor, alignment: int) -> dict[str, TensorInfo]:
    """The entries with offsets from the start of the file, after checking that each lies in it and none on another."""
    data_start = -(-header.position // alignment) * alignment
    tensors = {
        name: TensorInfo(name, info.ggml_type, info.shape, data_start + info.offset, info.nbytes, info.path)
        for name, info in entries.items()
    }
    before: TensorInfo | None = None
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if before is not None and info.offset < before.offset + before.nbytes:
            header.subject = f"tensor {_shown(info.name)}"
            header.refuse(f"at offset {info.offset} overlaps {_shown(before.name)}, which ends at "
                          f"{before.offset + before.nbytes}")  # fmt: skip
        before = info
    # Checked in file order and after the overlaps, so that a truncated file names the first tensor it cut.
    for info in tensors.values():
        if info.offset + info.nbytes > header.size:
            raise GgufFormatError(
                f"{info.path}: tensor {_shown(info.name)} takes bytes {info.offset} to {info.offset + info.nbytes}, "
                f"but the file ends after {header.size}. It is truncated or damaged; get it again"
            )
    return tensors


def _shown(value: object) -> str:
    """``value`` for a message: quoted, control characters escaped, and short."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."

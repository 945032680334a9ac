"""One GGUF file: metadata, tensor table, and the tensor data, all read by copying.

The file is not trusted: every length, count and offset is compared with the size of the file before it is used, so a
damaged or hostile file ends in `GgufFormatError`, never in a crash, and costs no more than reading its header: about
three times its bytes. Nothing is mapped: a file that another process truncates under a mapping ends the process with
SIGBUS, whereas a read that comes back short is an error like others.
"""

from __future__ import annotations

import os
import stat
import weakref
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from transformers_kt.gguf.other_files import LOOKED_AT_BYTES, described, part_of
from transformers_kt.gguf.quantizations import unknown_type

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
# Python keeps a text with one emoji in 4 bytes a character. Texts longer than this are decoded when asked for.
_KEPT_TEXT_BYTES = 256
_FIRST_READ_BYTES = 1 << 16  # of the header; then as many again, until it ends
_CHECKED_AT_ONCE = 1 << 20

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
    the start of the file ``path``; ``nbytes`` were checked to lie within it. ``is_last`` says that no other tensor of
    the file lies after it.
    """

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path
    is_last: bool = False


class StringArray(Sequence[str]):
    """An array of strings in the metadata. Its length is known; the strings are decoded at the first look at one.

    Raises `GgufFormatError` at that look if a string is not UTF-8.
    """

    def __init__(self, key: str, header: _Cursor, start: int, count: int) -> None:
        self._key, self._header, self._start, self._count = key, header, start, count
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
            raw = self._header.raw
            read_length = _U64.unpack_from
            strings = []
            position = self._start
            try:
                for _ in range(self._count):
                    begin = position + 8
                    position = begin + read_length(raw, position)[0]
                    strings.append(raw[begin:position].decode())
            except UnicodeDecodeError as error:
                raise GgufFormatError(
                    f"{self._header.path}: string {len(strings)} of {_shown(self._key)} is not UTF-8 ({error}); "
                    "the file is damaged, get it again"
                ) from None
            self._strings = strings
        return self._strings


@dataclass(frozen=True, slots=True)
class _LongText:
    """Where in the header a string lies that is decoded when asked for. It is UTF-8."""

    start: int
    end: int

    def value(self, raw: bytes) -> str:
        return raw[self.start : self.end].decode()


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Where in the header an array of numbers or booleans lies."""

    kind: int
    start: int
    count: int

    def value(self, raw: bytes) -> npt.NDArray[Any]:
        is_bool = self.kind == GGUFValueType.BOOL
        dtype = np.dtype(np.uint8 if is_bool else _SCALARS[self.kind].format)
        values: npt.NDArray[Any] = np.frombuffer(raw, dtype=dtype, count=self.count, offset=self.start)
        # Bytes other than 0 and 1 are no numpy booleans, hence the comparison in place of a view.
        return values != 0 if is_bool else values


class Metadata(Mapping[str, Any]):
    """The key-value section, in file order.

    Values are int, float, bool, str, `StringArray`, or a read-only one-dimensional numpy array.
    """

    def __init__(self, values: dict[str, Any], header: _Cursor) -> None:
        self._values, self._header = values, header

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return value.value(self._header.raw) if isinstance(value, (_LongText, _Numbers)) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GgufFile:
    """A GGUF file of version 2 or 3, little-endian. It stays open as long as this object lives.

    Raises `CheckpointNotFoundError` if there is no such file, `GgufFormatError` if it is not GGUF, truncated or
    contradicts itself, `UnsupportedTypeError` if a tensor has a type that ggml does not define.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = _OpenFile(self.path)
        header = _Cursor(self._file)
        tensor_count, key_count = _read_preamble(header)
        self.metadata = Metadata(_read_metadata(header, key_count), header)
        alignment = _alignment(self.metadata, self.path)
        entries = _read_tensor_table(header, tensor_count, alignment)
        self.tensors: dict[str, TensorInfo] = _place_tensors(entries, header, alignment)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without header and padding."""
        return sum(info.nbytes for info in self.tensors.values())

    def data(self, name: str, start: int = 0, end: int | None = None) -> npt.NDArray[np.uint8]:
        """Bytes ``start`` to ``end`` of tensor ``name``, all of them by default: uint8, one-dimensional, read-only.

        A copy in memory of its own. Raises `GgufFormatError` where the file is shorter than it was, was written to
        since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        stored = np.empty((info.nbytes if end is None else end) - start, np.uint8)
        self._file.read_into(stored.data, info.offset + start, f"tensor {_shown(name)}")
        stored.flags.writeable = False
        return stored

    def place(self, name: str, start: int = 0) -> tuple[int, int]:
        """(file descriptor, offset) of byte ``start`` of tensor ``name``, for who reads without Python."""
        return self._file.descriptor, self.tensors[name].offset + start

    def refuse_read(self, name: str, position: int, error: OSError | EOFError) -> NoReturn:
        """Raise `GgufFormatError` for ``error``, which such a reader met at byte ``position`` of tensor ``name``."""
        info = self.tensors[name]
        subject = f"tensor {_shown(name)}"
        if isinstance(error, OSError):
            self._file.refuse_error(subject, error, info.offset + position, info.offset + info.nbytes)
        self._file.refuse_end(subject, position, info.nbytes)

    def require_unchanged(self, name: str) -> None:
        """Raise `GgufFormatError`, which says that tensor ``name`` was read, if the file was written to."""
        self._file.require_unchanged(f"tensor {_shown(name)}")


class _OpenFile:
    """A regular file. One that is replaced under its name meanwhile is read on as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A pipe without writer would keep open() waiting for ever.
            kind = path.stat().st_mode
            if stat.S_ISREG(kind):
                self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointNotFoundError(
                f"{path} is not a file that can be read ({error.strerror}); a GGUF file is expected"
            ) from None
        if stat.S_ISDIR(kind):
            raise CheckpointNotFoundError(f"{path} is not a file but a folder; a GGUF file is expected")
        if not stat.S_ISREG(kind):
            raise GgufFormatError(
                f"{path} is a pipe, a socket or a device; a regular file is expected, for tensors are not read in the "
                "order in which a stream has them. Save it to disk first"
            )
        weakref.finalize(self, os.close, self.descriptor)
        self._opened = os.fstat(self.descriptor)
        self.size = self._opened.st_size
        if self.size == 0:
            raise GgufFormatError(f"{path} is empty (0 bytes); a GGUF file is expected")

    def read_into(self, target: memoryview, offset: int, subject: str) -> None:
        """Fill ``target`` from byte ``offset`` on. ``subject`` says in errors what is read."""
        done = 0
        try:
            while done < len(target):
                count = os.preadv(self.descriptor, [target[done:]], offset + done)
                if count == 0:
                    self.refuse_end(subject, done, len(target))
                done += count
        except OSError as error:
            self.refuse_error(subject, error, offset + done, offset + len(target))
        self.require_unchanged(subject)

    def refuse_end(self, subject: str, done: int, expected: int) -> NoReturn:
        raise GgufFormatError(
            f"{self.path}: {subject} ends after {done} of {expected} bytes: the file was shortened to "
            f"{os.fstat(self.descriptor).st_size} bytes while it was read. Load it when nothing writes it"
        )

    def refuse_error(self, subject: str, error: OSError, start: int, end: int) -> NoReturn:
        raise GgufFormatError(
            f"{self.path}: {subject} cannot be read ({error.strerror}) at bytes {start} to {end}; the disk or the "
            "network may be at fault"
        ) from error

    def require_unchanged(self, subject: str) -> None:
        found = os.fstat(self.descriptor)
        if (found.st_size, found.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise GgufFormatError(
                f"{self.path} was written to while {subject} was read ({self.size} bytes before, {found.st_size} "
                "after). Load it when nothing writes it"
            )


class _Cursor:
    """A position in the header that refuses to leave it. ``raw`` grows with what was looked at."""

    __slots__ = ("_end", "_file", "path", "position", "raw", "size", "subject")

    def __init__(self, file: _OpenFile) -> None:
        self._file, self.path = file, file.path
        self.size = file.size
        self._end = min(self.size, _MAX_HEADER_BYTES)
        self.raw = b""
        self.position = 0
        self.subject = "the header"  # what is being read, for messages
        self._read_up_to(min(self._end, _FIRST_READ_BYTES))

    @property
    def remaining(self) -> int:
        return self._end - self.position

    def _read_up_to(self, position: int) -> None:
        """Have ``raw`` reach ``position``, which is no later than the end."""
        if position <= len(self.raw):
            return
        more = bytearray(min(self._end, max(position, 2 * len(self.raw))) - len(self.raw))
        self._file.read_into(memoryview(more), len(self.raw), "the header")
        self.raw += more

    def take(self, count: int) -> int:
        """Move ``count`` bytes on; the position before."""
        start = self.position
        if count > self._end - start:
            self.refuse_end(f"needs {count} bytes at offset {start}")
        self.position = start + count
        self._read_up_to(self.position)
        return start

    def unpack(self, layout: Struct) -> tuple[Any, ...]:
        start = self.take(layout.size)
        return layout.unpack_from(self.raw, start)

    def count(self, most: int, smallest_item: int) -> int:
        """A u64 count of items of at least ``smallest_item`` bytes each, refused where they cannot fit."""
        (count,) = self.unpack(_U64)
        if count > most:
            self.refuse(f"counts {count} items; at most {most} are accepted")
        if count * smallest_item > self.remaining:
            self.refuse_end(f"counts {count} items")
        return int(count)

    def name(self) -> str:
        """A key or the name of a tensor."""
        start, end = self._extent(_MAX_NAME_BYTES)
        raw = self.raw[start:end]
        if len(raw) > _KEPT_TEXT_BYTES and not raw.isascii():
            self.refuse(f"holds a name of {len(raw)} bytes that is not ASCII")
        return self._decoded(raw)

    def text(self) -> str | _LongText:
        start, end = self._extent(_MAX_HEADER_BYTES)
        if end - start <= _KEPT_TEXT_BYTES:
            return self._decoded(self.raw[start:end])
        decoder = getincrementaldecoder("utf-8")()
        try:
            for piece in range(start, end, _CHECKED_AT_ONCE):
                last = min(piece + _CHECKED_AT_ONCE, end)
                decoder.decode(self.raw[piece:last], final=last == end)
        except UnicodeDecodeError as error:
            self.refuse(f"holds a string that is not UTF-8 ({error})")
        return _LongText(start, end)

    def _extent(self, most_bytes: int) -> tuple[int, int]:
        (length,) = self.unpack(_U64)
        if length > most_bytes and length <= self.remaining:
            self.refuse(f"holds a string of {length} bytes; at most {most_bytes} are accepted")
        return self.take(length), self.position

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.refuse(f"holds a string that is not UTF-8 ({error})")

    def skip_strings(self, count: int) -> None:
        # 257,000 strings stand between the start of a large file and its tensor table: this loop is what opening
        # one costs. It needs no check per string, for each one moves the position forward and the first read past
        # what is there raises; then more is read, or the header has ended.
        position, left, read_length = self.position, count, _U64.unpack_from
        while left:
            raw, done = self.raw, 0
            try:
                for done in range(left):  # noqa: B007
                    position += 8 + read_length(raw, position)[0]
                left = 0
            except (struct_error, OverflowError):
                left -= done
                if position + 8 > self._end:
                    self.refuse_end(f"holds {count} strings")
                self._read_up_to(position + 8)
        if position > self._end:
            self.refuse_end(f"holds {count} strings")
        self._read_up_to(position)
        self.position = position

    def refuse_end(self, found: str) -> NoReturn:
        if self.size > _MAX_HEADER_BYTES:
            self.refuse(f"{found}; headers of up to {_MAX_HEADER_BYTES} bytes are accepted")
        raise GgufFormatError(
            f"{self.path}: {self.subject} {found}, but the file ends after {self.size} bytes. It is truncated or "
            f"damaged; {part_of(self.path.name) or 'get it again'}"
        )

    def refuse(self, found: str) -> NoReturn:
        raise GgufFormatError(f"{self.path}: {self.subject} {found}. The file is damaged; get it again")


def _read_preamble(header: _Cursor) -> tuple[int, int]:
    """(tensor count, key count)."""
    magic = header.raw[:4]
    if magic != _MAGIC:
        hint = part_of(header.path.name) or described(header.raw[:LOOKED_AT_BYTES])
        raise GgufFormatError(
            f"{header.path} is not a GGUF file: it starts with {_unprefixed(magic)}, {_unprefixed(_MAGIC)} is "
            f"expected; {hint}"
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
        key = header.name()
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
        return header.text()
    if kind != GGUFValueType.ARRAY:
        header.refuse(f"has type {kind}; types 0 to {max(GGUFValueType)} are accepted")
    return _read_array(header, key)


def _read_array(header: _Cursor, key: str) -> StringArray | _Numbers:
    (kind,) = header.unpack(_U32)
    if kind == GGUFValueType.STRING:
        count = header.count(_MAX_HEADER_BYTES, smallest_item=8)
        start = header.position
        header.skip_strings(count)
        return StringArray(key, header, start, count)
    if kind not in _SCALARS:
        header.refuse(f"is an array of type {kind}; arrays of numbers, booleans or strings are accepted")
    layout = _SCALARS[kind]
    count = header.count(_MAX_HEADER_BYTES, smallest_item=layout.size)
    return _Numbers(kind, header.take(count * layout.size), count)


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
        name = header.name()
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
                f"{header.path}: tensor {_shown(name)} has ggml type {unknown_type(kind, list(GgmlType))}. "
                "Take a file of another quantization, such as Q4_K_M or Q8_0"
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
    last = max((info.offset for info in entries.values()), default=0)
    tensors = {
        name: replace(info, offset=data_start + info.offset, is_last=info.offset == last)
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
                f"but the file ends after {header.size}. It is truncated or damaged; "
                + (part_of(info.path.name) or "get it again")
            )
    return tensors


def _shown(value: object) -> str:
    """``value`` for a message: quoted, control characters escaped, and short."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _unprefixed(raw: bytes) -> str:
    """``raw`` quoted, without the b of Python, which means nothing on a command line."""
    return repr(raw)[1:]

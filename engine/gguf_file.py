"""Reads GGUF files: metadata, the table of tensors, and one tensor at a time as float32.

The header is walked here, not by the `gguf` package's reader, for two reasons: that reader keeps an
array object for every string of the vocabulary (seconds), and it trusts every length it finds. Here each
length is checked against what is left of the file before anything is allocated. Dequantisation is the
`gguf` package's. Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from engine.errors import BrokenModelError, ModelNotFoundError, UnsupportedModelError

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
MAX_DIMENSIONS = 8
DEFAULT_ALIGNMENT = 32
CHUNK_ELEMENTS = 1 << 18

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as torch counts."""
    kind: gguf.GGMLQuantizationType
    start: int
    """First byte, from the start of the file."""
    num_bytes: int


class GgufFile:
    """An open GGUF file; a context manager. Tensor data stays on disk until it is asked for."""

    def __init__(self, path: Path) -> None:
        """Map the file and read its header; raises ModelError."""
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(path.open("rb"))
                header = stack.enter_context(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
            except FileNotFoundError as error:
                raise ModelNotFoundError(f"there is no file {path}") from error
            except (OSError, ValueError) as error:
                raise BrokenModelError(f"{path} cannot be read: {error}") from error
            self._size = len(header)
            self._read_header(_Cursor(header, path))
            header.close()
            stack.pop_all()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, tensor: GgufTensor) -> Iterator[npt.NDArray[np.float32]]:
        """The tensor's rows dequantised, in order, about a megabyte at a time: arrays [some rows, row length].

        A row runs along the last dimension. Raises UnsupportedModelError for a type that cannot be dequantised.
        """
        row_length = tensor.shape[-1]
        num_rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.num_bytes // num_rows
        step = max(1, CHUNK_ELEMENTS // row_length)
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            self._file.seek(tensor.start + first * row_bytes)
            raw = self._file.read(count * row_bytes)
            if len(raw) < count * row_bytes:
                raise BrokenModelError(f"{self.path} was cut short while it was read; fetch it again")
            try:  # as one long row: the package loops over rows in Python
                values = gguf.dequantize(np.frombuffer(raw, dtype=np.uint8).reshape(1, -1), tensor.kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{self.path.name}: tensor {tensor.name} has type {tensor.kind.name}, which cannot be dequantised; "
                    "use a file quantised to F16, Q8_0, Q4_K or the like"
                ) from error
            yield values.reshape(count, row_length)

    def _read_header(self, cursor: _Cursor) -> None:
        if cursor.take(4) != MAGIC:
            raise BrokenModelError(f"{self.path} is not a GGUF file: it does not begin with {MAGIC!r}")
        version = cursor.scalar(_U32)
        if version not in SUPPORTED_VERSIONS:
            hint = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            raise UnsupportedModelError(f"{self.path} is GGUF version {version}{hint}; supported: {SUPPORTED_VERSIONS}")
        num_tensors, num_keys = cursor.scalar(_U64), cursor.scalar(_U64)
        cursor.check_count(num_keys, 12, "metadata keys")
        for _ in range(num_keys):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar(_U32))
        cursor.check_count(num_tensors, 24, "tensors")
        entries = [cursor.tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise BrokenModelError(f"{self.path}: general.alignment is {alignment!r}, expected a positive integer")
        data_start = -(-cursor.position // alignment) * alignment
        for name, shape, kind, offset in entries:
            if name in self.tensors:
                raise BrokenModelError(f"{self.path}: two tensors are called {name!r}")
            self.tensors[name] = self._place(name, shape, kind, data_start + offset)

    def _place(self, name: str, shape: tuple[int, ...], kind_id: int, start: int) -> GgufTensor:
        try:
            kind = gguf.GGMLQuantizationType(kind_id)
            block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise UnsupportedModelError(f"{self.path}: tensor {name!r} has the unknown type {kind_id}") from error
        if not shape or 0 in shape or shape[-1] % block_elements:
            raise BrokenModelError(f"{self.path}: tensor {name!r} of type {kind.name} has the impossible shape {shape}")
        num_bytes = math.prod(shape) // block_elements * block_bytes
        if start + num_bytes > self._size:
            raise BrokenModelError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {start + num_bytes}, "
                f"the file has {self._size}; fetch it again"
            )
        return GgufTensor(name, shape, kind, start, num_bytes)


class _Cursor:
    """Reads a header from front to back and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.position = 0
        self._data = data
        self._size = len(data)
        self._path = path

    def _truncated(self) -> BrokenModelError:
        return BrokenModelError(
            f"{self._path} is broken or truncated: its header runs past the end of the file ({self._size} bytes); "
            "fetch it again"
        )

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.position + count
        if end > self._size:
            raise self._truncated()
        piece = self._data[self.position : end]
        self.position = end
        return piece

    def scalar(self, kind: struct.Struct) -> Any:
        """One number of fixed size."""
        end = self.position + kind.size
        if end > self._size:
            raise self._truncated()
        (value,) = kind.unpack_from(self._data, self.position)
        self.position = end
        return value

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count that what is left of the file cannot hold."""
        if count * least_bytes > self._size - self.position:
            raise BrokenModelError(
                f"{self._path} is broken or truncated: its header announces {count} {what}, more than the file can "
                "hold; fetch it again"
            )

    def string(self) -> str:
        """A length, then that many bytes of UTF-8."""
        length = self.scalar(_U64)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BrokenModelError(f"{self._path} is broken: its header has a string that is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """One metadata value: a scalar, a string, or a list of either."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element_kind, count = self.scalar(_U32), self.scalar(_U64)
            if element_kind == _STRING:
                self.check_count(count, 8, "strings")
                return [self.string() for _ in range(count)]
            element = self._struct(element_kind)
            self.check_count(count, element.size, "array elements")
            return [value for (value,) in element.iter_unpack(self.take(count * element.size))]
        return self.scalar(self._struct(kind))

    def _struct(self, kind: int) -> struct.Struct:
        try:
            return _SCALARS[kind]
        except KeyError:
            raise BrokenModelError(f"{self._path} is broken: its header has a value of unknown type {kind}") from None

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (slowest dimension first), type, and offset from the start of the data."""
        name = self.string()
        num_dimensions = self.scalar(_U32)
        if num_dimensions > MAX_DIMENSIONS:
            raise BrokenModelError(f"{self._path} is broken: tensor {name!r} has {num_dimensions} dimensions")
        dimensions = [self.scalar(_U64) for _ in range(num_dimensions)]
        return name, tuple(reversed(dimensions)), self.scalar(_U32), self.scalar(_U64)

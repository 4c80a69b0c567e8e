"""The header of a GGUF file: metadata, and where each tensor lies.

Format: ggml-org/ggml docs/gguf.md, versions 2 and 3, little-endian. Everything in the file is taken as untrusted:
counts and lengths are compared with what the file can hold before anything of that size is made.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_vllm_server import _engine
from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.stored_tensor import BLOCKS, StoredTensor, check_extents

if TYPE_CHECKING:
    from pathlib import Path

# Bounds that no real file comes near, so that a damaged one costs neither minutes nor gigabytes.
_MAX_HEADER_BYTES = 1 << 28
_MAX_ELEMENTS = 1 << 22  # of all metadata arrays together; the largest vocabularies have half a million merges
_MAX_ARRAY_DEPTH = 4
_MAX_DIMS = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Metadata value type → struct code.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}

# ggml tensor type → name. Those without an entry in BLOCKS are known but not supported.
_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself.

    Attributes:
        path: The file.
        metadata: Key → int, float, bool, str or (nested) list of these.
        tensors: Name → where it lies; shapes are (rows, cols), GGUF's dimensions reversed.
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: The file is not GGUF, or is truncated, corrupt or contradicts itself.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too few for a GGUF header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(str(path), data).read()


class _Reader:
    """A position in the header, and what may still be read from there."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._position = 0
        self._end = min(len(data), _MAX_HEADER_BYTES)
        self._elements_left = _MAX_ELEMENTS

    def read(self) -> GgufFile:
        if self._data[:4] != b"GGUF":
            raise self._error("magic", "expected b'GGUF'", repr(bytes(self._data[:4])))
        self._position = 4
        version = self._scalar(4, "version")
        if version not in (2, 3):
            raise self._error("version", "expected 2 or 3, little-endian", version)
        num_tensors = self._count("tensor count", 24)
        num_fields = self._count("metadata count", 13)
        metadata: dict[str, Any] = {}
        for index in range(num_fields):
            key = self._string(f"key {index}")
            if key in metadata:
                raise self._error(f"key {index}", "expected a new key", f"{key!r} again")
            metadata[key] = self._value(self._scalar(4, key), key, 0)
        return GgufFile(self._path, metadata, self._tensors(num_tensors, metadata))

    def _tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, StoredTensor]:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._error("general.alignment", "expected a power of two", repr(alignment))
        tensors: dict[str, StoredTensor] = {}
        for index in range(count):
            tensor = self._tensor(index, alignment)
            if tensor.name in tensors:
                raise self._error(f"tensor {index}", "expected a new name", f"{tensor.name!r} again")
            tensors[tensor.name] = tensor
        start = -(-self._position // alignment) * alignment
        placed = {name: _moved(tensor, start) for name, tensor in tensors.items()}
        if problem := check_extents(list(placed.values()), start, len(self._data)):
            raise CheckpointError(f"{self._path}: {problem}")
        return placed

    def _tensor(self, index: int, alignment: int) -> StoredTensor:
        name = self._string(f"name of tensor {index}")
        num_dims = self._scalar(4, f"tensor {name!r}, dimensions")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._error(f"tensor {name!r}, dimensions", f"expected 1 to {_MAX_DIMS}", num_dims)
        shape = tuple(self._scalar(10, f"tensor {name!r}, shape") for _ in range(num_dims))[::-1]
        size, format_name = self._tensor_size(name, shape, self._scalar(4, f"tensor {name!r}, type"))
        offset = self._scalar(10, f"tensor {name!r}, offset")
        if offset % alignment:
            raise self._error(f"tensor {name!r}, offset", f"expected a multiple of {alignment}", offset)
        return StoredTensor(name, format_name, shape, self._path, offset, size)

    def _tensor_size(self, name: str, shape: tuple[int, ...], type_id: int) -> tuple[int, str]:
        format_name = _TENSOR_TYPES.get(type_id, f"number {type_id}")
        if format_name not in BLOCKS:
            raise self._error(f"tensor {name!r}, type", f"expected one of {', '.join(BLOCKS)}", format_name)
        block, block_bytes = BLOCKS[format_name]
        numbers = 1
        for dim in shape:
            numbers *= dim
        if numbers == 0 or numbers > len(self._data) * 2:  # the densest format packs less than two numbers a byte
            raise self._error(f"tensor {name!r}, shape", "expected one that fits in the file", list(shape))
        if shape[-1] % block:
            raise self._error(f"tensor {name!r}, columns", f"expected a multiple of {block}", shape[-1])
        return numbers // block * block_bytes, format_name

    def _value(self, type_id: int, name: str, depth: int) -> Any:
        if type_id == _STRING:
            return self._string(name)
        if type_id == _ARRAY:
            return self._array(name, depth + 1)
        if type_id not in _SCALARS:
            raise self._error(name, "expected a value type from 0 to 12", type_id)
        value = self._scalar(type_id, name)
        return bool(value) if type_id == _BOOL else value

    def _array(self, name: str, depth: int) -> list[Any]:
        if depth > _MAX_ARRAY_DEPTH:
            raise self._error(name, f"expected arrays at most {_MAX_ARRAY_DEPTH} deep", "a deeper one")
        type_id = self._scalar(4, name)
        code = _SCALARS.get(type_id)
        count = self._count(f"{name}, length", struct.calcsize(code) if code else 8)
        self._elements_left -= count
        if self._elements_left < 0:
            raise self._error(f"{name}, length", f"expected at most {_MAX_ELEMENTS} elements in all arrays", count)
        if type_id == _STRING:
            return self._strings(name, count)
        if code is None:
            return [self._value(type_id, name, depth) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{code}", self._data, self._position)
        self._position += struct.calcsize(f"<{count}{code}")
        return [v != 0 for v in values] if type_id == _BOOL else list(values)

    def _strings(self, name: str, count: int) -> list[str]:
        try:
            strings, self._position = _engine.read_strings(self._data, self._position, self._end, count)
        except UnicodeDecodeError as error:
            raise self._error(name, "expected UTF-8", repr(error.object[:40])) from None
        if self._position > self._end:
            raise self._past_end(name, self._position)
        return strings

    def _string(self, name: str) -> str:
        return self._strings(name, 1)[0]

    def _scalar(self, type_id: int, name: str) -> Any:
        code = _SCALARS[type_id]
        end = self._position + struct.calcsize(code)
        if end > self._end:
            raise self._past_end(name, end)
        (value,) = struct.unpack_from(f"<{code}", self._data, self._position)
        self._position = end
        return value

    def _count(self, name: str, element_bytes: int) -> int:
        count: int = self._scalar(10, name)
        room = (self._end - self._position) // element_bytes
        if count > room:
            raise self._error(name, f"expected at most {room}, for which the file has room", count)
        return count

    def _past_end(self, name: str, position: int) -> CheckpointError:
        return self._error(name, f"expected it to end by byte {self._end}", f"byte {position}")

    def _error(self, field: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self._path}: {field}: {expected}, found {found}")


def _moved(tensor: StoredTensor, start: int) -> StoredTensor:
    offset = start + tensor.offset
    return StoredTensor(tensor.name, tensor.format, tensor.shape, tensor.file, offset, tensor.size)

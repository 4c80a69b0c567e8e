"""The headers of safetensors files, one file or the shards of an index.

Format: huggingface/safetensors README: eight bytes of header length, a JSON object, then the data. Everything is taken
as untrusted.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import msgspec

from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.stored_tensor import StoredTensor, check_extents

if TYPE_CHECKING:
    from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 8

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, by name: those of the index's shards, or of its one safetensors file.

    Raises:
        CheckpointError: No safetensors there, or a file is damaged, or the index names what is not there.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _read_shards(index)
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(_no_weights(folder, len(files)))
    return read_safetensors_file(files[0])


def read_safetensors_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file, by name.

    Raises:
        CheckpointError: The file is truncated, corrupt or contradicts itself.
    """
    header, start, size = _read_header(path)
    tensors = {}
    for name, raw in header.items():
        if name != "__metadata__":
            tensors[name] = _tensor(path, name, raw, start)
    if problem := check_extents(list(tensors.values()), start, size):
        raise CheckpointError(f"{path}: {problem}")
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        room = min(size - 8, _MAX_HEADER_BYTES)
        if length > room:
            raise CheckpointError(f"{path}: header length: expected at most {room}, found {length}")
        raw = file.read(length)
    try:
        header = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: header: expected a JSON object, found {error}") from None
    return header, 8 + length, size


def _tensor(path: Path, name: str, raw: object, start: int) -> StoredTensor:
    try:
        entry = msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: tensor {name!r}: {error}") from None
    if entry.dtype not in _DTYPE_BYTES:
        raise CheckpointError(f"{path}: tensor {name!r}: dtype {entry.dtype!r} is not known")
    if len(entry.shape) > _MAX_DIMS or not all(0 <= dim < 1 << 48 for dim in entry.shape):
        raise CheckpointError(f"{path}: tensor {name!r}: shape {entry.shape} is not possible")
    begin, end = entry.data_offsets
    expected = math.prod(entry.shape) * _DTYPE_BYTES[entry.dtype]
    if begin < 0 or end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {entry.dtype} {entry.shape} needs {expected} bytes, "
            f"found data_offsets {list(entry.data_offsets)}"
        )
    return StoredTensor(name, entry.dtype, tuple(entry.shape), str(path), start + begin, expected)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{index}: {error}") from None
    shards = {}
    for file in sorted(set(weight_map.values())):
        path = index.parent / file
        if file != path.name or not path.is_file():  # a shard lies beside its index, nowhere else
            raise CheckpointError(f"{index}: names the shard {file!r}, which is not in {index.parent}")
        shards[file] = read_safetensors_file(path)
    tensors = {}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(f"{index}: places tensor {name!r} in {file}, which does not have it")
        tensors[name] = shards[file][name]
    return tensors


def _no_weights(folder: Path, found: int) -> str:
    if found > 1:
        return f"{folder}: {found} safetensors files and no {INDEX_NAME} that says which tensor is in which"
    looked_for = f"model.safetensors, {INDEX_NAME} or one other *.safetensors file"
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder}: has only pytorch_model.bin weights, which run code when they are read; looked for {looked_for}."
            " Save it again with transformers' save_pretrained(), which writes safetensors."
        )
    return f"{folder}: no weights; looked for {looked_for}"

from __future__ import annotations

import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from langchain_vllm_server import _engine
from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.gguf_file import read_gguf
from tests.server.checkpoint_fixtures import (
    ARRAY,
    BOOL,
    INT32,
    SMOLLM2,
    STRING,
    UINT32,
    UINT64,
    array,
    field,
    gguf,
    tensor,
    text,
)

if TYPE_CHECKING:
    from pathlib import Path

u32 = struct.Struct("<I").pack
F32, Q4_0 = 0, 2


def read(path: Path, content: bytes) -> Any:
    file = path / "model.gguf"
    file.write_bytes(content)
    return read_gguf(file)


def test_smollm2_reads_as_the_gguf_package_reads_it() -> None:
    ours, theirs = read_gguf(SMOLLM2), reference.GGUFReader(SMOLLM2)
    fields = {name: f.contents() for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert len(ours.tensors) == len(theirs.tensors) == 272
    for expected in theirs.tensors:
        found = ours.tensors[expected.name]
        assert found.shape == tuple(int(n) for n in reversed(expected.shape))
        assert found.format == expected.tensor_type.name
        assert (found.offset, found.size) == (int(expected.data_offset), int(expected.n_bytes))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with every type of value, written by the `gguf` package."""
    file = tmp_path / "all.gguf"
    writer = reference.GGUFWriter(file, "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        signed = not name.startswith("u")
        getattr(writer, f"add_{name}")(f"test.{name}", -7 if signed else 7)
    writer.add_float32("test.float32", 0.5)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "héllo 日本")
    writer.add_array("test.strings", ["a", "", "日本"])
    writer.add_array("test.ints", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -2.0])
    writer.add_array("test.bools", [True, False])
    writer.add_array("test.nested", [[1, 2], [3]])
    writer.add_tensor("matrix", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("vector", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_every_type_of_value(written: Path) -> None:
    found = read_gguf(written)
    assert {k.removeprefix("test."): v for k, v in found.metadata.items() if k.startswith("test.")} == {
        **dict.fromkeys(("uint8", "uint16", "uint32", "uint64"), 7),
        **dict.fromkeys(("int8", "int16", "int32", "int64"), -7),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "héllo 日本",
        "strings": ["a", "", "日本"],
        "ints": [1, -2, 3],
        "floats": [0.5, -2.0],
        "bools": [True, False],
        "nested": [[1, 2], [3]],
    }
    matrix = found.tensors["matrix"]
    assert (matrix.shape, matrix.format) == ((3, 4), "F32")
    raw = written.read_bytes()[matrix.offset : matrix.offset + matrix.size]
    assert np.frombuffer(raw, np.float32).tolist() == list(range(12))


def test_version_2_is_read_like_3(written: Path, tmp_path: Path) -> None:
    raw = bytearray(written.read_bytes())
    raw[4] = 2
    assert read(tmp_path, bytes(raw)).metadata == read_gguf(written).metadata


def test_truncation_anywhere_is_an_error(written: Path, tmp_path: Path) -> None:
    raw = written.read_bytes()
    end = max(t.offset + t.size for t in read_gguf(written).tensors.values())
    for length in range(end):
        with pytest.raises(CheckpointError):
            read(tmp_path, raw[:length])


def nested(depth: int) -> bytes:
    return array(ARRAY, [nested(depth - 1)]) if depth else array(UINT32, [u32(1)])


LIES = {
    "empty": (b"", "too few"),
    "not GGUF": (gguf(magic=b"GGML"), "magic: expected b'GGUF', found b'GGML'"),
    "version 1": (gguf(version=1), "version: expected 2 or 3"),
    "big-endian": (gguf(version=3 << 24), "version"),
    "tensor count": (gguf(num_tensors=1 << 63), f"tensor count: .*found {1 << 63}"),
    "metadata count": (gguf(num_fields=1 << 40), "metadata count"),
    "key length": (gguf([struct.pack("<Q", 1 << 62)], data=bytes(64)), "key 0"),
    "string length": (gguf([field("a", STRING, struct.pack("<Q", (1 << 64) - 1))]), "a: expected it to end"),
    "key not UTF-8": (gguf([field(b"\xff\xfe", UINT32, u32(1))]), "UTF-8"),
    "value type": (gguf([field("a", 13, u32(1))]), "a: expected a value type from 0 to 12, found 13"),
    "element type": (gguf([field("a", ARRAY, array(99, [u32(1)]))]), "value type.*found 99"),
    "array length": (gguf([field("a", ARRAY, array(UINT32, [u32(1)], count=1 << 61))]), "a, length: expected at most"),
    "array depth": (gguf([field("a", ARRAY, nested(20))]), "a: expected arrays at most 4 deep"),
    "key twice": (gguf([field("a", UINT32, u32(1))] * 2), "'a' again"),
    "tensor twice": (gguf(tensors=[tensor("a", [8], F32, 0)] * 2, data=bytes(64)), "'a' again"),
    "no dimensions": (gguf(tensors=[tensor("a", [], F32, 0)], data=bytes(64)), "'a', dimensions.*found 0"),
    "many dimensions": (gguf(tensors=[tensor("a", [1] * 9, F32, 0)]), "'a', dimensions.*found 9"),
    "huge shape": (gguf(tensors=[tensor("a", [1 << 40, 1 << 40], F32, 0)]), "'a', shape"),
    "empty shape": (gguf(tensors=[tensor("a", [0, 1 << 60], F32, 0)]), "'a', shape"),
    "tensor type": (gguf(tensors=[tensor("a", [8], 77, 0)], data=bytes(64)), "'a', type: .*found number 77"),
    "old tensor type": (gguf(tensors=[tensor("a", [256], 10, 0)], data=bytes(256)), "found Q2_K"),
    "half a block": (gguf(tensors=[tensor("a", [40], Q4_0, 0)], data=bytes(64)), "'a', columns: .*multiple of 32"),
    "unaligned": (gguf(tensors=[tensor("a", [8], F32, 4)], data=bytes(64)), "'a', offset: .*multiple of 32, found 4"),
    "past the end": (gguf(tensors=[tensor("a", [8], F32, 64)], data=bytes(64)), "'a' ends at byte"),
    "far past the end": (gguf(tensors=[tensor("a", [8], F32, 1 << 60)], data=bytes(64)), "'a' ends at byte"),
    "one byte short": (gguf(tensors=[tensor("a", [8], F32, 0)], data=bytes(31)), "'a' ends at byte"),
    "overlap": (
        gguf(tensors=[tensor("a", [16], F32, 0), tensor("b", [16], F32, 32)], data=bytes(96)),
        "'b' at byte .* overlaps tensor 'a'",
    ),
    "alignment 0": (gguf([field("general.alignment", UINT32, u32(0))]), "general.alignment"),
    "alignment 48": (gguf([field("general.alignment", UINT32, u32(48))]), "power of two, found 48"),
    "alignment text": (gguf([field("general.alignment", STRING, text("x"))]), "power of two, found 'x'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_named(lie: str, tmp_path: Path) -> None:
    content, message = LIES[lie]
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path, content)
    assert str(tmp_path / "model.gguf") in str(error.value)


RUN = text("one") + text("zwölf")


@pytest.mark.parametrize(
    ("run", "begin", "end", "count", "found"),
    [
        (RUN, 0, len(RUN), 2, (["one", "zwölf"], len(RUN))),
        (RUN, 11, len(RUN), 1, (["zwölf"], len(RUN))),
        (RUN, 0, len(RUN), 0, ([], 0)),
        (RUN, 0, len(RUN), 3, (["one", "zwölf"], len(RUN) + 8)),
        (RUN, 0, len(RUN) - 1, 2, (["one"], len(RUN))),
        (RUN, 0, 18, 2, (["one"], 19)),
        (text("one") + bytes([255] * 8), 0, 19, 2, (["one"], 2**64 - 1)),
    ],
    ids=["all", "some", "none", "too many", "one too long", "no room for a length", "one endless"],
)
def test_where_strings_end(run: bytes, begin: int, end: int, count: int, found: object) -> None:
    assert _engine.read_strings(run, begin, end, count) == found


@pytest.mark.parametrize(("begin", "end"), [(2, 1), (0, len(RUN) + 1)])
def test_strings_lie_in_the_data(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match="must lie in the data"):
        _engine.read_strings(RUN, begin, end, 1)


def test_other_alignments_place_the_data(tmp_path: Path) -> None:
    content = gguf([field("general.alignment", UINT32, u32(256))], [tensor("a", [8], F32, 0)])
    assert read(tmp_path, content.ljust(256, b"\0") + bytes(32)).tensors["a"].offset == 256


def test_an_array_that_the_file_holds_but_nobody_needs_is_not_made(tmp_path: Path) -> None:
    bomb = gguf([field("a", ARRAY, array(BOOL, [bytes(8 << 20)], count=8 << 20))])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="elements in all arrays"):
            read(tmp_path, bomb)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


SMALL = gguf(
    [
        field("general.architecture", STRING, text("llama")),
        field("a.number", UINT64, struct.pack("<Q", 5)),
        field("a.strings", ARRAY, array(STRING, [text("one"), text("two")])),
        field("a.numbers", ARRAY, array(INT32, [u32(n) for n in range(9)])),
        field("a.nested", ARRAY, nested(2)),
    ],
    [tensor("x", [32, 2], Q4_0, 0), tensor("y", [8], F32, 64)],
    bytes(96),
)


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@example([(8 + 7, 255)])
@settings(max_examples=400, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_an_error_or_harmless(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    raw = bytearray(SMALL)
    for position, byte in damage:
        raw[position] = byte
    try:
        found = read(tmp_path, bytes(raw))
    except CheckpointError:
        return
    assert all(t.offset + t.size <= len(raw) for t in found.tensors.values())

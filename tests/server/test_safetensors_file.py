from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.safetensors_file import read_safetensors, read_safetensors_file

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    return {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.float16), "c": np.array(7)}


def test_reads_what_the_safetensors_package_wrote(arrays: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert found.keys() == arrays.keys()
    for name, expected in arrays.items():
        stored = found[name]
        assert stored.shape == expected.shape
        assert raw[stored.offset : stored.offset + stored.size] == expected.tobytes()
    assert (found["a"].format, found["b"].format, found["c"].format) == ("F32", "F16", "I64")


def test_shards(arrays: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    save_file({"a": arrays["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": arrays["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 58}, "weight_map": weight_map}))
    assert {n: t.file for n, t in read_safetensors(tmp_path).items()} == {
        n: str(tmp_path / f) for n, f in weight_map.items()
    }
    for wrong, message in (
        ({**weight_map, "z": weight_map["a"]}, "places tensor 'z' in .* which does not have it"),
        ({**weight_map, "b": "model-00003.safetensors"}, "names the shard 'model-00003.safetensors'"),
        ({**weight_map, "b": "../model.safetensors"}, "names the shard '../model.safetensors'"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match=message):
            read_safetensors(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_safetensors(tmp_path)


def test_no_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights; looked for model\.safetensors"):
        read_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*save_pretrained"):
        read_safetensors(tmp_path)


def test_several_files_need_an_index(arrays: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    save_file(arrays, tmp_path / "weights.safetensors")
    assert read_safetensors(tmp_path).keys() == arrays.keys()
    save_file(arrays, tmp_path / "weights2.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files and no"):
        read_safetensors(tmp_path)


GOOD = {"a": entry([4], 0, 16), "b": entry([2, 2], 16, 32)}
LIES: dict[str, tuple[Any, int | None, str]] = {
    "header length": (GOOD, 1 << 62, "header length: expected at most"),
    "longer header": (GOOD, 1000, "header length"),
    "not JSON": (b"{]", None, "expected a JSON object"),
    "not UTF-8": (b'{"\xff": 1}', None, "expected a JSON object"),
    "not an object": (b"[1]", None, "expected a JSON object"),
    "deep": (b"[" * 100_000, None, "expected a JSON object"),
    "entry": ({"a": 5}, None, "'a': Expected `object`"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, None, "'a': .*missing required field `dtype`"),
    "dtype": ({"a": entry([4], 0, 16, "F33")}, None, "dtype 'F33' is not known"),
    "shape text": ({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}, None, "'a'"),
    "negative shape": ({"a": entry([-4], 0, 16)}, None, r"shape \[-4\] is not possible"),
    "huge shape": ({"a": entry([1 << 50], 0, 16)}, None, "is not possible"),
    "size": ({"a": entry([5], 0, 16)}, None, "needs 20 bytes"),
    "backwards": ({"a": entry([4], 16, 0)}, None, "needs 16 bytes"),
    "negative offset": ({"a": entry([4], -16, 0)}, None, "needs 16 bytes"),
    "past the end": ({"a": entry([4], 32, 48)}, None, "'a' ends at byte .* past the end"),
    "overlap": ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, None, "'b' at byte .* overlaps tensor 'a'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_named(lie: str, tmp_path: Path) -> None:
    header, length, message = LIES[lie]
    file = write(tmp_path, header, bytes(32), length)
    with pytest.raises(CheckpointError, match=message) as error:
        read_safetensors_file(file)
    assert str(file) in str(error.value)


def test_truncation_anywhere_is_an_error(tmp_path: Path) -> None:
    raw = write(tmp_path, GOOD, bytes(32)).read_bytes()
    for length in range(len(raw)):
        (tmp_path / "model.safetensors").write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read_safetensors(tmp_path)


@given(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_an_error_or_harmless(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    raw = bytearray(write(tmp_path, GOOD, bytes(32)).read_bytes())
    for position, byte in damage:
        raw[position % len(raw)] = byte
    (tmp_path / "model.safetensors").write_bytes(raw)
    try:
        found = read_safetensors(tmp_path)
    except CheckpointError:
        return
    assert all(t.offset + t.size <= len(raw) for t in found.values())

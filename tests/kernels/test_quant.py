"""The scalar definition of every storage format is that of the `gguf` package, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import BLOCKS, FORMATS, PLAIN, SCALES, floats, random_bytes, same_bits, unaligned

if TYPE_CHECKING:
    from numpy.typing import NDArray


@pytest.mark.parametrize("name", FORMATS)
def test_block_sizes(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == BLOCKS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_random_bytes(name: str) -> None:
    data = random_bytes(np.random.default_rng(1), name, 200, 1024)
    assert same_bits(_kernels_test.dequantize(name, data.ravel(), 1024), floats(name, data))


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("special", [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7E01])
def test_special_scales(name: str, special: int) -> None:
    for at in SCALES[name]:
        data = random_bytes(np.random.default_rng(special), name, 40, 512)
        data.reshape(-1, BLOCKS[name][1])[:, at : at + 2] = np.array([special], np.uint16).view(np.uint8)
        assert same_bits(_kernels_test.dequantize(name, data.ravel(), 512), floats(name, data))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_need_no_alignment(name: str) -> None:
    data = random_bytes(np.random.default_rng(2), name, 5, 256)
    assert same_bits(_kernels_test.dequantize(name, unaligned(data), 256), floats(name, data))


def test_every_half() -> None:
    halves = np.arange(65536, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)[None]
    assert same_bits(_kernels_test.dequantize("F16", halves.view(np.uint8), 65536), expected)


def interesting_floats() -> NDArray[np.float32]:
    """Every half, the points midway between two halves and their neighbours, and random bits."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    with np.errstate(over="ignore"):
        above = np.nextafter(halves.astype(np.float16), np.float16(np.inf)).astype(np.float32)
    midway = np.where(np.isfinite(above), (halves + above) / 2, halves)
    around = [np.nextafter(midway, np.float32(side)) for side in (-np.inf, np.inf)]
    bits = np.random.default_rng(3).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    edges = np.array([65519.996, 65520, 65536, np.inf, -np.inf, np.nan, 2.0**-25, 2.0**-24, 3e-45], np.float32)
    return np.concatenate([halves, midway, *around, bits, edges])


def test_floats_to_halves() -> None:
    values = interesting_floats()
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        expected = values.astype(np.float16)
    got = _kernels_test.quantize("F16", values).view(np.float16)
    assert same_bits(got.astype(np.float32), expected.astype(np.float32))


def test_floats_to_bfloat16() -> None:
    values = interesting_floats()
    expected = gguf.quantize(values[None], gguf.GGMLQuantizationType.BF16)[0].view(np.uint16)
    assert np.array_equal(_kernels_test.quantize("BF16", values).view(np.uint16), expected)


def test_floats_to_floats() -> None:
    values = interesting_floats()
    assert np.array_equal(_kernels_test.quantize("F32", values).view(np.uint32), values.view(np.uint32))


def test_floats_to_bytes_by_channel() -> None:
    """The largest magnitude becomes 127; a row is its scale and its bytes."""
    rng = np.random.default_rng(4)
    for row in [
        *rng.normal(size=(20, 96)).astype(np.float32),
        np.zeros(96, np.float32),
        np.full(96, 1e-38, np.float32),
    ]:
        data = _kernels_test.quantize("INT8", row)
        scale, q = data[:4].view(np.float32)[0], data[4:].view(np.int8)
        assert scale == np.abs(row).max() / np.float32(127)
        assert np.all(np.abs(q.astype(np.float64) * scale - row) <= max(scale * 0.5000001, 2.0**-100))
        assert np.array_equal(_kernels_test.dequantize("INT8", data, 96)[0], scale * q.astype(np.float32))


def test_floats_to_four_bits_are_never_worse_than_by_their_range() -> None:
    rng = np.random.default_rng(5)
    rows = np.concatenate([rng.normal(size=(50, 64)), rng.standard_t(2, size=(50, 64)), np.zeros((1, 64))])
    rows = np.concatenate([rows, np.full((1, 64), 3.5)]).astype(np.float32)
    reference = gguf.quantize(rows, gguf.GGMLQuantizationType.Q4_1)
    ours = np.stack([_kernels_test.quantize("Q4_1", row) for row in rows])

    def errors(data: NDArray[np.uint8]) -> NDArray[np.float64]:
        back = gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_1).astype(np.float64)
        result: NDArray[np.float64] = ((back - rows) ** 2).reshape(-1, 32).sum(axis=1)
        return result

    assert np.all(errors(ours) <= errors(reference) * (1 + 1e-5) + 1e-12)
    assert errors(ours).sum() < 0.95 * errors(reference).sum()


@pytest.mark.parametrize("name", ["INT8", "Q4_1"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_not_rounded_to_one(name: str, broken: float) -> None:
    row = np.ones(64, np.float32)
    row[5] = broken
    back = _kernels_test.dequantize(name, _kernels_test.quantize(name, row), 64)
    assert not np.isfinite(back[0, 5])


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in {*PLAIN, "Q4_1"}])
def test_what_cannot_be_done_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="nothing is quantised to this format"):
        _kernels_test.quantize(name, np.zeros(256, np.float32))
    with pytest.raises(RuntimeError, match="multiple of the block size"):
        _kernels_test.dequantize(name, np.zeros(256, np.uint8), 33)

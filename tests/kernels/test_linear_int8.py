"""linear() in integers, on every instruction set and quantised format.

The reference rounds the activations in numpy as the engine must, and multiplies in float64.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import BLOCKS, DEVICES, FORMATS, ISAS, PLAIN, SCALES, few, floats, random_rows, same_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUANTISED = [name for name in FORMATS if name not in PLAIN]
FUSED = [isa for isa in ISAS if isa != "scalar"]  # with fused multiply-add
ROWS = [1, 15, 16, 17, 63, 130]
NUM_TOKENS = [1, 2, 5, 11, 12, 13, 24, 25, 41]

every_isa = pytest.mark.parametrize("isa", DEVICES)
every_format = pytest.mark.parametrize("name", QUANTISED)


def columns(name: str) -> list[int]:
    return [256, 512, 768] if name.endswith("_K") else [32, 64, 288, 576]


def pack(isa: str, name: str, data: NDArray[np.uint8], *, threads: int = 1, bias: object = ()) -> Any:
    block_size, block_bytes = BLOCKS[name]
    source = (name, data.shape[0], data.shape[1] // block_bytes * block_size, data.ravel())
    return _kernels_test.Linear(isa, threads, [source], list(bias), exact=False)


def activations(rng: np.random.Generator, n: int, cols: int) -> NDArray[np.float32]:
    return rng.normal(size=(n, cols)).astype(np.float32)


def quantised(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What is left of x: per 32 columns, bytes to nearest even and their scale, in the same f32 arithmetic."""
    groups = x.reshape(len(x), -1, 32)
    most = np.abs(groups).max(axis=2, keepdims=True)
    large = most > 2.0**-100
    inverse = np.where(large, np.float32(127) / np.where(large, most, np.float32(1)), np.float32(0))
    q = np.rint(groups * inverse)
    scale = most * np.float32(1 / np.float32(127))
    return (q.astype(np.float64) * scale).reshape(x.shape)


def magnitudes(name: str, data: NDArray[np.uint8]) -> NDArray[np.float64]:
    """|scale · (q - zero)| + |offset| of every weight, the terms that cancel in w = scale · (q - zero) + offset."""
    blocks = data.reshape(-1, BLOCKS[name][1]).copy()
    for at in SCALES[name]:
        blocks[:, at + 1] &= 0x7F
    if name in ("Q4_K", "Q5_K"):
        blocks[:, 3] |= 0x80  # the offset is -dmin · min
    return np.abs(floats(name, blocks.reshape(data.shape)).astype(np.float64))


def assert_close(
    y: NDArray[np.float32],
    x: NDArray[np.float32],
    name: str,
    data: NDArray[np.uint8],
    bias: NDArray[np.float32] | float = 0.0,
) -> None:
    """Within the bound of the groups' sum.

    Integer sums are exact. A group's sum is multiplied by two scales and an offset by one rounded number, and each
    takes part in at most 2 additions per group of 32 and one for the bias; the reference weights are rounded twice.
    So gamma(m) = m u / (1 - m u), u = 2^-24, with m = 2 groups + 8 (Higham, Accuracy and Stability, section 3.1).
    """
    x64 = quantised(x)
    m = (2 * x.shape[1] // 32 + 8) * 2.0**-24
    bound = m / (1 - m) * (np.abs(x64) @ magnitudes(name, data).T + np.abs(bias))
    truth = x64 @ floats(name, data).astype(np.float64).T + bias
    assert np.all(np.abs(y - truth) <= bound)


@every_isa
@every_format
def test_shapes(isa: str, name: str) -> None:
    rng = np.random.default_rng(1)
    for rows, cols in itertools.product(few(isa, ROWS, [1, 16, 83]), columns(name)):
        data = random_rows(rng, name, rows, cols)
        x = activations(rng, max(NUM_TOKENS), cols)
        bias = rng.normal(size=rows).astype(np.float32)
        weight = pack(isa, name, data, bias=bias)
        whole = weight.multiply(x)
        assert_close(whole, x, name, data, bias)
        for n in few(isa, NUM_TOKENS, [1, 8, 9, 33]):
            assert np.array_equal(weight.multiply(x[:n]), whole[:n])


@every_isa
@every_format
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_others(isa: str, name: str, threads: int) -> None:
    rng = np.random.default_rng(2)
    cols = columns(name)[-1]
    weight = pack(isa, name, random_rows(rng, name, 83, cols), threads=threads)
    x = activations(rng, 217, cols)
    whole = weight.multiply(x)
    for n in few(isa, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 23, 36, 95, 193], [1, 2, 8, 9, 32, 33]):
        assert np.array_equal(weight.multiply(x[:n]), whole[:n])
    for first in [1, 7, 100, 192, 216]:
        assert np.array_equal(weight.multiply(x[first : first + 14]), whole[first : first + 14])


@pytest.mark.skipif(len(FUSED) < 2, reason="needs a CPU with AVX-512")
@every_format
@pytest.mark.parametrize(("n", "cols"), [(37, 768), (30, 2304), (33, 4352)])
def test_isas_agree_bit_for_bit(name: str, n: int, cols: int) -> None:
    rng = np.random.default_rng(3)
    data = random_rows(rng, name, 47, cols)
    x = activations(rng, n, cols)
    bias = rng.normal(size=47).astype(np.float32)
    first, *others = (pack(isa, name, data, bias=bias).multiply(x) for isa in FUSED)
    for other in others:
        assert np.array_equal(first, other)


@every_isa
@every_format
def test_extreme_quants_do_not_overflow(isa: str, name: str) -> None:
    rng = np.random.default_rng(4)
    x = np.where(rng.random((13, 256)) < 0.5, np.float32(-1), np.float32(1))
    x[0], x[1] = 1, -1
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        data = random_rows(rng, name, 16, 256)
        quants = np.ones(BLOCKS[name][1], bool)
        for at in SCALES[name]:
            quants[at : at + 2] = False
        data.reshape(-1, len(quants))[:, quants] = byte
        assert_close(pack(isa, name, data).multiply(x), x, name, data)


@every_isa
@every_format
def test_rows_of_zeros_and_of_tiny_numbers(isa: str, name: str) -> None:
    rng = np.random.default_rng(5)
    data = random_rows(rng, name, 17, 256)
    bias = rng.normal(size=17).astype(np.float32)
    x = np.zeros((3, 256), np.float32)
    x[1], x[2, 32] = 1e-40, -1e-35
    assert np.array_equal(pack(isa, name, data, bias=bias).multiply(x), np.tile(bias, (3, 1)))


@every_isa
@every_format
def test_large_numbers(isa: str, name: str) -> None:
    rng = np.random.default_rng(6)
    data = random_rows(rng, name, 17, 256)
    x = activations(rng, 5, 256) * np.float32(1e30)
    assert_close(pack(isa, name, data).multiply(x), x, name, data)


@every_isa
@every_format
def test_a_broken_row_spoils_no_other(isa: str, name: str) -> None:
    rng = np.random.default_rng(7)
    weight = pack(isa, name, random_rows(rng, name, 17, 512))
    x = activations(rng, 27, 512)
    expected = weight.multiply(x)
    x[3], x[7, 5], x[8, 500], x[13, 31] = np.nan, np.inf, np.nan, -np.inf
    x[20] = np.finfo(np.float32).max  # its sums may overflow, or not
    broken = [3, 7, 8, 13]
    y = weight.multiply(x)
    whole = np.delete(np.arange(27), [*broken, 20])
    assert np.array_equal(y[whole], expected[whole])
    assert np.all(np.isnan(y[broken]))


@every_isa
def test_stacked_sources_keep_their_arithmetic(isa: str) -> None:
    rng = np.random.default_rng(8)
    names = ["Q4_K", "F16", "Q6_K", "Q8_0"]
    parts = [(name, random_rows(rng, name, rows, 256)) for name, rows in zip(names, [70, 5, 16, 33], strict=True)]
    x = activations(rng, 31, 256)

    def multiply(*sources: tuple[str, NDArray[np.uint8]]) -> NDArray[np.float32]:
        shaped = [(name, len(data), 256, data.ravel()) for name, data in sources]
        result: NDArray[np.float32] = _kernels_test.Linear(isa, 2, shaped, exact=False).multiply(x)
        return result

    assert same_bits(multiply(*parts), np.concatenate([multiply(part) for part in parts], axis=1))
    exact = _kernels_test.Linear(isa, 1, [("F16", 5, 256, parts[1][1].ravel())], exact=True)
    assert np.array_equal(multiply(parts[1]), exact.multiply(x))

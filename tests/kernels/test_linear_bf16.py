"""linear() of BF16 weights with activations rounded to bf16, by AMX or AVX512-BF16; otherwise they stay exact.

The reference rounds the activations in numpy as the engine must, and multiplies in float64.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import BLOCKS, DEVICES, ISAS, PLAIN, floats, random_rows, same_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS = [1, 15, 16, 17, 33, 83]
COLS = [1, 3, 31, 32, 33, 64, 257, 576]
NUM_TOKENS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 65]

ROUNDING = ["amx", "avx512bf16"]

on_every_rounding_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=pytest.mark.skipif(isa not in ISAS, reason="needs a CPU that has the instructions"))
        for isa in ROUNDING
    ],
)


def pack(data: NDArray[np.uint8], isa: str, *, threads: int = 1, bias: object = (), exact: bool = False) -> Any:
    source = ("BF16", data.shape[0], data.shape[1] // 2, data.ravel())
    return _kernels_test.Linear(isa, threads, [source], list(bias), exact=exact)


def weights(rng: np.random.Generator, rows: int, cols: int) -> NDArray[np.uint8]:
    return random_rows(rng, "BF16", rows, cols)


def activations(rng: np.random.Generator, n: int, cols: int) -> NDArray[np.float32]:
    return rng.normal(size=(n, cols)).astype(np.float32)


def rounded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Finite numbers to bf16, to nearest even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def assert_close(
    isa: str,
    y: NDArray[np.float32],
    x: NDArray[np.float32],
    data: NDArray[np.uint8],
    bias: NDArray[np.float32] | float = 0.0,
) -> None:
    """Within the bounds of the sums' rounding, and of the activations'.

    Products of bf16 numbers are exact in f32. In a tile, of 32 columns the even ones are a chain of 16 additions that
    starts at zero, so does not round the first, and so are the odd ones; one addition joins them, one adds them to the
    sum of all groups. So a term takes part in at most m = 16 + groups roundings. In vectors all columns are one chain,
    m = columns. The bound is gamma(m) = m u / (1 - m u), u = 2^-24 (Higham, Accuracy and Stability, section 3.1). A
    subnormal result becomes 0: at most 2^-126 for each addition.

    A number of 8 significant bits is within 2^-8 of what it was rounded from.
    """
    w = floats("BF16", data).astype(np.float64)
    m = (16 + -(-x.shape[1] // 32) if isa == "amx" else x.shape[1]) * 2.0**-24
    additions = 2 * x.shape[1] + 32
    magnitude = np.abs(rounded(x).astype(np.float64)) @ np.abs(w).T + np.abs(bias)
    summing = m / (1 - m) * magnitude + additions * 2.0**-126
    assert np.all(np.abs(y - (rounded(x).astype(np.float64) @ w.T + bias)) <= summing)
    rounding = 2.0**-8 * (np.abs(x.astype(np.float64)) @ np.abs(w).T)
    assert np.all(np.abs(y - (x.astype(np.float64) @ w.T + bias)) <= summing + rounding)


@on_every_rounding_isa
def test_shapes(isa: str) -> None:
    rng = np.random.default_rng(1)
    for rows, cols in itertools.product(ROWS, COLS):
        data = weights(rng, rows, cols)
        x = activations(rng, max(NUM_TOKENS), cols)
        bias = rng.normal(size=rows).astype(np.float32)
        weight = pack(data, isa, bias=bias)
        whole = weight.multiply(x)
        assert_close(isa, whole, x, data, bias)
        for n in NUM_TOKENS:
            assert np.array_equal(weight.multiply(x[:n]), whole[:n])


@on_every_rounding_isa
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_others(threads: int, isa: str) -> None:
    rng = np.random.default_rng(2)
    weight = pack(weights(rng, 83, 257), isa, threads=threads)
    x = activations(rng, 70, 257)
    alone = np.concatenate([weight.multiply(row[None]) for row in x])
    for n in range(1, 71):
        assert np.array_equal(weight.multiply(x[:n]), alone[:n])
    for first in (1, 7, 16, 31, 63):
        assert np.array_equal(weight.multiply(x[first:]), alone[first:])


@on_every_rounding_isa
@pytest.mark.parametrize("cols", [4081, 4096])
def test_more_than_the_caches_hold(cols: int, isa: str) -> None:
    rng = np.random.default_rng(3)
    data = weights(rng, 211, cols)  # several turns of panels, and of rows
    x = activations(rng, 301, cols)
    whole = pack(data, isa, threads=2).multiply(x)
    assert_close(isa, whole, x, data)
    assert np.array_equal(pack(data, isa).multiply(x[190:207]), whole[190:207])


@pytest.mark.skipif("avx512bf16" not in ISAS, reason="needs a CPU with AVX512-BF16")
def test_vectors_add_the_odd_column_of_a_pair_first() -> None:
    rng = np.random.default_rng(11)
    # Products are multiples of 2^-14, sums about 2^14: each addition rounds in f32, none of it in float64.
    x, w = (np.float32(rng.choice([-1, 1], (n, 33)) * rng.integers(64, 257, (n, 33)) / 128) for n in (9, 17))
    data = np.ascontiguousarray((w.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
    bias = rng.integers(-(2**23), 2**23, 17).astype(np.float32) * np.float32(2**-8)
    expected = np.tile(bias, (9, 1))
    for k in [*(column ^ 1 for column in range(32)), 32]:
        exact = expected.astype(np.float64) + np.outer(x[:, k].astype(np.float64), w[:, k])
        expected = exact.astype(np.float32)
    assert same_bits(pack(data, "avx512bf16", bias=bias).multiply(x), expected)


@on_every_rounding_isa
def test_rows_are_filled_up_with_zeros_whatever_was_there(isa: str) -> None:
    rng = np.random.default_rng(12)
    for rows, cols in itertools.product([1, 5, 16], COLS):
        x = activations(rng, rows, cols)
        tiles = _kernels_test.round_to_bf16(isa, x)
        found = tiles.transpose(1, 0, 2).reshape(16, -1)[:rows]
        assert np.array_equal(found[:, :cols], rounded(x).view(np.uint32) >> 16)
        assert not found[:, cols:].any()


@on_every_rounding_isa
def test_activations_become_the_nearest_bf16_number(isa: str) -> None:
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2**32, (33, 64), dtype=np.uint32)
    bits[:11] = bits[:11] & 0xFFFF0000 | 0x8000  # ties
    exponents = bits >> 23 & 0xFF
    x = np.where((exponents == 0) | (exponents >= 0xFE), 0x3F808000, bits).astype(np.uint32).view(np.float32)
    one = np.uint16(0x3F80)
    data = (np.eye(64, dtype=np.uint16) * one).view(np.uint8)
    assert same_bits(pack(data, isa).multiply(x), rounded(x) + np.float32(0))  # sums of zeros are positive


@on_every_rounding_isa
@pytest.mark.parametrize("n", [1, 3])
def test_subnormal_numbers_are_zeros(n: int, isa: str) -> None:
    rng = np.random.default_rng(5)
    bias = rng.normal(size=17).astype(np.float32)
    tiny = np.full((n, 40), 1e-39, np.float32)
    large = np.full((17, 40), 0x7E80, np.uint16).view(np.uint8)  # 2^126: what the product would not lose in the bias
    assert np.array_equal(pack(large, isa, bias=bias).multiply(tiny), np.tile(bias, (n, 1)))
    subnormal = np.full((17, 40), 0x0040, np.uint16).view(np.uint8)
    assert np.array_equal(pack(subnormal, isa).multiply(activations(rng, n, 40) * 1e30), np.zeros((n, 17)))


@on_every_rounding_isa
@pytest.mark.parametrize("cols", [45, 64])
def test_a_broken_row_spoils_no_other(cols: int, isa: str) -> None:
    rng = np.random.default_rng(6)
    data = weights(rng, 17, cols)
    weight = pack(data, isa)
    x = activations(rng, 37, cols)
    expected = weight.multiply(x)
    x[3], x[20, 5] = np.nan, np.nan
    x[7, cols - 1], x[33, 2] = np.inf, -np.inf
    y = weight.multiply(x)
    assert np.all(np.isnan(y[[3, 20]]))
    w = floats("BF16", data)
    assert np.all(w != 0)
    assert np.array_equal(y[7], np.copysign(np.inf, w[:, -1]))
    assert np.array_equal(y[33], np.copysign(np.inf, -w[:, 2]))
    whole = np.delete(np.arange(37), [3, 7, 20, 33])
    assert np.array_equal(y[whole], expected[whole])
    assert np.array_equal(weight.multiply(x[:1]), expected[:1])  # what the last batch left behind does not matter


@on_every_rounding_isa
def test_a_broken_channel_spoils_no_other(isa: str) -> None:
    rng = np.random.default_rng(7)
    data = weights(rng, 33, 45)
    x = np.abs(activations(rng, 19, 45)) + 1
    expected = pack(data, isa).multiply(x)
    words = data.view(np.uint16)
    words[4, 44], words[15, 0], words[32, 7] = 0x7F80, 0x7FC0, 0xFF80  # infinity, NaN, minus infinity
    y = pack(data, isa).multiply(x)
    assert np.all(y[:, 4] == np.inf)
    assert np.all(np.isnan(y[:, 15]))
    assert np.all(y[:, 32] == -np.inf)
    whole = np.delete(np.arange(33), [4, 15, 32])
    assert np.array_equal(y[:, whole], expected[:, whole])


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("name", PLAIN)
def test_other_plain_floats_and_other_devices_stay_exact(isa: str, name: str) -> None:
    rng = np.random.default_rng(8)
    data = random_rows(rng, name, 17, 65)
    x = activations(rng, 5, 65)
    source = [(name, 17, 65, data.ravel())]
    exact, asked = (_kernels_test.Linear(isa, 1, source, exact=exact).multiply(x) for exact in (True, False))
    assert np.array_equal(exact, asked) == (isa not in ROUNDING or name != "BF16")


@pytest.mark.skipif("avx512" not in ISAS, reason="needs a CPU with AVX-512")
@pytest.mark.parametrize("cols", [129, 576])
@pytest.mark.parametrize("n", [1, 5, 13, 40])
def test_exactly_all_isas_agree_bit_for_bit(cols: int, n: int) -> None:
    rng = np.random.default_rng(9)
    data = weights(rng, 83, cols)
    x = activations(rng, n, cols)
    first, *others = (pack(data, isa, exact=True).multiply(x) for isa in ISAS if isa != "scalar")
    for other in others:
        assert np.array_equal(first, other)


@on_every_rounding_isa
def test_stacked_sources_keep_their_arithmetic(isa: str) -> None:
    rng = np.random.default_rng(10)
    names = ["BF16", "Q8_0", "F16", "BF16"]
    parts = [(name, random_rows(rng, name, rows, 256)) for name, rows in zip(names, [70, 5, 16, 33], strict=True)]
    x = activations(rng, 31, 256)

    def multiply(*sources: tuple[str, NDArray[np.uint8]]) -> NDArray[np.float32]:
        shaped = [
            (name, len(data), data.shape[1] // BLOCKS[name][1] * BLOCKS[name][0], data.ravel())
            for name, data in sources
        ]
        result: NDArray[np.float32] = _kernels_test.Linear(isa, 2, shaped, exact=False).multiply(x)
        return result

    assert same_bits(multiply(*parts), np.concatenate([multiply(part) for part in parts], axis=1))

"""Plain floats rounded to a byte a weight, with a scale for each channel, while they are packed.

A CPU rotates weights and activations by Hadamard matrices of 64 columns (32 at the end where 64 do not fit) before it
rounds them, and activations have a scale for each row; the GPU does not rotate, and has one for 32 columns.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.test_linear_int8 import FUSED, NUM_TOKENS, ROWS, activations, quantised
from tests.kernels.weights import DEVICES, ISAS, few, random_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

every_isa = pytest.mark.parametrize("isa", DEVICES)
every_arithmetic = pytest.mark.parametrize("exact", [False, True])


def weights(rng: np.random.Generator, rows: int, cols: int) -> NDArray[np.float32]:
    return (rng.normal(size=(rows, cols)) * rng.lognormal(size=(rows, 1))).astype(np.float32)


def pack(isa: str, w: NDArray[np.float32], *, exact: bool, threads: int = 1, bias: object = ()) -> Any:
    source = ("F32", *w.shape, w.view(np.uint8).ravel())
    return _kernels_test.Linear(isa, threads, [source], list(bias), exact=exact, target="INT8")


def bytes_of(w: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([_kernels_test.dequantize("INT8", _kernels_test.quantize("INT8", r), len(r)) for r in w])


def rotate(x: NDArray[np.float32], *, shrink: bool = False) -> NDArray[np.float32]:
    """In f32, stage by stage; `shrink` divides by the sizes of the rotations, so that rotating again gives x."""
    out = x.copy()
    for begin in range(0, x.shape[1], 64):
        block = out[:, begin : begin + 64]
        size = block.shape[1]
        h = 1
        while h < size:
            pairs = block.reshape(len(x), -1, 2, h)
            a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
            pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
            block[:] = pairs.reshape(len(x), size)
            h *= 2
        if shrink:
            block /= np.float32(size)
    return out


def rounded(isa: str, w: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the weights are once they are rounded."""
    return bytes_of(w) if isa == "cuda" else rotate(bytes_of(rotate(w, shrink=True)))


def quantised_rows(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What is left of x rotated: bytes to nearest even and their row's scale, in the same f32 arithmetic."""
    turned = rotate(x)
    most = np.abs(turned).max(axis=1, keepdims=True)
    q = np.rint(turned * (np.float32(127) / most))
    return q.astype(np.float64) * (most * np.float32(1 / np.float32(127)))


def operands(isa: str, x: NDArray[np.float32], w: NDArray[np.float32], *, exact: bool) -> tuple[Any, Any, int]:
    """What is multiplied, as float64, and how many roundings a product may meet on its way into the sum.

    Exactly: one of the product, `cols` of additions. A GPU in integers: two for a group's product with the activations'
    scale, one addition a group, one for the channel's scale. A CPU in integers: the sum becomes a
    float, and is multiplied by both scales. And one for the bias, two for the reference's own.
    """
    cols = x.shape[1]
    if exact:
        return x.astype(np.float64), rounded(isa, w).astype(np.float64), cols + 3
    if isa == "cuda":
        return quantised(x), bytes_of(w).astype(np.float64), cols // 32 + 8
    return quantised_rows(x), bytes_of(rotate(w, shrink=True)).astype(np.float64), 6


@every_isa
@every_arithmetic
def test_shapes(isa: str, exact: bool) -> None:
    """Within gamma(m) of the sum of magnitudes, m counting the roundings that a term may meet (Higham, 3.1)."""
    rng = np.random.default_rng(1)
    for rows, cols in itertools.product(few(isa, ROWS, [1, 83]), [32, 64, 288, 576]):
        w = weights(rng, rows, cols)
        x = activations(rng, max(NUM_TOKENS), cols)
        bias = rng.normal(size=rows).astype(np.float32)
        packed = pack(isa, w, exact=exact, bias=bias)
        whole = packed.multiply(x)
        x_seen, w_seen, roundings = operands(isa, x, w, exact=exact)
        m = roundings * 2.0**-24
        # A byte is multiplied as byte + 128 and corrected: exactly, so only the true terms count.
        bound = m / (1 - m) * (np.abs(x_seen) @ np.abs(w_seen).T + np.abs(bias))
        assert np.all(np.abs(whole - (x_seen @ w_seen.T + bias)) <= bound)
        for n in few(isa, NUM_TOKENS, [1, 9, 33]):
            assert np.array_equal(packed.multiply(x[:n]), whole[:n])


@every_isa
@every_arithmetic
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_does_not_depend_on_the_others(isa: str, exact: bool, threads: int) -> None:
    rng = np.random.default_rng(2)
    packed = pack(isa, weights(rng, 83, 576), exact=exact, threads=threads)
    x = activations(rng, 217, 576)
    whole = packed.multiply(x)
    for first, n in [(0, 1), (1, 7), (7, 8), (100, 23), (192, 25)]:
        assert np.array_equal(packed.multiply(x[first : first + n]), whole[first : first + n])


@pytest.mark.skipif(len(FUSED) < 2, reason="needs a CPU with AVX-512")
@every_arithmetic
def test_isas_agree_bit_for_bit(exact: bool) -> None:
    rng = np.random.default_rng(3)
    w, x = weights(rng, 47, 2304), activations(rng, 46, 2304)
    first, *others = (pack(isa, w, exact=exact).multiply(x) for isa in FUSED)
    for other in others:
        assert np.array_equal(first, other)


@every_isa
def test_the_largest_sums_do_not_overflow(isa: str) -> None:
    x = np.ones((9, 4096), np.float32)
    w = np.where(np.arange(16)[:, None] % 2, np.float32(1), np.float32(-1)) * np.ones((1, 4096), np.float32)
    y = pack(isa, w, exact=False).multiply(x)
    assert np.allclose(y, np.where(np.arange(16) % 2, 4096.0, -4096.0), rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_the_most_columns_do_not_overflow(isa: str) -> None:
    """Numbers that are 127 in all columns once they are rotated; a byte more could be too many."""
    x = np.tile(np.eye(1, 64, dtype=np.float32), (17, 1024))
    y = pack(isa, x[:1], exact=False).multiply(x)
    assert np.allclose(y, 1024, rtol=1e-5)
    with pytest.raises(RuntimeError, match="65568 columns; int8 quantization takes at most 65536"):
        pack(isa, np.zeros((1, 65568), np.float32), exact=False)


@every_isa
def test_embedding_is_the_rounded_row(isa: str) -> None:
    w = weights(np.random.default_rng(5), 37, 288)
    assert np.array_equal(pack(isa, w, exact=False).embed(list(range(37))), rounded(isa, w))


@every_isa
@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_a_broken_activation_breaks_its_row_alone(isa: str, broken: float) -> None:
    rng = np.random.default_rng(8)
    packed, x = pack(isa, weights(rng, 20, 96), exact=False), activations(rng, 9, 96)
    sound = packed.multiply(x)
    x[4, 70] = broken
    y = packed.multiply(x)
    assert np.all(np.isnan(y[4]))
    assert np.array_equal(np.delete(y, 4, axis=0), np.delete(sound, 4, axis=0))


@every_isa
@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
def test_every_plain_format_is_rounded(isa: str, source: str) -> None:
    rng = np.random.default_rng(6)
    data = random_rows(rng, source, 21, 64)
    packed = _kernels_test.Linear(isa, 2, [(source, 21, 64, data.ravel())], exact=False, target="INT8")
    plain = _kernels_test.dequantize(source, data.ravel(), 64)
    assert np.array_equal(packed.embed(list(range(21))), rounded(isa, plain))
    assert packed.bytes == 2 * (16 * 4 + 64 * 16)


def test_blocks_are_not_rounded_again() -> None:
    data = random_rows(np.random.default_rng(7), "Q8_0", 16, 64)
    with pytest.raises(RuntimeError, match="plain floats only"):
        _kernels_test.Linear(ISAS[0], 1, [("Q8_0", 16, 64, data.ravel())], exact=False, target="INT8")

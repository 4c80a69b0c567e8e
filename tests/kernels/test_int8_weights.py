"""Plain floats rounded to a byte a weight, with a scale for each channel, while they are packed."""

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


def rounded(w: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([_kernels_test.dequantize("INT8", _kernels_test.quantize("INT8", r), len(r)) for r in w])


@every_isa
@every_arithmetic
def test_shapes(isa: str, exact: bool) -> None:
    """Within gamma(m) of the sum of magnitudes, m counting the roundings that a term may meet (Higham, 3.1).

    In integers: two for a group's product with the activations' scale, at most one addition per group and one for the
    bias, one for the channel's scale, two for the reference's own; exactly: one product and `cols` additions.
    """
    rng = np.random.default_rng(1)
    for rows, cols in itertools.product(few(isa, ROWS, [1, 83]), [32, 64, 288, 576]):
        w = weights(rng, rows, cols)
        x = activations(rng, max(NUM_TOKENS), cols)
        bias = rng.normal(size=rows).astype(np.float32)
        packed = pack(isa, w, exact=exact, bias=bias)
        whole = packed.multiply(x)
        seen = (x if exact else quantised(x)).astype(np.float64)
        m = (cols + 3 if exact else cols // 32 + 8) * 2.0**-24
        # A byte is multiplied as byte + 128 and corrected: exactly, so only the true terms count.
        bound = m / (1 - m) * (np.abs(seen) @ np.abs(rounded(w)).T.astype(np.float64) + np.abs(bias))
        assert np.all(np.abs(whole - (seen @ rounded(w).T.astype(np.float64) + bias)) <= bound)
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


@every_isa
def test_embedding_is_the_rounded_row(isa: str) -> None:
    w = weights(np.random.default_rng(5), 37, 288)
    assert np.array_equal(pack(isa, w, exact=False).embed(list(range(37))), rounded(w))


@every_isa
@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
def test_every_plain_format_is_rounded(isa: str, source: str) -> None:
    rng = np.random.default_rng(6)
    data = random_rows(rng, source, 21, 64)
    packed = _kernels_test.Linear(isa, 2, [(source, 21, 64, data.ravel())], exact=False, target="INT8")
    plain = _kernels_test.dequantize(source, data.ravel(), 64)
    assert np.array_equal(packed.embed(list(range(21))), rounded(plain))
    assert packed.bytes == 2 * (16 * 4 + 64 * 16)


def test_blocks_are_not_rounded_again() -> None:
    data = random_rows(np.random.default_rng(7), "Q8_0", 16, 64)
    with pytest.raises(RuntimeError, match="plain floats only"):
        _kernels_test.Linear(ISAS[0], 1, [("Q8_0", 16, 64, data.ravel())], exact=False, target="INT8")

"""linear() and embed() on every instruction set and storage format, against float64 and against themselves."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import (
    BLOCKS,
    DEVICES,
    FORMATS,
    ISAS,
    PLAIN,
    few,
    floats,
    random_bytes,
    random_rows,
    same_bits,
    unaligned,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

ROWS = [1, 3, 16, 17, 31, 48, 257]
NUM_TOKENS = [1, 2, 3, 5, 8, 16, 33, 64]

every_isa = pytest.mark.parametrize("isa", DEVICES)
every_format = pytest.mark.parametrize("name", FORMATS)


def columns(name: str) -> list[int]:
    if name in PLAIN:
        return [1, 3, 31, 64, 257, 576]
    return [256, 512, 768] if name.endswith("_K") else [32, 64, 256, 288, 576]


def pack(isa: str, parts: Sequence[tuple[str, NDArray[np.uint8]]], *, threads: int = 1, bias: object = ()) -> object:
    sources = []
    for name, data in parts:
        block_size, block_bytes = BLOCKS[name]
        sources.append((name, data.shape[0], data.shape[1] // block_bytes * block_size, data.ravel()))
    return _kernels_test.Linear(isa, threads, sources, list(bias))


def activations(rng: np.random.Generator, n: int, cols: int) -> NDArray[np.float32]:
    return rng.normal(size=(n, cols)).astype(np.float32)


def assert_close(
    isa: str,
    y: NDArray[np.float32],
    x: NDArray[np.float32],
    w: NDArray[np.float32],
    bias: NDArray[np.float32] | float = 0.0,
) -> None:
    """Within the bound of a sum that is rounded after every product and after every addition.

    A term takes part in one product and at most `cols` additions, so its relative error is at most
    gamma(cols + 1) = (cols + 1) u / (1 - (cols + 1) u) with u = 2^-24, in any order of summation
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).

    CUDA's kernels split a product into at most 6 of bf16 numbers, which together are at most 1 + 2^-7 as large, and
    leave out what is below 2^-24 of it; partial sums are added up to 8 times more.
    """
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    roundings = (6 * x.shape[1] + 8) * (1 + 2**-7) + 1 if isa == "cuda" else x.shape[1] + 1
    m = roundings * 2.0**-24
    bound = m / (1 - m) * (np.abs(x64) @ np.abs(w64).T + np.abs(bias))
    assert np.all(np.abs(y - (x64 @ w64.T + bias)) <= bound)


@every_isa
@every_format
def test_shapes(isa: str, name: str) -> None:
    rng = np.random.default_rng(1)
    for rows, cols in itertools.product(few(isa, ROWS, [1, 16, 83]), columns(name)):
        data = random_rows(rng, name, rows, cols)
        x = activations(rng, max(NUM_TOKENS), cols)
        weight = pack(isa, [(name, data)])
        whole = weight.multiply(x)
        assert_close(isa, whole, x, floats(name, data))
        for n in few(isa, NUM_TOKENS, [1, 8, 9, 33]):
            assert np.array_equal(weight.multiply(x[:n]), whole[:n])


@every_isa
@every_format
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_others(isa: str, name: str, threads: int) -> None:
    rng = np.random.default_rng(2)
    cols = columns(name)[-1]
    weight = pack(isa, [(name, random_rows(rng, name, 83, cols))], threads=threads)
    x = activations(rng, 70, cols)
    alone = np.concatenate([weight.multiply(row[None]) for row in x])
    for n in few(isa, [*range(1, 71)], [2, 8, 9, 32, 33, 65]):
        assert np.array_equal(weight.multiply(x[:n]), alone[:n])


@every_isa
@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_1", "Q6_K"])
def test_long_batches(isa: str, name: str) -> None:
    rng = np.random.default_rng(3)
    data = random_rows(rng, name, 40, 256)
    x = activations(rng, 413, 256)
    whole = pack(isa, [(name, data)], threads=2).multiply(x)
    assert_close(isa, whole, x, floats(name, data))
    assert np.array_equal(pack(isa, [(name, data)]).multiply(x[190:200]), whole[190:200])


@every_isa
def test_a_broken_row_spoils_no_other(isa: str) -> None:
    rng = np.random.default_rng(4)
    weight = pack(isa, [("Q8_0", random_rows(rng, "Q8_0", 17, 64))])
    x = activations(rng, 9, 64)
    expected = weight.multiply(x)
    x[3], x[7, 5] = np.nan, np.inf
    whole = np.delete(np.arange(9), [3, 7])
    assert np.array_equal(weight.multiply(x)[whole], expected[whole])


@pytest.mark.skipif("avx512" not in ISAS, reason="needs a CPU with AVX-512")
@every_format
def test_avx2_and_avx512_agree_bit_for_bit(name: str) -> None:
    rng = np.random.default_rng(5)
    data = random_rows(rng, name, 47, 512)
    x = activations(rng, 13, 512)
    assert np.array_equal(pack("avx2", [(name, data)]).multiply(x), pack("avx512", [(name, data)]).multiply(x))


@every_isa
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_stacked_sources_keep_their_formats(isa: str, threads: int) -> None:
    rng = np.random.default_rng(6)
    names = ["Q4_K", "F16", "Q6_K", "Q8_0"]
    parts = [(name, random_rows(rng, name, rows, 256)) for name, rows in zip(names, [70, 5, 16, 33], strict=True)]
    bias = rng.normal(size=124).astype(np.float32)
    x = activations(rng, 7, 256)
    stacked = pack(isa, parts, threads=threads, bias=bias).multiply(x)
    assert_close(isa, stacked, x, np.concatenate([floats(*part) for part in parts]), bias)
    starts = np.cumsum([0, 70, 5, 16])
    alone = [
        pack(isa, [part], bias=bias[start : start + len(part[1])]).multiply(x)
        for start, part in zip(starts, parts, strict=True)
    ]
    assert np.array_equal(stacked, np.concatenate(alone, axis=1))


@every_isa
@every_format
def test_embedding_is_the_definition_of_the_format(isa: str, name: str) -> None:
    rng = np.random.default_rng(7)
    for cols in columns(name):
        data = random_bytes(rng, name, 37, cols)
        tokens = [36, 0, 17, 17, *range(37)]
        got = pack(isa, [(name, data)]).embed(tokens)
        assert same_bits(got, floats(name, data)[tokens])


@pytest.mark.parametrize("token", [-1, 37])
def test_a_token_out_of_range_is_refused(token: int) -> None:
    weight = pack(ISAS[0], [("F32", random_rows(np.random.default_rng(8), "F32", 37, 8))])
    with pytest.raises(RuntimeError, match="token id out of range"):
        weight.embed([0, token])


@every_format
def test_sources_need_no_alignment(name: str) -> None:
    rng = np.random.default_rng(9)
    data = random_rows(rng, name, 21, 256)
    odd = _kernels_test.Linear(ISAS[0], 1, [(name, 21, 256, unaligned(data))])
    assert same_bits(odd.embed(list(range(21))), floats(name, data))


@every_format
def test_a_packed_weight_is_as_small_as_its_source(name: str) -> None:
    data = random_rows(np.random.default_rng(10), name, 64, 512)
    unpacked_scales = 4 * 64 * 2 if name in ("Q4_K", "Q5_K") else 0  # their six-bit scales become bytes
    assert pack(ISAS[0], [(name, data)]).bytes == data.size + unpacked_scales


def test_what_does_not_fit_together_is_refused() -> None:
    rng = np.random.default_rng(11)
    with pytest.raises(RuntimeError, match="differ in columns"):
        pack(ISAS[0], [("F32", random_rows(rng, "F32", 4, 8)), ("F32", random_rows(rng, "F32", 4, 9))])
    with pytest.raises(RuntimeError, match="one number per row"):
        pack(ISAS[0], [("F32", random_rows(rng, "F32", 4, 8))], bias=[0.0] * 3)

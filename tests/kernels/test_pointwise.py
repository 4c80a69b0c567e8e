"""Norms, activations and the like against float64, on every instruction set."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import DEVICES

if TYPE_CHECKING:
    from collections.abc import Callable

ISAS = _kernels_test.isas()
U = 2.0**-24  # unit roundoff of f32
SHAPES = [(1, 1), (3, 3), (2, 15), (5, 31), (4, 64), (33, 257), (40, 576)]  # the last ones are several tasks
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def normal(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> F32:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape) * scale + shift
    return values.astype(np.float32)


@pytest.fixture(params=[(isa, threads) for isa in DEVICES for threads in (1, 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def device(request: pytest.FixtureRequest) -> _kernels_test.Device:
    return _kernels_test.Device(*request.param)


def chain(size: int) -> float:
    """Relative error of a sum of `size` numbers in 64 chains that are joined pairwise, in units of U."""
    return math.ceil(size / 64) + 3 + 8


@pytest.mark.parametrize(("rows", "size"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_rms_norm(device: _kernels_test.Device, rows: int, size: int, bias: bool) -> None:
    x, weight, out = normal(rows, size, scale=3), normal(size, seed=1), np.empty((rows, size), np.float32)
    shift = normal(size, seed=2) if bias else None
    device.norm("rms", 1e-5, weight, shift, x, out)
    x64 = x.astype(np.float64)
    scaled = x64 / np.sqrt((x64**2).mean(axis=1, keepdims=True) + float(np.float32(1e-5))) * weight
    expected = scaled + (0 if shift is None else shift)
    # The squares' sum enters under a root; then a root, a division and two products, and the bias.
    bound = np.abs(scaled) * (chain(size) / 2 + 6) * U + np.abs(expected) * U
    assert np.all(np.abs(out - expected) <= bound)


@pytest.mark.parametrize(("rows", "size"), SHAPES[1:])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_layer_norm(device: _kernels_test.Device, rows: int, size: int, bias: bool, mean: float) -> None:
    x, weight, out = normal(rows, size, shift=mean), normal(size, seed=1), np.empty((rows, size), np.float32)
    shift = normal(size, seed=2) if bias else None
    device.norm("layer", 1e-5, weight, shift, x, out)
    x64 = x.astype(np.float64)
    centred = x64 - x64.mean(axis=1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(axis=1, keepdims=True) + float(np.float32(1e-5)))
    scaled = centred / sigma * weight
    expected = scaled + (0 if shift is None else shift)
    # The mean is off by at most `mean_error`, which every difference and, squared at most, the variance inherits.
    mean_error = np.abs(x64).mean(axis=1, keepdims=True) * (chain(size) + 1) * U
    difference = mean_error + np.abs(centred) * U
    relative = chain(size) / 2 * U + 6 * U + (mean_error / sigma) ** 2
    bound = np.abs(weight) / sigma * difference + np.abs(scaled) * relative + np.abs(expected) * U
    assert np.all(np.abs(out - expected) <= bound)


def silu(x: F64) -> tuple[F64, F64]:
    value = x / (1 + np.exp(-x))
    return value, np.abs(value) * 6 * U  # e^-x to two roundings, a sum, a division


def gelu(x: F64) -> tuple[F64, F64]:
    z = np.abs(x) / math.sqrt(2)
    tail = 0.5 * np.abs(x) * np.vectorize(math.erfc)(z)
    value = np.where(x < 0, -tail, x - tail)
    return value, tail * (4 * z**2 + 40) * U + np.abs(value) * 2 * U  # z² is rounded in the exponent


def gelu_tanh(x: F64) -> tuple[F64, F64]:
    t = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    sigmoid = 1 / (1 + np.exp(-t))
    return x * sigmoid, np.abs(x * sigmoid) * (6 + 6 * np.abs(t) * (1 - sigmoid)) * U  # t is rounded in the exponent


def relu(x: F64) -> tuple[F64, F64]:
    return np.maximum(x, 0), np.zeros_like(x)


UNDERFLOW = 90 * 60 * 2.0**-124  # e^-|x| is 0 below e^-86.5, e^|x| ends at e^88.37; times the largest factors here


@pytest.mark.parametrize("kind", [silu, gelu, gelu_tanh, relu], ids=lambda f: f.__name__)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_activation(
    device: _kernels_test.Device, kind: Callable[[F64], tuple[F64, F64]], gated: bool, rows: int, size: int
) -> None:
    x = normal(rows, 2 * size if gated else size, scale=3)
    x[0, 0] = -90
    x[-1, -1] = 60
    out = np.empty((rows, size), np.float32)
    device.activation(kind.__name__, gated, x, out)
    with np.errstate(over="ignore"):
        expected, bound = kind(x[:, :size].astype(np.float64))
    if gated:
        up = x[:, size:].astype(np.float64)
        expected, bound = expected * up, bound * np.abs(up) + np.abs(expected * up) * U
    assert np.all(np.abs(out - expected) <= bound + UNDERFLOW)


@pytest.mark.parametrize("isa", DEVICES)
def test_gelu_is_exact_to_a_millionth(isa: str) -> None:
    x = np.linspace(-12, 12, 20001, dtype=np.float32).reshape(1, -1)
    out = np.empty_like(x)
    _kernels_test.Device(isa, 1).activation("gelu", False, x, out)
    assert np.max(np.abs(out - gelu(x.astype(np.float64))[0])) < 1e-6


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_add_scale_gather(device: _kernels_test.Device, rows: int, size: int) -> None:
    x, delta = normal(rows, size), normal(rows, size, seed=1)
    expected = x + delta
    device.add(x, delta)
    assert np.array_equal(x, expected)
    device.scale(x, 0.3)
    assert np.array_equal(x, expected * np.float32(0.3))
    rng = np.random.default_rng(rows)
    indices = [int(i) for i in rng.integers(0, rows, 2 * rows)]
    out = np.empty((2 * rows, size), np.float32)
    device.gather_rows(x, indices, out)
    assert np.array_equal(out, x[indices])


@pytest.mark.parametrize("isa", ISAS)
def test_exp_over_its_range(isa: str) -> None:
    x = np.linspace(-86.5, 88.3, 500_001, dtype=np.float32)
    out = np.empty_like(x)
    _kernels_test.exp(isa, x, 0.0, 1.0, out)
    expected = np.exp(x.astype(np.float64))
    ulps = np.abs(out - expected) / np.spacing(expected.astype(np.float32))
    assert ulps.max() < 1.01


@pytest.mark.parametrize("isa", ISAS)
def test_exp_at_the_ends(isa: str) -> None:
    x = np.array([-np.inf, -1e30, -104, -87, 0, 89, np.inf, np.nan], np.float32)
    out = np.empty_like(x)
    _kernels_test.exp(isa, x, 0.0, 1.0, out)
    assert out[:5].tolist() == [0, 0, 0, 0, 1]
    assert out[5] == out[6] == pytest.approx(math.exp(88.37), rel=1e-5)
    assert np.isnan(out[7])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 5, 16, 17, 31, 100])
def test_max_does_not_count_nan(isa: str, size: int) -> None:
    x = normal(size)
    assert _kernels_test.max(isa, x) == x.max()
    x[size // 2] = np.nan
    assert _kernels_test.max(isa, x) == (np.nanmax(x) if size > 1 else -np.inf)
    assert _kernels_test.max(isa, np.full(size, -np.inf, np.float32)) == -np.inf


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_rows_do_not_depend_on_their_neighbours(isa: str, kind: str) -> None:
    x, weight = normal(70, 300), normal(300, seed=1)
    together, alone = np.empty_like(x), np.empty_like(x)
    _kernels_test.Device(isa, 2).norm(kind, 1e-5, weight, None, x, together)
    for row in range(len(x)):
        _kernels_test.Device(isa, 1).norm(kind, 1e-5, weight, None, x[row : row + 1], alone[row : row + 1])
    assert np.array_equal(together, alone)

"""Float weights that become another format while they are packed: what quantize() makes of each row, bit for bit.

(INT8's weights are rotated first: test_int8_weights.py.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import DEVICES, ISAS, PLAIN, same_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

TARGETS = [*PLAIN, "Q4_1"]


def rows_of_all_kinds(cols: int) -> NDArray[np.float32]:
    """Heavy tails, ranges that f16 does not hold, numbers alike, zeros of both signs, and such as none should be."""
    rng = np.random.default_rng(1)
    rows = np.concatenate([rng.normal(size=(60, cols)), rng.standard_t(2, size=(60, cols)), np.zeros((8, cols))])
    rows[7] *= 1e-6
    rows[8] *= 1e6
    rows[120] = 3.5
    rows[121] = np.where(np.arange(cols) % 3, -0.0, 0.0)
    rows[122] = np.arange(cols) % 16 - 7.5
    rows[123] = 1e-40
    rows[124, 3], rows[125, 5], rows[126, cols - 1] = np.nan, np.inf, -np.inf
    return rows.astype(np.float32)


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("source", PLAIN)
@pytest.mark.parametrize("target", TARGETS)
def test_rounded_as_rows_are(isa: str, source: str, target: str) -> None:
    for cols in (32, 288) if target == "Q4_1" else (1, 33, 288):
        data = [_kernels_test.quantize(source, row) for row in rows_of_all_kinds(max(cols, 32))[:, :cols].copy()]
        rows = [_kernels_test.dequantize(source, row, cols)[0] for row in data]
        expected = [_kernels_test.dequantize(target, _kernels_test.quantize(target, row), cols)[0] for row in rows]
        packed = _kernels_test.Linear(isa, 2, [(source, len(rows), cols, np.concatenate(data))], target=target)
        assert same_bits(packed.embed(list(range(len(rows)))), np.stack(expected))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_breaks_its_row_of_int8(isa: str, broken: float) -> None:
    rows = rows_of_all_kinds(96)[:20]
    sound = _kernels_test.Linear(isa, 1, [("F32", *rows.shape, rows.view(np.uint8).ravel())], target="INT8")
    expected = sound.embed(list(range(20)))
    rows[7, 70] = broken
    packed = _kernels_test.Linear(isa, 1, [("F32", *rows.shape, rows.view(np.uint8).ravel())], target="INT8")
    found = packed.embed(list(range(20)))
    assert np.all(np.isnan(found[7]))
    assert same_bits(np.delete(found, 7, axis=0), np.delete(expected, 7, axis=0))

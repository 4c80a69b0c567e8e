"""Random rows in every storage format, and what they are in floats by the `gguf` package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np

from langchain_vllm_server import _kernels_test

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCKS = {name: (size, num_bytes) for name, size, num_bytes in _kernels_test.formats()}
FORMATS = list(BLOCKS)
PLAIN = ["F32", "F16", "BF16"]
ISAS: list[str] = _kernels_test.isas()
DEVICES = [*ISAS, "cuda"]  # CUDA's kernels run on the CPU where there is no GPU (csrc/cuda_on_cpu): slowly


def few(isa: str, values: list[int], fewer: list[int]) -> list[int]:
    """The values to test an instruction set with, or the fewer ones that matter to CUDA's kernels."""
    return fewer if isa == "cuda" else values


# Where the f16 scales and offsets stand in a block, in bytes.
SCALES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_bytes(rng: np.random.Generator, name: str, rows: int, cols: int) -> NDArray[np.uint8]:
    """Any bytes at all, (rows, bytes of a row): infinities, NaNs and subnormal numbers among the scales."""
    block_size, block_bytes = BLOCKS[name]
    return rng.integers(0, 256, (rows, cols // block_size * block_bytes), dtype=np.uint8)


def random_rows(rng: np.random.Generator, name: str, rows: int, cols: int) -> NDArray[np.uint8]:
    """Rows of weights, (rows, bytes of a row): random quants, scales of either sign around 0.01."""
    if name in PLAIN:
        values = rng.normal(0, 0.1, (rows, cols)).astype(np.float32)
        return gguf.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    data = random_bytes(rng, name, rows, cols)
    blocks = data.reshape(-1, BLOCKS[name][1])
    for at in SCALES[name]:
        scales = rng.normal(0, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data


def floats(name: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The reference: rows (rows, bytes of a row) as float32 (rows, cols)."""
    with np.errstate(all="ignore"):  # random scales overflow
        return gguf.dequantize(data, gguf.GGMLQuantizationType[name]).astype(np.float32, copy=False)


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Equal bit for bit, but for which NaN it is."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def unaligned(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A flat copy at an odd address, as a tensor in a mapped file may have."""
    room = np.empty(data.size + 2, np.uint8)
    start = 1 - room.ctypes.data % 2
    copy = room[start : start + data.size]
    copy[:] = data.ravel()
    assert copy.ctypes.data % 2 == 1
    return copy

"""A tensor as it lies in a file, and the storage formats that the engine reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Format → (numbers in a block, bytes of a block); csrc/base/quant.h has the layouts.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's numbers are.

    Attributes:
        name: The checkpoint's own name for it.
        format: A key of `BLOCKS`, or another dtype's name where the file has tensors that the engine cannot read.
        shape: (rows, cols) or (size), row-major: the last dimension is contiguous.
        file: Path of the file.
        offset: Bytes from the start of the file.
        size: Bytes.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int

    def parts(self) -> list[StoredTensor]:
        """One for each index of the first dimension, `name[0]` and so on."""
        count, *shape = self.shape
        size = self.size // count
        return [
            replace(self, name=f"{self.name}[{i}]", shape=tuple(shape), offset=self.offset + i * size, size=size)
            for i in range(count)
        ]


def check_extents(tensors: list[StoredTensor], start: int, end: int) -> str | None:
    """What is wrong with where the tensors lie, or None: each must be inside [start, end) and touch no other."""
    position, previous = start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.size)):
        if tensor.offset < position:
            return f"tensor {tensor.name!r} at byte {tensor.offset} overlaps {previous}, which ends at byte {position}"
        position, previous = tensor.offset + tensor.size, f"tensor {tensor.name!r}"
        if position > end:
            return f"tensor {tensor.name!r} ends at byte {position}, past the end of the file ({end} bytes)"
    return None

"""Speed of the linear kernels at the default model's shapes: GMAC/s, and GB/s of weights read.

    python benchmarks/kernels.py [--isa avx512] [--threads 2] [--formats Q4_1,F32] [--seconds 0.3]

Weights are read from as many copies as no cache holds, in turn, as a forward pass does. K-quants come in multiples of
256 columns: 576 becomes 512.
"""

from __future__ import annotations

import argparse

from langchain_vllm_server import _kernels_test

SHAPES = {"mlp_in": (576, 3072), "mlp_out": (1536, 576), "qkv": (576, 960), "lm_head": (576, 49152)}  # columns, rows
NUM_TOKENS = [1, 8, 32, 512]


def row(isa: str, name: str, block_size: int, threads: int, seconds: float) -> None:
    """Prints one line per shape."""
    for role, (cols, rows) in SHAPES.items():
        cols = cols // block_size * block_size
        cells = [_kernels_test.bench_linear(isa, name, rows, cols, n, threads, seconds) for n in NUM_TOKENS]
        text = "".join(f"{gmacs:9.1f} {gbs:6.1f}" for gmacs, gbs in cells)
        print(f"{name:5} {role:8} {cols:5} -> {rows:<6}{text}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=_kernels_test.isas()[0], choices=_kernels_test.isas())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", default=",".join(name for name, _, _ in _kernels_test.formats()))
    parser.add_argument("--seconds", type=float, default=0.3, help="per number")
    args = parser.parse_args()
    print(f"{args.isa}, {args.threads} threads: GMAC/s and GB/s of weights for n = {NUM_TOKENS} rows")
    sizes = {name: size for name, size, _ in _kernels_test.formats()}
    for name in args.formats.split(","):
        row(args.isa, name, sizes[name], args.threads, args.seconds)
        print(f"{name:5} packing  {_kernels_test.bench_pack(name, 49152, 512, args.threads):.1f} GB/s")


if __name__ == "__main__":
    main()

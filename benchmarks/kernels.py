"""Speed of the linear kernels at the default model's shapes: GMAC/s, and GB/s of weights read.

    python benchmarks/kernels.py [--isa avx512vnni] [--threads 2] [--formats Q4_1,F32] [--seconds 0.3]

Quantised formats are measured twice: in integers, as the engine multiplies them unless told otherwise, and exactly, as
--dtype float32 does. Integers are compared with a peak of dot products, by default that of one core of a Sapphire
Rapids Xeon in registers, times the threads. Weights are read from as many copies as no cache holds, in turn, as a
forward pass does. K-quants come in multiples of 256 columns: 576 becomes 512.
"""

from __future__ import annotations

import argparse

from langchain_vllm_server import _kernels_test

SHAPES = {"mlp_in": (576, 3072), "mlp_out": (1536, 576), "qkv": (576, 960), "lm_head": (576, 49152)}  # columns, rows
NUM_TOKENS = [1, 8, 32, 512]
PLAIN = {"F32", "F16", "BF16"}
PEAK = 282  # GMAC/s of one core: vpdpbusd on registers alone


def rows_of(args: argparse.Namespace, name: str, block_size: int, *, exact: bool) -> None:
    """Prints one line per shape."""
    for role, (cols, rows) in SHAPES.items():
        cols = cols // block_size * block_size
        text = ""
        for n in NUM_TOKENS:
            gmacs, gbs = _kernels_test.bench_linear(args.isa, name, rows, cols, n, args.threads, args.seconds, exact)
            text += f"{gmacs:9.1f} {gbs:6.1f}" + ("" if exact else f" {gmacs / (args.peak * args.threads):4.0%}")
        print(f"{name:5} {'exact' if exact else 'int8':5} {role:8} {cols:5} -> {rows:<6}{text}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=_kernels_test.isas()[0], choices=_kernels_test.isas())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", default=",".join(name for name, _, _ in _kernels_test.formats()))
    parser.add_argument("--seconds", type=float, default=0.3, help="per number")
    parser.add_argument("--peak", type=float, default=PEAK, help="GMAC/s of integer dot products on one core")
    args = parser.parse_args()
    print(f"{args.isa}, {args.threads} threads: GMAC/s, GB/s of weights, % of peak for n = {NUM_TOKENS} rows")
    sizes = {name: size for name, size, _ in _kernels_test.formats()}
    for name in args.formats.split(","):
        for exact in [True] if name in PLAIN else [False, True]:
            rows_of(args, name, sizes[name], exact=exact)
        print(f"{name:5} packing  {_kernels_test.bench_pack(name, 49152, 512, args.threads):.1f} GB/s")


if __name__ == "__main__":
    main()

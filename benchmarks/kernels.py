"""The kernels alone, at the default model's shapes: whether they are right, and how near they are to the machine.

    python -m benchmarks.kernels [--check] [--isa amx] [--threads 2] [--formats Q4_1,INT8] [--seconds 0.3]

Speed is given as GMAC/s, as GB/s of weights (or keys and values) read, and as a share of what the same cores reach in
registers: integer dot products where weights and activations are bytes, f32 multiply-adds for plain floats and where
the multiply is exact (AMX and AVX512-BF16 multiply BF16 faster). Quantised formats and BF16 are measured twice: with
rounded activations, as the engine multiplies them unless told otherwise, and exactly, as --dtype float32 does. INT8 is
what --quantization int8 makes of floats. Weights are read from as many copies as no cache holds, in turn, as a forward
pass does. K-quants come in multiples of 256 columns: 576 becomes 512.

--check compares every ISA and format with float64 instead and fails beyond 1e-5 (exact) or 1e-2 (rounded: of 32 normal
numbers to bytes costs about 0.5 %, to bf16 0.2 %). tests/kernels has the bounds for each number.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from langchain_vllm_server import _kernels_test

SHAPES = {"mlp_in": (576, 3072), "mlp_out": (1536, 576), "qkv": (576, 960), "lm_head": (576, 49152)}  # columns, rows
NUM_TOKENS = [1, 8, 32, 512]
CONTEXTS = [128, 512, 2048, 8192]
PLAIN = ["F32", "F16", "BF16"]
ALWAYS_EXACT = ["F32", "F16"]
BLOCKS = {name: (size, num_bytes) for name, size, num_bytes in _kernels_test.formats()}
FORMATS = [*BLOCKS, "INT8"]
ATTENTION = {
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "attention_scale": 0.125,
}


def linear_speed(args: argparse.Namespace, name: str, peaks: dict[str, float], *, exact: bool) -> None:
    """Prints one line per shape."""
    size = BLOCKS.get(name, (32, 0))[0]
    peak = peaks["fma_gmacs" if exact or name in PLAIN else "dot_gmacs"]
    for role, (cols, rows) in SHAPES.items():
        cols = cols // size * size
        text = ""
        for n in NUM_TOKENS:
            gmacs, gbs = _kernels_test.bench_linear(args.isa, name, rows, cols, n, args.threads, args.seconds, exact)
            text += f"{gmacs:9.1f} {gbs:6.1f} {gmacs / peak:4.0%}"
        print(f"{name:5} {'exact' if exact else 'rounded':7} {role:8} {cols:5} -> {rows:<6}{text}", flush=True)


def best_seconds(call: object, seconds: float) -> float:
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        call()  # type: ignore[operator]
        best = min(best, time.perf_counter() - begin)
    return best


def attention_speed(args: argparse.Namespace, kv_format: str) -> None:
    """One token, and 512 tokens, at the end of a context."""
    heads, dim = ATTENTION["num_attention_heads"], ATTENTION["head_dim"]
    width = int(15 * dim)
    attention = _kernels_test.Attention(args.isa, args.threads, ATTENTION, kv_format, max(CONTEXTS) // 16)
    for context in CONTEXTS:
        qkv = np.random.default_rng(0).standard_normal((context, width)).astype(np.float32)
        blocks = list(range(context // 16))
        attention.rope_store_kv([(context, 0, blocks)], 0, qkv)
        text = ""
        for n in (1, min(512, context)):
            rows, out = np.ascontiguousarray(qkv[-n:]), np.empty((n, int(heads * dim)), np.float32)
            step = (n, context - n, blocks)
            best = best_seconds(lambda step=step, rows=rows, out=out: attention.attention([step], 0, rows, out), 0.2)
            seen = n * (context - n) + n * (n + 1) / 2
            read = attention.kv_bytes_per_block * context / 16
            text += f"{best * 1e6:10.1f} µs {2 * seen * heads * dim / best * 1e-9:7.1f} {read / best * 1e-9:6.1f}"
        print(f"attention {kv_format:5} context {context:5}{text}", flush=True)


def speed(args: argparse.Namespace) -> None:
    peaks = _kernels_test.bench_peaks(args.isa, args.threads)
    limits = ", ".join(f"{value:.0f} {name}" for name, value in peaks.items())
    print(f"{args.isa}, {args.threads} threads: {limits}\nGMAC/s, GB/s and % of peak for {NUM_TOKENS} rows")
    for name in args.formats.split(","):
        for exact in [True] if name in ALWAYS_EXACT else [False, True]:
            linear_speed(args, name, peaks, exact=exact)
    print("time, GMAC/s and GB/s of keys and values, for 1 and 512 tokens")
    for kv_format in ("F16", "INT8"):
        attention_speed(args, kv_format)


def check_linear(isa: str, name: str, *, exact: bool) -> float:
    """The error's norm over the result's, for one awkward shape."""
    from tests.kernels.weights import floats, random_rows

    rng = np.random.default_rng(1)
    stored = "F32" if name == "INT8" else name
    data = random_rows(rng, stored, 83, 768)
    target = name if name == "INT8" else ""
    weight = _kernels_test.Linear(isa, 2, [(stored, 83, 768, data.ravel())], exact=exact, target=target)
    wide = floats(stored, data) if name != "INT8" else weight.embed(list(range(83)))
    x = rng.standard_normal((37, 768)).astype(np.float32)
    truth = x.astype(np.float64) @ wide.astype(np.float64).T
    return float(np.linalg.norm(weight.multiply(x) - truth) / np.linalg.norm(truth))


def check(args: argparse.Namespace) -> None:
    failed = False
    for isa in _kernels_test.isas():
        for name in args.formats.split(","):
            for exact in [True] if name in ALWAYS_EXACT else [False, True]:
                error, allowed = check_linear(isa, name, exact=exact), 1e-5 if exact else 1e-2
                failed |= error > allowed
                verdict = "ok" if error <= allowed else "WRONG"
                print(f"{isa:10} {name:5} {'exact' if exact else 'rounded':7} error {error:.1e} {verdict}")
    sys.exit(failed)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--isa", default=_kernels_test.isas()[0], choices=_kernels_test.isas())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--seconds", type=float, default=0.3, help="per number")
    args = parser.parse_args()
    check(args) if args.check else speed(args)


if __name__ == "__main__":
    main()

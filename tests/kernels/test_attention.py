"""Paged attention and RoPE against float64, on every instruction set; and its bits, which nothing else may change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from langchain_vllm_server import _kernels_test
from tests.kernels.weights import DEVICES, few

ISAS = _kernels_test.isas()
U = 2.0**-24  # unit roundoff of f32
BLOCK, PARTITION = 16, 128
# Tensor cores add up products of bf16 terms: three of each f32, two of an f16, one of a bf16 or a byte; those of two
# small terms are left out.
TERM_PRODUCTS = {"F32": 6, "F16": 5, "BF16": 3, "INT8": 3}
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def config(heads: int, kv_heads: int, head_dim: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
    } | more


def random_qkv(cfg: dict[str, Any], tokens: int, seed: int) -> F32:
    width = (cfg["num_attention_heads"] + 2 * cfg["num_key_value_heads"]) * cfg["head_dim"]
    return np.random.default_rng([seed, tokens]).standard_normal((tokens, width)).astype(np.float32)


@dataclass
class Run:
    """Steps over a paged cache whose blocks lie in random order and hold NaNs (or zeros) until they are written."""

    cfg: dict[str, Any]
    isa: str = ISAS[0]
    kv_format: str = "F32"
    threads: int = 1
    poison: int = 0xFF  # bytes of 0xFF are a NaN in every format
    attention: Any = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        num_blocks = 400
        self.attention = _kernels_test.Attention(self.isa, self.threads, self.cfg, self.kv_format, num_blocks)
        for block in range(num_blocks):
            self.attention.fill_block(block, self.poison)
        self.free = [int(b) for b in np.random.default_rng(1).permutation(num_blocks)]

    def __call__(self, sequences: list[F32], chunks: list[list[int]]) -> list[F32]:
        """Outputs (num_tokens, q_size) of each sequence of qkv rows, given in steps of `chunks` tokens."""
        q_size = self.cfg["num_attention_heads"] * self.cfg["head_dim"]
        outputs = [np.full((len(s), q_size), np.nan, np.float32) for s in sequences]
        tables: list[list[int]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        for step in range(max(map(len, chunks))):
            running = [i for i in range(len(sequences)) if step < len(chunks[i])]
            batch = []
            for i in running:
                while len(tables[i]) * BLOCK < done[i] + chunks[i][step]:
                    tables[i].append(self.free.pop())
                batch.append((chunks[i][step], done[i], tables[i]))
            spans = [slice(done[i], done[i] + chunks[i][step]) for i in running]
            qkv = np.concatenate([sequences[i][span] for i, span in zip(running, spans, strict=True)])
            out = np.full((len(qkv), q_size), np.nan, np.float32)
            self.attention.rope_store_kv(batch, 0, qkv)
            self.attention.attention(batch, 0, qkv, out)
            for i, span, rows in zip(running, spans, np.split(out, np.cumsum([b[0] for b in batch])[:-1]), strict=True):
                outputs[i][span] = rows
                done[i] = span.stop
        return outputs


def rounded(x: F32, kv_format: str) -> F64:
    """What the cache keeps of x."""
    if kv_format == "F16":
        return x.astype(np.float16).astype(np.float64)
    if kv_format == "BF16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def sums_per_product(isa: str, kv_format: str) -> int:
    """How many additions a product takes, each of which rounds."""
    return TERM_PRODUCTS[kv_format] if isa == "cuda" else 1


def reference(cfg: dict[str, Any], qkv: F32, kv_format: str, isa: str) -> tuple[F64, F64]:
    """Attention in float64 over the rounded keys and values, and how far off f32 arithmetic may be."""
    sums = sums_per_product(isa, kv_format)
    heads, kv_heads, dim = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]
    n, scale, window = len(qkv), cfg["attention_scale"], cfg.get("sliding_window", [0])[0]
    q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=1)
    q64 = q.astype(np.float64).reshape(n, heads, dim)
    k64, v64 = (np.repeat(rounded(x, kv_format).reshape(n, kv_heads, dim), heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q64, k64) * scale
    error = np.einsum("qhd,khd->hqk", np.abs(q64), np.abs(k64)) * scale * (sums * dim + 3) * U
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    if "alibi_slopes" in cfg:
        bias = np.array(cfg["alibi_slopes"], np.float32)[:, None, None] * distance
        scores, error = scores + bias, error + np.abs(bias) * U
    error += np.abs(scores) * 2 * U
    masked = (distance > 0) | (distance <= -window if window else False)
    scores = np.where(masked, -np.inf, scores)
    error = np.where(masked, 0, error).max(axis=2, keepdims=True)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, v64)
    # What three bf16 terms leave of a number, and products of small terms, are less than an ulp of each product.
    # A score off by e changes its weight by the factor 1 ± e, and the sum of weights by as much. Sums run over a
    # partition, and then over the partitions; each exponential and the division add a few roundings.
    relative = 2 * error + (sums * PARTITION + 4 * n / PARTITION + 16) * U
    bound = np.einsum("hqk,khd->qhd", weights * relative, np.abs(v64))
    return out.reshape(n, -1), bound.reshape(n, -1)


def check(cfg: dict[str, Any], qkv: F32, out: F32, isa: str, kv_format: str = "F32") -> None:
    expected, bound = reference(cfg, qkv, kv_format, isa)
    assert np.all(np.isfinite(out))
    assert np.all(np.abs(out - expected) <= bound)


@pytest.mark.parametrize("kv_format", TERM_PRODUCTS)
def test_every_term_of_a_number_counts_on_cuda(kv_format: str) -> None:
    """Heads with one number each, so that sums hide nothing: the second of two tokens gives v / (1 + e^-s), s = q · k.

    Off by e, a score changes that by the factor 1 ± (1 - p) e where p is the token's share. It has the roundings of its
    products, of the key's scale and two more; the result has those of an exponential (two), a sum, products, the
    value's scale and a division. Without its third term a number is off by up to 2^-17, several times that.
    """
    heads, dim, sums = 8, 8, TERM_PRODUCTS[kv_format]
    cfg = config(heads, heads, dim, attention_scale=1.0)
    rng = np.random.default_rng(0)
    sequences = [np.zeros((2, 3, heads, dim), np.float32) for _ in range(32)]
    numbers = (rng.uniform(1, 2, (32, 3, heads)) * rng.choice([-1, 1], (32, 3, heads))).astype(np.float32)
    places = rng.integers(0, dim, (32, 2, heads))
    for sequence, number, (of_key, of_value) in zip(sequences, numbers, places, strict=True):
        for of, place in enumerate((of_key, of_key, of_value)):
            sequence[1, of, np.arange(heads), place] = number[of]
    outputs = Run(cfg, "cuda", kv_format)([s.reshape(2, -1) for s in sequences], [[2]] * 32)
    found = np.array(outputs)[:, 1].reshape(32, heads, dim)
    q = numbers[:, 0].astype(np.float64)
    k, v = (rounded(np.ascontiguousarray(numbers[:, of]), kv_format) for of in (1, 2))
    share = 1 / (1 + np.exp(-q * k))
    expected, relative = share * v, (1 - share) * (np.abs(q * k) * (sums + 6) + 2) + sums + 10
    at = np.take_along_axis(found, places[:, 1, :, None], axis=2)[..., 0]
    assert np.count_nonzero(found) == at.size
    assert np.all(np.abs(at - expected) <= np.abs(expected) * relative * U)


HEADS = [(1, 1, 8), (4, 4, 16), (4, 4, 20), (9, 3, 64), (8, 2, 128), (5, 1, 80), (30, 2, 12), (71, 1, 8)]


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("kv_format", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_whole_prompt(isa: str, kv_format: str, heads: int, kv_heads: int, head_dim: int) -> None:
    cfg = config(heads, kv_heads, head_dim)
    qkv = random_qkv(cfg, 150, seed=head_dim)
    check(cfg, qkv, Run(cfg, isa, kv_format)([qkv], [[150]])[0], isa, kv_format)


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 127, 128, 129, 257, 700])
def test_context_lengths(isa: str, tokens: int) -> None:
    cfg = config(6, 2, 20)
    qkv = random_qkv(cfg, tokens, seed=0)
    check(cfg, qkv, Run(cfg, isa, threads=2)([qkv], [[tokens]])[0], isa)


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("window", [1, 2, 16, 100, 128, 129, 200, 1000])
def test_sliding_window(isa: str, window: int) -> None:
    cfg = config(6, 2, 16, sliding_window=[window])
    qkv = random_qkv(cfg, 400, seed=window)
    check(cfg, qkv, Run(cfg, isa, threads=2)([qkv], [[150, 1, 1, 248]])[0], isa)


@pytest.mark.parametrize("isa", DEVICES)
def test_alibi(isa: str) -> None:
    cfg = config(6, 2, 16, alibi_slopes=[2.0**-i for i in range(1, 7)])
    qkv = random_qkv(cfg, 300, seed=0)
    check(cfg, qkv, Run(cfg, isa)([qkv], [[300]])[0], isa)


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("kv_format", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("size", [0.1, 8.0])
def test_scores_and_weights_lose_no_bits(isa: str, kv_format: str, size: float) -> None:
    """One product in each score, one weight in each result: no long sum's bound hides what is lost of them.

    A score is at most six products of terms, seven roundings with what they leave out, and three more when it is
    scaled and the greatest taken off; exp, the sum, the division and the weight's product add eight.
    """
    cfg = config(64, 64, 16, attention_scale=1.0)
    rng = np.random.default_rng(0)
    qkv = np.zeros((2, 3, 64, 16), np.float32)
    qkv[1, 0, :, 0] = rng.uniform(-size, size, 64)
    qkv[0, 1, :, 0] = rng.uniform(0.5, 1, 64)
    qkv[0, 2, :, 0] = 1
    out = Run(cfg, isa, kv_format)([qkv.reshape(2, -1)], [[2]])[0][1].reshape(64, 16)[:, 0]
    scores = qkv[1, 0, :, 0].astype(np.float64) * rounded(qkv[0, 1, :, 0].copy(), kv_format)
    weights = 1 / (1 + np.exp(-scores))
    assert np.all(np.abs(out - weights) <= (10 * np.abs(scores) + 8) * U * weights)


@pytest.mark.parametrize("isa", DEVICES)
def test_large_scores_do_not_overflow(isa: str) -> None:
    cfg = config(3, 1, 16, attention_scale=50.0)
    qkv = random_qkv(cfg, 200, seed=0)
    check(cfg, qkv, Run(cfg, isa)([qkv], [[200]])[0], isa)


BITS = [
    config(9, 3, 64),
    config(4, 4, 20, sliding_window=[37]),
    config(6, 2, 16, sliding_window=[150]),
    config(6, 1, 80, alibi_slopes=[0.5, 0.25, 0.125, 0.3, 0.2, 0.1]),
    config(4, 2, 32, rope_inv_freq=[1.0, 0.3, 0.1, 0.01]),
]


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("cfg", BITS)
@pytest.mark.parametrize(
    "chunks",
    [[1] * 290, [289, 1], [7] * 41 + [3], [1, 160, 129], [128, 128, 34]],
    ids=["ones", "last", "7", "1", "128"],
)
def test_chunks_do_not_change_a_bit(isa: str, cfg: dict[str, Any], chunks: list[int]) -> None:
    if isa in ("scalar", "cuda") and len(chunks) == 290:
        chunks = [200, *[1] * 90]
    qkv = random_qkv(cfg, 290, seed=0)
    whole = Run(cfg, isa, "F16")([qkv], [[290]])[0]
    assert np.array_equal(whole, Run(cfg, isa, "F16")([qkv], [chunks])[0])


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("cfg", BITS)
@pytest.mark.parametrize("kv_format", ["F32", "BF16"])
def test_neighbours_threads_and_stale_blocks_do_not_change_a_bit(isa: str, cfg: dict[str, Any], kv_format: str) -> None:
    """A ragged batch of prompts and decode steps on 1, 2 and 5 threads, and each sequence alone in a clean cache."""
    lengths = [300, 1, 17, 260, 129]
    chunks = [[300], [1], [16, 1], [100, 100, 60], [64, 64, 1]]
    sequences = [random_qkv(cfg, n, seed=i) for i, n in enumerate(lengths)]
    alone = [Run(cfg, isa, kv_format, poison=0)([s], [[len(s)]])[0] for s in sequences]
    for threads in few(isa, [1, 2, 5], [1, 2]):
        together = Run(cfg, isa, kv_format, threads)(sequences, chunks)
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("isa", DEVICES)
def test_split_decode_is_the_whole_one(isa: str) -> None:
    """One query over many partitions, which several threads share."""
    cfg = config(9, 3, 64)
    qkv = random_qkv(cfg, 700, seed=0)
    results = [Run(cfg, isa, "F16", threads)([qkv], [[699, 1]])[0] for threads in few(isa, [1, 2, 4], [1, 2])]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[-1])
    expected, bound = reference(cfg, qkv, "F16", isa)
    assert np.all(np.abs(results[0][-1] - expected[-1]) <= bound[-1])


@pytest.mark.parametrize("isa", DEVICES)
def test_later_tokens_cannot_spoil_earlier_ones(isa: str) -> None:
    cfg = config(6, 2, 16)
    qkv = random_qkv(cfg, 140, seed=0)
    clean = Run(cfg, isa)([qkv], [[140]])[0]
    qkv[133:] = np.inf
    spoilt = Run(cfg, isa)([qkv], [[140]])[0]
    assert np.array_equal(clean[:133], spoilt[:133])


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("kv_format", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("chunks", [[140], [133, 1, 6]], ids=["whole", "chunks"])
def test_a_value_that_is_none_spoils_those_that_see_it(isa: str, kv_format: str, chunks: list[int]) -> None:
    """Whatever their queries and keys, and nobody else."""
    cfg = config(6, 2, 20)
    qkv = random_qkv(cfg, 140, seed=0)
    clean = Run(cfg, isa, kv_format)([qkv], [[140]])[0]
    qkv[133, 8 * 20 + 3] = np.nan  # the first head's value
    spoilt = Run(cfg, isa, kv_format)([qkv], [chunks])[0]
    assert np.array_equal(clean[:133], spoilt[:133])
    assert np.array_equal(clean[:, 60:], spoilt[:, 60:])  # the other head's queries
    assert np.all(np.isnan(spoilt[133:, 3:60:20]))


def rotated(x: F64, positions: F64, cfg: dict[str, Any]) -> F64:
    """RoPE of x (tokens, heads, head_dim) in float64, from angles in f32 as transformers computes them."""
    inv_freq, factor = np.array(cfg["rope_inv_freq"], np.float32), cfg.get("rope_attention_factor", 1.0)
    half = len(inv_freq)
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)[:, None, :]
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if not cfg.get("rope_interleaved", False):
        first, second = slice(0, half), slice(half, 2 * half)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


@pytest.mark.parametrize("isa", DEVICES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (20, 10), (32, 4), (8, 1)])
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_rope(isa: str, interleaved: bool, head_dim: int, half: int, factor: float) -> None:
    inv_freq = [float(np.float32(10000.0 ** (-i / half))) for i in range(half)]
    rope = {"rope_inv_freq": inv_freq, "rope_interleaved": interleaved, "rope_attention_factor": factor}
    cfg = config(6, 2, head_dim, **rope)
    qkv = random_qkv(cfg, 60, seed=0)
    got = qkv.copy()
    attention = _kernels_test.Attention(isa, 2, cfg, "F32", 300)
    blocks = list(range(300))
    batch = [(40, 0, blocks), (20, 4000, blocks)]
    attention.rope_store_kv([(40, 0, blocks[:3]), (20, 4000, blocks[3:300])], 0, got)
    positions = np.concatenate([np.arange(computed, computed + n) for n, computed, _ in batch]).astype(np.float64)
    heads = qkv.astype(np.float64).reshape(60, 10, head_dim)
    expected = heads.copy()
    expected[:, :8] = rotated(heads[:, :8], positions, cfg)
    # cos and sin to one ulp, the factor, a product and a sum: four roundings of numbers no larger than the pair.
    size = np.sqrt(2) * factor * np.abs(heads).max(axis=2, keepdims=True)
    assert np.all(np.abs(got.reshape(60, 10, head_dim) - expected) <= 6 * U * size)
    assert np.array_equal(got.reshape(60, 10, head_dim)[:, 8:], qkv.reshape(60, 10, head_dim)[:, 8:])


@pytest.mark.parametrize("isa", DEVICES)
def test_clip_comes_before_rotation(isa: str) -> None:
    cfg = config(2, 1, 8, clip_qkv=0.5, rope_inv_freq=[0.5])
    qkv = random_qkv(cfg, 5, seed=0)
    clipped, got = np.clip(qkv, -0.5, 0.5), qkv.copy()
    plain = config(2, 1, 8, rope_inv_freq=[0.5])
    _kernels_test.Attention(isa, 1, cfg, "F32", 1).rope_store_kv([(5, 0, [0])], 0, got)
    _kernels_test.Attention(isa, 1, plain, "F32", 1).rope_store_kv([(5, 0, [0])], 0, clipped)
    assert np.array_equal(got, clipped)


def test_rotation_follows_the_positions() -> None:
    """The same device, batch after batch: the angles kept from one batch are not used for another."""
    cfg = config(2, 1, 8, rope_inv_freq=[0.5, 0.1])
    attention = _kernels_test.Attention(ISAS[0], 1, cfg, "F32", 2)
    qkv = random_qkv(cfg, 1, seed=0)
    results = []
    for position in (3, 17, 3):
        got = qkv.copy()
        attention.rope_store_kv([(1, position, [0, 1])], 0, got)
        results.append(got)
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])


@pytest.mark.parametrize("isa", DEVICES)
def test_stored_numbers_are_rounded_to_nearest_even(isa: str) -> None:
    """One token attends to itself: what comes out is its value, as the cache keeps it."""
    cfg = config(1, 1, 16)
    odd = [0, 1, -1, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65504, 6e-5, -3e-8]
    values = np.array([*odd, *[0.1] * 6], np.float32)
    qkv = np.concatenate([random_qkv(cfg, 1, seed=0)[:, :32], values[None, :]], axis=1)
    for kv_format in ("F32", "F16", "BF16"):
        out = Run(cfg, isa, kv_format)([qkv], [[1]])[0][0]
        assert np.array_equal(out, rounded(values, kv_format).astype(np.float32))


def test_bad_block_tables_are_refused() -> None:
    cfg = config(1, 1, 16)
    attention = _kernels_test.Attention(ISAS[0], 1, cfg, "F32", 4)
    qkv = random_qkv(cfg, 20, seed=0)
    with pytest.raises(RuntimeError, match="block tables name blocks of the cache"):
        attention.rope_store_kv([(20, 0, [0, 4])], 0, qkv)
    with pytest.raises(RuntimeError, match="block tables hold every token"):
        attention.rope_store_kv([(20, 0, [0])], 0, qkv)
    with pytest.raises(RuntimeError, match="layer exists"):
        attention.rope_store_kv([(20, 0, [0, 1])], 1, qkv)

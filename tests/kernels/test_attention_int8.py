"""Attention over a cache of bytes: against float64 over the same bytes, and the bits that nothing else may change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from langchain_vllm_server import _kernels_test
from tests.kernels.test_attention import (
    BITS,
    F32,
    F64,
    HEADS,
    ISAS,
    PARTITION,
    Run,
    U,
    config,
    random_qkv,
    sums_per_product,
)
from tests.kernels.weights import DEVICES, few

EXP2 = 7.6e-5  # relative error of the exponential whose values are rounded to bytes

every_isa = pytest.mark.parametrize("isa", DEVICES)


def hadamard(x: F32) -> tuple[F32, int]:
    """Heads (…, head_dim) transformed in f32 in the kernel's order, and what dot products grow by."""
    dim = x.shape[-1]
    if dim % 16:
        return x, 1
    vectors = dim // 16 & -(dim // 16)
    index = np.arange(dim)
    for bit in [1, 2, 4, 8]:
        x = np.where(index & bit, x[..., index ^ bit] - x, x[..., index ^ bit] + x)
    h = 16
    while h < 16 * vectors:
        x = np.where(index & h, x[..., index ^ h] - x, x + x[..., index ^ h])
        h *= 2
    return x, 16 * vectors


def as_bytes(x: F32) -> tuple[F64, F32]:
    """Each last axis as integers of -127 … 127 and their scale."""
    most = np.abs(x).max(axis=-1, keepdims=True)
    large = most > 2.0**-100
    inverse = np.where(large, np.float32(127) / np.where(large, most, 1), 0).astype(np.float32)
    return np.rint(x * inverse).astype(np.float64), most * np.float32(1 / np.float32(127))


def reference(cfg: dict[str, Any], qkv: F32, isa: str) -> tuple[F64, F64]:
    """Attention in float64 over the bytes, and how far off the kernel may be.

    In integers queries are bytes, too, and beyond the roundings of f32 (two products for a score; see
    test_attention.reference for the rest) exponentials are good to EXP2 only, and a weight times its value's scale is
    rounded to a byte: off by half a step, a step being a 255th of the largest in its partition. CUDA's exponentials and
    sums are in f32 instead, and that is all.
    """
    in_integers, sums = isa != "cuda", sums_per_product(isa, "INT8")
    heads, kv_heads, dim = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]
    n, window = len(qkv), cfg.get("sliding_window", [0])[0]
    q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=1)
    rotated_q, gain = hadamard(q.reshape(n, heads, dim))
    rotated_k, _ = hadamard(k.reshape(n, kv_heads, dim))
    k_bytes, k_scales = as_bytes(rotated_k)
    v_bytes, v_scales = as_bytes(v.reshape(n, kv_heads, dim))
    repeat = heads // kv_heads
    k64 = np.repeat(k_bytes * k_scales, repeat, axis=1)
    v_bytes, v_scales = np.repeat(v_bytes, repeat, axis=1), np.repeat(v_scales, repeat, axis=1)[..., 0]
    scale = cfg["attention_scale"] / gain
    if in_integers:
        q_bytes, q_scales = as_bytes(rotated_q)
        scores = np.einsum("qhd,khd->hqk", q_bytes * q_scales, k64) * scale
        error = np.abs(scores) * 8 * U
    else:
        scores = np.einsum("qhd,khd->hqk", rotated_q.astype(np.float64), k64) * scale
        error = np.einsum("qhd,khd->hqk", np.abs(rotated_q), np.abs(k64)) * scale * (sums * dim + 8) * U
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    if "alibi_slopes" in cfg:
        bias = np.array(cfg["alibi_slopes"], np.float32)[:, None, None] * distance
        scores, error = scores + bias, error + (np.abs(bias) + np.abs(scores)) * 2 * U
    masked = (distance > 0) | (distance <= -window if window else False)
    scores = np.where(masked, -np.inf, scores)
    error = np.where(masked, 0, error).max(axis=2, keepdims=True)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    scaled = weights * v_scales.T[:, None, :]
    out = np.einsum("hqk,khd->qhd", scaled, v_bytes)
    relative = 2 * error + (sums * PARTITION + 4 * n / PARTITION + 20) * U + (2 * EXP2 if in_integers else 0)
    bound = np.einsum("hqk,khd->qhd", scaled * relative, np.abs(v_bytes))
    for start in range(0, n, PARTITION) if in_integers else []:
        part = slice(start, start + PARTITION)
        step = scaled[:, :, part].max(axis=2) / 255 * (1 + relative[:, :, 0])
        seen = (~masked[:, part]).astype(np.float64)
        bound += 0.501 * np.einsum("hq,qk,khd->qhd", step, seen, np.abs(v_bytes[part]))
    return out.reshape(n, -1), bound.reshape(n, -1)


def check(cfg: dict[str, Any], qkv: F32, out: F32, isa: str) -> None:
    expected, bound = reference(cfg, qkv, isa)
    assert np.all(np.isfinite(out))
    assert np.all(np.abs(out - expected) <= bound)


@every_isa
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [*HEADS, (2, 1, 192)])
def test_whole_prompt(isa: str, heads: int, kv_heads: int, head_dim: int) -> None:
    cfg = config(heads, kv_heads, head_dim)
    qkv = random_qkv(cfg, 150, seed=head_dim)
    check(cfg, qkv, Run(cfg, isa, "INT8")([qkv], [[150]])[0], isa)


@every_isa
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 127, 128, 129, 257, 700])
def test_context_lengths(isa: str, tokens: int) -> None:
    cfg = config(6, 2, 32)
    qkv = random_qkv(cfg, tokens, seed=0)
    check(cfg, qkv, Run(cfg, isa, "INT8", threads=2)([qkv], [[tokens]])[0], isa)


@pytest.mark.parametrize("isa", ISAS)
def test_exponentials(isa: str) -> None:
    """The second of two tokens, whose own value is 0: v w / (w + w'), w's byte being exact."""
    cfg = config(64, 64, 16)
    qkv = random_qkv(cfg, 2, seed=0)
    qkv[1, 2 * 64 * 16 :] = 0
    expected = reference(cfg, qkv, isa)[0][1]
    off = np.abs(Run(cfg, isa, "INT8")([qkv], [[2]])[0][1] - expected)
    assert np.all(off <= np.abs(expected) * (2 * EXP2 + 200 * U))  # scores below 10, off by 8 roundings of each


@every_isa
@pytest.mark.parametrize("window", [1, 2, 16, 100, 128, 129, 200, 1000])
def test_sliding_window(isa: str, window: int) -> None:
    cfg = config(6, 2, 16, sliding_window=[window])
    qkv = random_qkv(cfg, 400, seed=window)
    check(cfg, qkv, Run(cfg, isa, "INT8", threads=2)([qkv], [[150, 1, 1, 248]])[0], isa)


@every_isa
def test_alibi(isa: str) -> None:
    cfg = config(6, 2, 16, alibi_slopes=[2.0**-i for i in range(1, 7)])
    qkv = random_qkv(cfg, 300, seed=0)
    check(cfg, qkv, Run(cfg, isa, "INT8")([qkv], [[300]])[0], isa)


@every_isa
@pytest.mark.parametrize("cfg", BITS)
@pytest.mark.parametrize("chunks", [[289, 1], [7] * 41 + [3], [1, 160, 129]], ids=["last", "7", "1"])
def test_chunks_do_not_change_a_bit(isa: str, cfg: dict[str, Any], chunks: list[int]) -> None:
    qkv = random_qkv(cfg, 290, seed=0)
    whole = Run(cfg, isa, "INT8")([qkv], [[290]])[0]
    assert np.array_equal(whole, Run(cfg, isa, "INT8")([qkv], [chunks])[0])


@every_isa
@pytest.mark.parametrize("cfg", BITS)
def test_neighbours_threads_and_stale_blocks_do_not_change_a_bit(isa: str, cfg: dict[str, Any]) -> None:
    lengths = [300, 1, 17, 260, 129]
    chunks = [[300], [1], [16, 1], [100, 100, 60], [64, 64, 1]]
    sequences = [random_qkv(cfg, n, seed=i) for i, n in enumerate(lengths)]
    alone = [Run(cfg, isa, "INT8", poison=0)([s], [[len(s)]])[0] for s in sequences]
    for threads in few(isa, [1, 2, 5], [1, 2]):
        together = Run(cfg, isa, "INT8", threads)(sequences, chunks)
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.skipif(len(ISAS) < 3, reason="needs a CPU with AVX-512")
def test_isas_agree_bit_for_bit() -> None:
    cfg = config(9, 3, 64)
    qkv = random_qkv(cfg, 300, seed=0)
    first, *others = (Run(cfg, isa, "INT8")([qkv], [[299, 1]])[0] for isa in ISAS if isa != "scalar")
    for other in others:
        assert np.array_equal(first, other)


@every_isa
@pytest.mark.parametrize("power", [-110, -140], ids=str)
def test_numbers_below_2_to_the_minus_100_are_zeros(isa: str, power: int) -> None:
    """Normal ones, and such whose inverse is no number any more."""
    cfg = config(2, 2, 16)
    qkv = random_qkv(cfg, 40, seed=0)
    qkv[::3, 2 * 16 :] *= np.float32(2.0**power)
    qkv[:, 5 * 16 :] *= np.float32(2.0**power)
    out = Run(cfg, isa, "INT8")([qkv], [[40]])[0]
    check(cfg, qkv, out, isa)
    assert not np.any(out[:, 16:])


@every_isa
@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("where", [slice(None), slice(128 + 3, None, 16)], ids=["all", "a number of each value"])
def test_later_tokens_cannot_spoil_earlier_ones(isa: str, bad: float, where: slice) -> None:
    cfg = config(6, 2, 16)
    qkv = random_qkv(cfg, 140, seed=0)
    clean = Run(cfg, isa, "INT8")([qkv], [[140]])[0]
    qkv[133:, where] = bad
    spoilt = Run(cfg, isa, "INT8")([qkv], [[140]])[0]
    assert np.array_equal(clean[:133], spoilt[:133])
    assert np.all(np.isnan(spoilt[133:]))


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="multiple of 4"):
        _kernels_test.Attention(ISAS[0], 1, config(1, 1, 6), "INT8", 4)

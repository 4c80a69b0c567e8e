"""Rotary position embedding: the inverse frequencies of each kind of scaling.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), Llama 3.1's reference code. Every step is rounded to 32
bits where transformers computes in float32, so that both see the same angles far into a long context.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_vllm_server.fields import Fields

Rope = tuple[tuple[float, ...], float]  # inverse frequencies (dim / 2), factor of cos and sin

_f32 = struct.Struct("<f")


def f32(value: float) -> float:
    """The nearest 32-bit float; infinity where there is none."""
    try:
        rounded: float = _f32.unpack(_f32.pack(value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def compute_rope(rope: Fields, dim: int, max_position: int) -> Rope:
    """The frequencies for a rotary dimension, as the settings of Hugging Face's `rope_parameters` ask.

    Args:
        rope: `rope_theta`, `rope_type` (default, linear, dynamic, llama3, yarn) and what that type needs.
        dim: Numbers of a head that are rotated; even.
        max_position: The model's context; YaRN and Llama 3 fall back on it for `original_max_position_embeddings`.

    Raises:
        CheckpointError: The type is not known, or one of its values is missing or impossible.
    """
    if dim % 2:
        raise rope.error("dimensions", f"expected an even number, of which pairs can be rotated, found {dim}")
    rope_type = rope.text("rope_type", rope.get("type", "default"))
    if rope_type not in _TYPES:
        raise rope.error("rope_type", f"{rope_type!r} is not supported; supported: {', '.join(_TYPES)}")
    inv_freq, factor = _TYPES[rope_type](rope, dim, max_position)
    if not all(math.isfinite(f) for f in (*inv_freq, factor)):
        raise rope.error("rope_type", f"the values of {rope_type!r} give infinite frequencies")
    return tuple(inv_freq), factor


def _powers(base: float, dim: int) -> list[float]:
    return [f32(f32(base) ** f32(i / dim)) for i in range(0, dim, 2)]


def _inverse(value: float) -> float:
    return f32(1 / value) if value else math.inf


def _default(rope: Fields, dim: int, max_position: int) -> tuple[list[float], float]:
    del max_position
    return [_inverse(power) for power in _powers(_theta(rope), dim)], 1.0


def _linear(rope: Fields, dim: int, max_position: int) -> tuple[list[float], float]:
    factor = rope.number("factor", positive=True)
    return [f32(f / factor) for f in _default(rope, dim, max_position)[0]], 1.0


def _llama3(rope: Fields, dim: int, max_position: int) -> tuple[list[float], float]:
    factor = rope.number("factor", positive=True)
    low = rope.number("low_freq_factor", positive=True)
    high = rope.number("high_freq_factor", positive=True)
    if high <= low:
        raise rope.error("high_freq_factor", f"expected more than low_freq_factor ({low}), found {high}")
    original = rope.count("original_max_position_embeddings", max_position)

    def scaled(frequency: float) -> float:
        wavelength = f32(f32(2 * math.pi) / frequency)
        if wavelength < original / high:
            return frequency
        slow = f32(frequency / factor)
        if wavelength > original / low:
            return slow
        smooth = f32((f32(f32(original) / wavelength) - low) / (high - low))
        return f32(f32(f32(f32(1 - smooth) * frequency) / factor) + f32(smooth * frequency))

    return [scaled(f) for f in _default(rope, dim, max_position)[0]], 1.0


def _yarn(rope: Fields, dim: int, max_position: int) -> tuple[list[float], float]:
    original = rope.count("original_max_position_embeddings", max_position)
    factor = rope.number("factor", max_position / original, positive=True)
    theta = _theta(rope)
    if theta <= 1:
        raise rope.error("rope_theta", f"expected more than 1 for yarn, found {theta}")
    low, high = _yarn_range(rope, dim, theta, original)
    frequencies = []
    for i, power in enumerate(_powers(theta, dim)):
        ramp = f32(min(1.0, max(0.0, f32(f32(i - low) / f32(high - low)))))
        keep = f32(1 - ramp)  # 1: the short waves, which stay as they were trained
        stretched = f32(_inverse(f32(factor * power)) * f32(1 - keep))
        frequencies.append(f32(stretched + f32(_inverse(power) * keep)))
    return frequencies, _yarn_attention_factor(rope, factor)


def _yarn_range(rope: Fields, dim: int, theta: float, original: int) -> tuple[float, float]:
    """Between which dimensions the frequencies go over from unscaled to scaled."""

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(rope.number("beta_fast", 32, positive=True))
    high = dimension(rope.number("beta_slow", 1, positive=True))
    if rope.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    if "attention_factor" in rope:
        return rope.number("attention_factor", positive=True)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    whole, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if not (whole and all_dim):
        return mscale(1.0)
    if mscale(all_dim) == 0:
        raise rope.error("mscale_all_dim", f"{all_dim} makes the attention factor infinite")
    return mscale(whole) / mscale(all_dim)


def _theta(rope: Fields) -> float:
    return rope.number("rope_theta", 10_000.0, positive=True)


_TYPES: dict[str, Callable[[Fields, int, int], tuple[list[float], float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,  # it scales only beyond max_position_embeddings, to which the context is limited
    "llama3": _llama3,
    "yarn": _yarn,
}

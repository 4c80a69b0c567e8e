"""Throughput and latency over concurrency, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.records import Results

PANELS = (
    ("tokens_per_s", "output tokens/s"),
    ("ttft_p50", "time to first token, p50 (ms)"),
    ("itl_p99", "inter-token latency, p99 (ms)"),
)
# Colours that differ in lightness too; ours are warm and thick.
STYLES = {
    "ours:int8": ("#c2410c", "o"),
    "ours:Q4_0": ("#f59e0b", "s"),
    "openvino:int8": ("#0f766e", "^"),
    "vllm:int8": ("#1d4ed8", "D"),
    "vllm:bf16": ("#7c9cf0", "v"),
    "llama.cpp:Q4_0": ("#6b7280", "P"),
}
FALLBACK = {"ours:Q4_1": ("#c2410c", "o"), "llama.cpp:Q4_1": ("#6b7280", "P")}


def draw(results: Results, path: Path) -> bool:
    """Write the picture; False where matplotlib is not installed or nothing was measured."""
    curves = {name: points for name in _styles(results) if (points := _curve(results, name))}
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    if not curves:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), facecolor="#fafafa", layout="constrained")
    for axis, (name, title) in zip(axes, PANELS, strict=True):
        for engine, points in curves.items():
            colour, marker = _styles(results)[engine]
            x, y = zip(*((level, figures[name]) for level, figures in sorted(points.items())), strict=True)
            width = 2.4 if engine.startswith("ours") else 1.4
            axis.plot(x, y, color=colour, marker=marker, linewidth=width, markersize=5, label=engine.replace(":", " "))
        axis.set(xscale="log", yscale="log", xlabel="requests at once", title=title, facecolor="#fafafa")
        levels = sorted({level for points in curves.values() for level in points})
        axis.set_xticks(levels, [str(level) for level in levels])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(color="#d4d4d4", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _styles(results: Results) -> dict[str, tuple[str, str]]:
    shown = {name: style for name, style in STYLES.items() if name in results.engines()}
    return shown or FALLBACK


def _curve(results: Results, engine: str) -> dict[int, dict[str, float]]:
    """Figures by concurrency: of the sweep, and over it those that all engines have."""
    points: dict[int, dict[str, float]] = {}
    for record in results.of_kind("growth"):
        if record["study"] == "sweep" and record["engine"] == engine:
            points |= {row["concurrency"]: row for row in record["rows"]}
    for level in (1, 8, 32, 256):
        found = {name: results.median(engine, f"serve_{level}", name) for name, _ in PANELS}
        known = {name: value for name, value in found.items() if value is not None}
        if len(known) == len(PANELS):
            points[level] = known
    return points

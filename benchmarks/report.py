"""RESULTS.md: the tables, the misses, the machine and the commands."""
# ruff: noqa: RUF001 - a dash between bounds, a cross for times

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from benchmarks import plot
from benchmarks.compare import EXACT, GGUF_AGAINST_INT8, QUANTISED, ROWS, figure, is_of_gpu, limits, ratios, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from benchmarks.compare import Comparison, Limit, Ratio, Row
    from benchmarks.records import Results

ABSOLUTE = (
    ("decode tokens/s", "decode", "decode_per_s"),
    ("prefill 512 tokens/s", "prefill_512", "prefill_per_s"),
    ("prefill 2048 tokens/s", "prefill_2048", "prefill_per_s"),
    ("beside a busy process tokens/s", "busy", "decode_per_s"),
    ("start to first token s", "start", "first_token_s"),
    ("memory at start MiB", "start", "memory"),
    ("under load MiB", "serve_32", "peak_memory"),
)
SERVING = (
    ("output tokens/s", "tokens_per_s"),
    ("first token p50 ms", "ttft_p50"),
    ("p99", "ttft_p99"),
    ("inter-token p50 ms", "itl_p50"),
    ("p99", "itl_p99"),
)
LEVELS = {"serve_1": "1", "serve_8": "8", "serve_32": "32", "serve_256": "256", "prefix_8": "8, shared prefix"}
LEVELS |= {f"inprocess_{level}": f"{level}, no HTTP" for level in (1, 8, 32, 256)}
MEASURED = """\
Medians over the repeats, with the lowest and highest in parentheses. Each repeat starts every engine anew, one after
the other; all get the same prompts, others in each repeat; greedy, exactly as many tokens as asked. Serving: 256 tokens
in, 128 out. The shared prefix has 1024 tokens, and 64 of each prompt's own follow. Cold starts find their files in the
page cache. Memory is the sum of Pss over an engine's processes. Of a peer with several setups, the best one counts,
figure by figure. OpenVINO runs in-process: it is flattered by having no HTTP in its way. The load generator shares the
cores with the engines."""
ON_GPU = """\
All engines ran on the GPU; memory is what their processes took beside it. Its limits are measured by loops of reads and
of the matrix instructions that our kernels use; bf16 weights cost three of those, for activations are f32. There are no
targets."""
INTRODUCTION = """\
How many times better ours is, with the target in parentheses and ✗ where it is missed. A GGUF is compared with the same
GGUF; the other columns have ours on the bf16 checkpoint with `--quantization int8 --kv-cache-dtype int8`."""

WHY = "Why, and what it would take: [LOG.md](LOG.md). What number formats cost in quality: [QUALITY.md](QUALITY.md)."


def write(results: Results, folder: Path) -> str:
    """Write RESULTS.md and the plot; returns the main tables."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plot.draw(results, folder / "serving.png")
    comparisons = "\n\n".join(_comparisons(results))
    sections = [
        "# Results",
        MEASURED,
        ON_GPU if is_of_gpu(results) else "",
        comparisons,
        "![Throughput and latency over concurrency](serving.png)" if drawn else "",
        "## Where targets are missed\n\n" + WHY + "\n\n" + _bullets(misses(results)),
        "## What was measured",
        absolute_table(results),
        serving_table(results),
        *_growth(results),
        "## The machine and the versions\n\n" + _bullets(_machine(results)),
        "## Commands\n\n" + _commands(results),
    ]
    text = "\n\n".join(section for section in sections if section)
    (folder / "RESULTS.md").write_text(text + "\n")
    return comparisons


def brief(workload: str, figures: dict[str, Any]) -> str:
    """A line of progress."""
    name = "prefill_per_s" if workload.startswith("prefill") else "tokens_per_s"
    return f"{number(figures[name])} tokens/s, first token {number(figures['ttft_p50'])} ms, {figures['seconds']:.1f} s"


def number(value: float | None) -> str:
    """Three digits that mean something."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio_table(results: Results, comparisons: Sequence[Comparison], *, exact: bool = False, machine: str = "") -> str:
    """Ours ÷ peer in the shape of the targets; `machine` names the engine of the last column, the machine's limits."""
    head = ["work", *(comparison.title for comparison in comparisons), *(["the machine"] if machine else [])]
    rows = []
    for row in rows_of(results):
        cells = [_ratio_cell(results, row, comparison, exact) for comparison in comparisons]
        if machine:
            cells.append("; ".join(map(_limit, limits(results, machine, row))) or "–")
        rows.append([row.title, *cells])
    return table(head, rows)


def _ratio_cell(results: Results, row: Row, comparison: Comparison, exact: bool) -> str:
    found = ratios(results, row, comparison, exact)
    if found is None:
        return "–"
    if row.figures == ("kept",):
        both = [figure(results, name, row.workload, "kept") or 0 for name in (comparison.ours, comparison.peer)]
        return f"{both[0]:.0%} v {both[1]:.0%}"
    cells = [_mark(f"{number(ratio.value)}×", ratio.missed) for ratio in found]
    target = found[0].target
    return ", ".join(cells) + (f" (≥ {number(target)})" if target is not None else "")


def _limit(limit: Limit) -> str:
    show = _percent if limit.what.startswith("of ") else number
    bounds = (("≥", limit.at_least), ("≤", limit.at_most))
    target = "".join(f" ({sign} {show(bound)})" for sign, bound in bounds if bound is not None)
    return f"{_mark(show(limit.value), limit.missed)} {limit.what}{target}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if abs(share) >= 0.1 else f"{share:.1%}"


def _mark(text: str, missed: bool) -> str:
    return f"**{text}** ✗" if missed else text


def _comparisons(results: Results) -> Iterator[str]:
    measured = results.engines()
    yield INTRODUCTION
    ours = [engine for engine in ("ours:int8", *measured) if engine in measured and engine.startswith("ours")]
    yield ratio_table(results, QUANTISED, machine=ours[0] if ours else "")
    if "ours:Q8_0" in measured and {"vllm:int8", "openvino:int8"} & {*measured}:
        yield "Our GGUF Q8_0 against the 8-bit peers:"
        yield ratio_table(results, GGUF_AGAINST_INT8)
    if "ours:bf16" in measured and {"llama.cpp:BF16", "vllm:bf16"} & {*measured}:
        yield (
            "On the bf16 checkpoint, without quantisation (with AMX or AVX512-BF16, activations are rounded to bf16 "
            "for a multiply, as vLLM's are):"
        )
        yield ratio_table(results, EXACT, exact=True)


def misses(results: Results) -> list[str]:
    """A line for each missed target; those where a peer is better come first."""
    found: list[tuple[Ratio, str]] = []
    for comparisons, exact in ((QUANTISED, False), (EXACT, True)):
        for row in ROWS:
            for comparison in comparisons:
                for name, ratio in zip(row.figures, ratios(results, row, comparison, exact) or [], strict=False):
                    if ratio.missed:
                        what = f"{row.workload} {name}, {comparison.ours} against {comparison.peer}"
                        found.append((ratio, f"{what}: {number(ratio.value)}× (target {number(ratio.target)}×)"))
    found.sort(key=lambda pair: pair[0].value >= 1)
    lines = [text + ("; **we lose**" if ratio.value < 1 else "") for ratio, text in found]
    for engine in (name for name in results.engines() if name.startswith("ours")):
        for row in ROWS:
            lines += [f"{row.title}, {engine}: {_limit(it)}" for it in limits(results, engine, row) if it.missed]
    return lines or ["nowhere, among what was measured"]


def absolute_table(results: Results) -> str:
    """One request at a time, start and memory."""
    rows = []
    for engine in results.engines():
        rows.append([engine, *(_absolute(results, engine, workload, name) for _, workload, name in ABSOLUTE)])
    return table(["engine", *(title for title, _, _ in ABSOLUTE)], rows)


def serving_table(results: Results) -> str:
    """Every engine at every level."""
    rows = []
    for workload, level in LEVELS.items():
        for engine in results.engines():
            if results.cell(engine, workload, "tokens_per_s"):
                rows.append([level, engine, *(_absolute(results, engine, workload, name) for _, name in SERVING)])
    return table(["at once", "engine", *(title for title, _ in SERVING)], rows)


def _absolute(results: Results, engine: str, workload: str, name: str) -> str:
    cell = results.cell(engine, workload, name)
    if cell is None:
        return "–"
    note = ", -fa on" if cell.setup.endswith("-fa on") else ""
    return f"{number(cell.median)} ({number(cell.low)}–{number(cell.high)}{note})"


def _growth(results: Results) -> Iterator[str]:
    studied = [record["engine"] for record in results.of_kind("growth")]
    if studied:
        yield f"## How our costs grow\n\nOne run of {studied[-1]}."
    if sweep := results.growth("sweep"):
        rows = [[str(row["concurrency"]), *(number(row[name]) for _, name in SERVING)] for row in sweep]
        yield table(["at once", *(title for title, _ in SERVING)], rows)
    if context := results.growth("context"):
        rows = [[str(row["context"]), number(row["ms_per_token"])] for row in context]
        yield table(["context", "ms per token, alone"], rows)
    if load_times := _load_times(results):
        yield table(["model", "file MB", "weights in memory MB", "loading s", "start to first token s"], load_times)
    if scheduling := [*_scheduling(results)]:
        yield _bullets(scheduling)


def _load_times(results: Results) -> list[list[str]]:
    sizes = {record["engine"]: record.get("model_bytes", 0) for record in results.of_kind("engine")}
    rows = []
    for engine in results.engines():
        if results.cell(engine, "load", "load_seconds"):
            weights = (results.median(engine, "load", "weight_bytes") or 0) / 1e6
            times = [
                _absolute(results, engine, *what) for what in (("load", "load_seconds"), ("start", "first_token_s"))
            ]
            rows.append([engine, number(sizes.get(engine, 0) / 1e6), number(weights), *times])
    return rows


def _scheduling(results: Results) -> Iterator[str]:
    steps = {row["concurrency"]: row["itl_p50"] for row in results.growth("sweep")}
    for row in results.growth("scheduler"):
        share = row["ms_per_step"] / steps.get(row["running"], math.nan)
        of_step = f", {_mark(f'{share:.1%}', share > 0.02)} of a step (≤ 2%)" if math.isfinite(share) else ""
        yield (
            f"Scheduling with {row['running']} running and {row['waiting']} waiting: at most "
            f"{number(row['ms_per_step'])} ms a step{of_step}."
        )


def _machine(results: Results) -> Iterator[str]:
    for record in results.of_kind("machine")[-1:]:
        yield f"{record['date']}, {record['cpu']} ({record['family']}), {', '.join(record['flags'])}"
        yield (
            f"{record['cores']} cores, {record['threads']} threads for each engine, {record['memory_gib']} GiB, Linux "
            f"{record['kernel']}, Python {record['python']}; load average before the run {record['load_average']:.1f}"
        )
        if gpu := record.get("gpu"):
            yield f"GPU: {gpu}"
        if record["peaks"]:
            peaks = {"dot_gmacs": "GMAC/s of int8 dot products", "fma_gmacs": "GMAC/s of f32"}
            peaks |= {"bf16_gmacs": "GMAC/s of bf16", "read_gbs": "GB/s read"}
            yield "limits, measured: " + ", ".join(
                f"{number(record['peaks'][name])} {what}" for name, what in peaks.items() if name in record["peaks"]
            )
        shares = [results.median(engine, "serve_32", "client_share") or 0 for engine in results.engines()]
        yield f"the load generator took up to {max(shares, default=0):.0%} of one core with 32 at once"
        if record["forced_isa"]:
            yield f"instruction set forced to {record['forced_isa']}"
        if record["quick"]:
            yield "**a quick run: few and short requests, no figures to quote**"
    for engine in _engines(results):
        state = f"not measured, {short(engine['missing'])}" if engine["missing"] else engine["version"]
        yield f"{engine['engine']}: {state}"
    for record in results.of_kind("failure"):
        where = " ".join(str(record[name]) for name in ("engine", "setup", "workload", "repeat") if record.get(name))
        yield f"failed: {where}: {short(record['why'])}"


def _engines(results: Results) -> list[dict[str, Any]]:
    """Their last descriptions: a resumed run has several."""
    return list({record["engine"]: record for record in results.of_kind("engine")}.values())


def _commands(results: Results) -> str:
    lines = [short(record["command"]) for record in results.of_kind("machine")]
    for engine in _engines(results):
        if not engine["missing"]:
            lines += [
                short(f"{command}  # {engine['engine']} {name}".rstrip())
                for name, command in engine["commands"].items()
            ]
    return "```bash\n" + "\n".join(lines) + "\n```"


def short(text: str) -> str:
    """Without the folders of absolute paths, which are of this machine alone."""
    return re.sub(r"(?<![\w/])/(?:[\w.@+-]+/)+", "", text)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)

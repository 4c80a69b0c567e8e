"""What number formats cost in quality: ours, and llama.cpp on the same file.

    LLAMA_LIBRARY=.../libllama.so python -m benchmarks.quality MODEL... [--round int8,int4] [--tokens 8192]

A MODEL is a GGUF file or a checkpoint folder. Each is compared with *its own* f32 model, that is, its weights
de-quantised to f32, everything computed and cached in f32: what is measured is an engine's arithmetic, and for a float
model also the rounding of weights that --round asks for, but not what the file's maker has lost. The reference is our
exact mode; how far llama.cpp is from it on an F32 file, computing and caching in f32, shows whether it can be one.

The text is fixed, in two halves of equal length. text/prose.txt is ours: paragraphs of many kinds and this project's
documents as they once were. text/sampled.txt is SmolLM2-135M-Instruct's own (--sample makes it): drawn from its f32
model at temperature 1, so it stands for what an engine sees while it generates, but is too easy for that model alone;
hence a figure for each half. Windows of 1024 tokens start anew. The divergence is Kullback-Leibler's from the f32
model, of the next token's distribution, in nats: sum p (log p - log q).

Needs the test modules (`make test` builds them). Without LLAMA_LIBRARY llama.cpp is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from benchmarks.llama_logits import LlamaCpp, Setting
from langchain_vllm_server import _engine, _model_test
from langchain_vllm_server.checkpoint import Checkpoint, load_checkpoint
from langchain_vllm_server.engine_config import to_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

THREADS = len(os.sched_getaffinity(0))
WINDOW = 1024  # tokens of one text
STEP = 256  # tokens of one forward
BLOCK = 16  # tokens of a block of the KV cache
PLAIN = {"F32", "F16", "BF16", "float32", "float16", "bfloat16"}
TEXTS = Path(__file__).with_name("text")

PROMPTS = """The history of the region begins
Explain how a heat pump works.
Chapter 1. It was late in the evening when
def parse_date(text: str) -> date:
The following article describes
Dear colleagues,
Write a short story about a fox and a clockmaker.
In mathematics, a group is
Q: Why do leaves change colour in autumn? A:
The recipe serves four. Ingredients:
According to a study published last year,
Le chat regarde par la fenêtre
SELECT name, population FROM cities
What are three ways to save water at home?
The treaty was signed in
Breaking news:"""


class Engine(Protocol):
    """Something that computes logits."""

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Of every token of a text: (tokens, vocabulary)."""
        ...


class Ours:
    """Our forward on a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, *, weights: str = "", cache: str = "F16", exact: bool = False) -> None:
        config, tensors = to_engine(checkpoint)
        self._blocks = list(range(-(-WINDOW // BLOCK)))
        self._model = _model_test.Model(config, tensors, weights, cache, THREADS, len(self._blocks), STEP, exact)

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        rows = []
        for start in range(0, len(tokens), STEP):
            part = tokens[start : start + STEP]
            blocks = self._blocks[: -(-(start + len(part)) // BLOCK)]
            rows.append(self._model.forward([_model_test.Run(part, start, blocks)]))
        return np.concatenate(rows)


@dataclasses.dataclass
class Row:
    """One line of the table: an engine and how far it was from the reference at every token."""

    name: str
    engine: Engine
    divergence: list[float] = dataclasses.field(default_factory=list)
    same: list[bool] = dataclasses.field(default_factory=list)

    def add(self, expected: NDArray[np.float64], p: NDArray[np.float64], logits: NDArray[np.float32]) -> None:
        """Takes in some tokens: the reference's log-probabilities and probabilities, and this engine's logits."""
        q = log_softmax(logits)
        self.same += (expected.argmax(axis=1) == q.argmax(axis=1)).tolist()
        np.subtract(expected, q, out=q)
        self.divergence += np.einsum("ij,ij->i", p, q).tolist()

    def cells(self) -> list[str]:
        values = np.array(self.divergence)
        error = values.std() / len(values) ** 0.5
        halves = [short(half.mean()) for half in np.split(values, 2)]
        quantile = f"{np.quantile(values, 0.99):.4f}"
        mean = f"{short(values.mean())} ± {short(error)}"
        return [self.name, mean, *halves, quantile, f"{100 * np.mean(self.same):.2f} %"]


def short(value: float) -> str:
    return f"{value:.5f}" if value > 1e-5 else f"{value:.0e}"


HEADER = ["model", "computed by", "mean KL ± standard error", "prose", "sampled", "p99 KL", "same first choice"]


def measure(window: list[int], reference: Engine, rows: list[Row]) -> None:
    """Adds a window of text to every row."""
    expected, logits = reference.logits(window), [row.engine.logits(window) for row in rows]
    for start in range(0, len(window), STEP):
        part = slice(start, start + STEP)
        log_p = log_softmax(expected[part])
        p = np.exp(log_p)
        for row, own in zip(rows, logits, strict=True):
            row.add(log_p, p, own[part])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


def windows(checkpoint: Checkpoint, tokens: int) -> list[list[int]]:
    """The text, in equal parts of each file."""
    found = []
    for name in ("prose.txt", "sampled.txt"):
        ids = checkpoint.tokenizer.encode((TEXTS / name).read_text(encoding="utf-8"), add_special_tokens=False)
        if len(ids) < tokens // 2:
            raise SystemExit(f"{name} has {len(ids)} tokens of this model, fewer than half of --tokens {tokens}")
        found += [ids[start : min(start + WINDOW, tokens // 2)] for start in range(0, tokens // 2, WINDOW)]
    return found


def engines(path: Path, checkpoint: Checkpoint, rounded: list[str]) -> Iterator[Row]:
    """What is compared on one model."""
    yield Row("ours", Ours(checkpoint))
    if checkpoint.dtype in PLAIN:  # what the cache costs has nothing to do with the weights: once is enough
        for cache in ("BF16", "INT8"):
            yield Row(f"ours, KV cache in {cache.lower()}", Ours(checkpoint, cache=cache))
        for name in rounded:
            yield Row(f"ours, `--quantization {name}`", Ours(checkpoint, weights=name.upper()))
    library = os.environ.get("LLAMA_LIBRARY")
    if library and path.is_file():
        for flash in (False, True):
            name = "llama.cpp, flash attention" if flash else "llama.cpp"
            yield Row(name, LlamaCpp(library, path, Setting(THREADS, WINDOW, flash)))
        if checkpoint.dtype == "F32":
            yield Row("llama.cpp, KV cache in f32", LlamaCpp(library, path, Setting(THREADS, WINDOW, kv="f32")))


def compare(path: Path, rounded: list[str], tokens: int) -> Iterator[list[str]]:
    """The table's lines for one model."""
    checkpoint = load_checkpoint(path)
    reference = Ours(checkpoint, weights="F32", cache="F32", exact=True)
    rows = list(engines(path, checkpoint, rounded))
    for i, window in enumerate(windows(checkpoint, tokens)):
        print(f"{path.name}: window {i}", file=sys.stderr)
        measure(window, reference, rows)
    for row in rows:
        yield [path.name.removesuffix(".gguf"), *row.cells()]
        if isinstance(row.engine, LlamaCpp):
            row.engine.close()


def sample(path: Path) -> str:
    """Answers to the prompts, drawn from the f32 model, each with a seed of its own."""
    checkpoint = load_checkpoint(path)
    options, params = _engine.EngineOptions(), _engine.SamplingParams()
    options.max_position, options.max_model_len = checkpoint.max_position, 512
    options.exact, options.kv_format, options.weight_format = True, "F32", "F32"
    engine = _engine.Engine(*to_engine(checkpoint), options, _engine.Loading())
    params.temperature, params.min_tokens, params.max_tokens = 1.0, 288, 288
    texts = {i: checkpoint.tokenizer.encode(prompt) for i, prompt in enumerate(PROMPTS.splitlines())}
    for i, ids in list(texts.items()):
        params.seed = i + 1
        engine.submit(i, ids, params)
    running = set(texts)
    while running:
        select.select([engine.fileno()], [], [])
        for event in engine.drain():
            texts[event.request_id] += event.tokens
            running -= {event.request_id} if event.finish else set()
    engine.stop()
    return "\n\n".join(checkpoint.tokenizer.decode(ids) for ids in texts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--round", default="int8,int4", help="--quantization values to try on float models")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sample", action="store_true", help="print a new sampled.txt instead, from the first MODEL")
    args = parser.parse_args()
    if args.sample:
        print(sample(args.models[0]))
        return
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for path in args.models:
        for cells in compare(path, [name for name in args.round.split(",") if name], args.tokens):
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

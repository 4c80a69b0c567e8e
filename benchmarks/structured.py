"""What constraints cost: free text, the same text under a grammar that allows anything, and JSON, side by side.

`python -m benchmarks.structured [--rounds 5] [--model MODEL]`. The kinds take turns, so that whatever else the machine
does hits all of them; the ratio inside a line is what counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from langchain_vllm import VLLMServer

TEXT = {"type": "string", "maxLength": 80}
PRODUCT = {"name": TEXT, "description": TEXT, "price": {"type": "number"}, "in_stock": {"type": "boolean"}}
SCHEMA = {
    "type": "array",
    "minItems": 20,
    "items": {"type": "object", "properties": PRODUCT, "required": list(PRODUCT), "additionalProperties": False},
}
KINDS: dict[str, dict[str, Any]] = {
    "free text": {},
    "any text": {"structured_outputs": {"regex": r"(.|\n)*"}},
    "JSON": {"structured_outputs": {"json": SCHEMA}},
}
ASK = {
    "messages": [{"role": "user", "content": "List twenty products of a garden shop, with a description of each."}],
    "temperature": 0,
    "max_tokens": 256,
    "ignore_eos": True,
}


def speed(client: httpx.Client, kind: str, concurrency: int) -> float:
    """Tokens per second of as many requests at once."""

    def ask(number: int) -> int:
        answer = client.post("/chat/completions", json={**ASK, **KINDS[kind], "user": str(number)}).json()
        tokens: int = answer["usage"]["completion_tokens"]
        return tokens

    begin = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        tokens = sum(pool.map(ask, range(concurrency)))
    return tokens / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    args = parser.parse_args()
    with VLLMServer(args.model) as server, httpx.Client(base_url=server.base_url, timeout=600) as client:
        for kind in KINDS:
            speed(client, kind, 1)  # compiles the grammar
        for concurrency in (1, 8):
            rounds = [{kind: speed(client, kind, concurrency) for kind in KINDS} for _ in range(args.rounds)]
            free = [one["free text"] for one in rounds]
            for kind in KINDS:
                rates = [one[kind] for one in rounds]
                ratio = statistics.median(rate / other for rate, other in zip(rates, free, strict=True))
                rate = statistics.median(rates)
                print(f"{concurrency} at once  {kind:10}{rate:8.0f} tokens/s  {ratio:.2f} of free text")


if __name__ == "__main__":
    main()

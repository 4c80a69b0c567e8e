"""What is asked of every engine."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workload:
    """A load of equal requests.

    Attributes:
        concurrency: Requests in flight.
        count: Requests in all.
        prompt_tokens: Of each prompt, without the common prefix.
        max_tokens: Of each answer, exactly.
        prefix: Tokens with which all prompts begin.
        beside_busy: While another process never waits.
    """

    name: str
    concurrency: int
    count: int
    prompt_tokens: int
    max_tokens: int
    prefix: int = 0
    beside_busy: bool = False

    def quick(self) -> Workload:
        """The same with as few requests as show that it works."""
        return replace(self, count=min(self.count, self.concurrency), max_tokens=min(self.max_tokens, 16))


def serving(concurrency: int, count: int, where: str = "serve") -> Workload:
    """Prompts of 256 tokens, answers of 128."""
    return Workload(f"{where}_{concurrency}", concurrency, count, 256, 128)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("decode", 1, 3, 128, 128),
        Workload("prefill_512", 1, 4, 512, 1),
        Workload("prefill_2048", 1, 2, 2048, 1),
        serving(1, 3),
        serving(8, 16),
        serving(32, 48),
        serving(256, 512),
        Workload("prefix_8", 8, 16, 64, 128, prefix=1024),
        Workload("busy", 1, 3, 128, 128, beside_busy=True),
        *(serving(c, n, "inprocess") for c, n in ((1, 3), (8, 16), (32, 48), (256, 512))),
    )
}
WARM_UP = Workload("warm_up", 8, 8, 64, 8)

# What is measured on a device: one request at a time; many; the same load by token ids.
ALONE = {
    "cpu": ("decode", "prefill_512", "prefill_2048", "serve_1", "busy"),
    "cuda": ("decode", "prefill_512", "prefill_2048", "serve_1"),
}
SERVING = {"cpu": ("serve_8", "serve_32", "prefix_8"), "cuda": ("serve_32", "serve_256")}
WITHOUT_HTTP = {
    "cpu": ("inprocess_1", "inprocess_8", "inprocess_32"),
    "cuda": ("inprocess_1", "inprocess_32", "inprocess_256"),
}

"""Prometheus' text format: https://prometheus.io/docs/instrumenting/exposition_formats/.

It is small enough to write by hand, and importing prometheus_client takes as long as importing the rest of the server.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def header(name: str, kind: str, text: str) -> tuple[str, str]:
    """What stands above the samples of one metric."""
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def labels(values: Mapping[str, object]) -> str:
    """Labels as they stand between the braces."""
    return ",".join(f'{name}="{_escaped(str(value))}"' for name, value in values.items())


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Histogram:
    """Counts of observations up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    @classmethod
    def of_powers(cls, bounds: Sequence[int], counts: Sequence[int], total: float) -> Histogram:
        """One of whole numbers counted elsewhere: counts[k] are above 2^(k-1) and at most 2^k. So are the bounds."""
        histogram = cls(bounds)
        histogram._sum = float(total)
        for power, count in enumerate(counts):
            histogram._counts[bisect_left(bounds, 2**power)] += count
        return histogram

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """The samples."""
        total = 0
        for bound, count in zip((*map(float, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"{labels and ","}{labels}}} {float(total)}'
        braced = labels and f"{{{labels}}}"
        yield f"{name}_count{braced} {float(total)}"
        yield f"{name}_sum{braced} {self._sum}"

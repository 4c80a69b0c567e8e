"""What was measured: a file of JSON lines, each written as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LOWER_IS_BETTER = ("ttft_", "itl_", "first_token_s", "memory", "peak_memory", "load_seconds")


class Journal:
    """The file, and what is in it. Begins with what an earlier run left there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read(path) if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # a line that was cut short stays alone
            with path.open("a") as file:
                file.write("\n")

    def add(self, kind: str, **fields: Any) -> None:
        record = {"kind": kind, **fields}
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def has(self, kind: str, **fields: Any) -> bool:
        wanted = {"kind": kind, **fields}
        return any(all(record.get(k) == v for k, v in wanted.items()) for record in self.records)


def read(path: Path) -> list[dict[str, Any]]:
    """The records, without lines that were cut short where a run was interrupted."""
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


@dataclass(frozen=True)
class Cell:
    """A figure over the repeats."""

    median: float
    low: float
    high: float
    setup: str = ""  # in which it was measured

    @classmethod
    def of(cls, values: list[float], setup: str = "") -> Cell:
        return cls(statistics.median(values), min(values), max(values), setup)


class Results:
    """The figures of all measurements, by engine, workload and name."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.records = list(records)
        self._values: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in self.of_kind("measurement"):
            for name, value in record["figures"].items():
                if isinstance(value, int | float):
                    key = record["engine"], record["workload"], name
                    self._values[key][record["setup"]].append(value)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def growth(self, study: str, engine: str = "") -> list[dict[str, Any]]:
        """The rows of a study (of any engine for an empty name)."""
        records = [r for r in self.of_kind("growth") if r["study"] == study and engine in ("", r["engine"])]
        return list(records[-1]["rows"]) if records else []

    def engines(self) -> list[str]:
        """Those with measurements, in the order of their first."""
        return list(dict.fromkeys(engine for engine, _, _ in self._values))

    def cell(self, engine: str, workload: str, figure: str, setup: str | None = None) -> Cell | None:
        """The figure in the setup where the engine does best, or in the named one."""
        by_setup = self._values.get((engine, workload, figure), {})
        cells = [Cell.of(values, name) for name, values in by_setup.items() if setup in (None, name)]
        if not cells:
            return None
        best = min if figure.startswith(LOWER_IS_BETTER) else max
        return best(cells, key=lambda cell: cell.median)

    def median(self, engine: str, workload: str, figure: str) -> float | None:
        cell = self.cell(engine, workload, figure)
        return None if cell is None else cell.median

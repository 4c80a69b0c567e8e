"""The engine's load in a header of answers, for load balancers that ask for it (ORCA), as vLLM tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from langchain_vllm_server.errors import BadRequestError

if TYPE_CHECKING:
    from starlette.datastructures import Headers

    from langchain_vllm_server._engine import Stats

ASKED = "endpoint-load-metrics-format"
TOLD = "endpoint-load-metrics"


def load_report(headers: Headers, stats: Stats) -> dict[str, str]:
    """The header with the load, if the request's headers ask for it.

    Raises:
        BadRequestError: The format is neither TEXT nor JSON.
    """
    wanted = headers.get(ASKED, "").upper()
    if not wanted:
        return {}
    used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
    load = {"kv_cache_usage_perc": used, "num_requests_waiting": float(stats.num_waiting)}
    if wanted == "TEXT":
        return {TOLD: "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in load.items())}
    if wanted == "JSON":
        return {TOLD: "JSON " + msgspec.json.encode({"named_metrics": load}).decode()}
    raise BadRequestError(f"{ASKED} must be TEXT or JSON, got {wanted[:20]!r}.", ASKED)

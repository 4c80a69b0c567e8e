"""Tool calls in the text of an answer: each family's spelling as data."""

from __future__ import annotations

from langchain_vllm_server.tool_parsers.formats import BY_NAME, GENERIC, ToolFormat, of_template

__all__ = ["BY_NAME", "GENERIC", "ToolFormat", "of_template"]

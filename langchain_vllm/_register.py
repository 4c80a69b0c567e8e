"""`init_chat_model("vllm:…")`, by request: LangChain knows a fixed list of providers, and packages cannot join it."""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Make `init_chat_model("vllm:MODEL")`, and so `create_agent(model="vllm:MODEL")`, mean `ChatVLLM`.

    It adds to LangChain's private list of providers, which no public function does.

    Raises:
        ImportError: `langchain` is not installed.
        RuntimeError: This version of it keeps its providers elsewhere.
    """
    base = import_module("langchain.chat_models.base")
    providers = getattr(base, "_BUILTIN_PROVIDERS", None)
    if not isinstance(providers, dict) or not isinstance(providers.get("openai"), tuple):
        raise RuntimeError("This version of langchain keeps its providers elsewhere: construct ChatVLLM(…) yourself.")
    _, _, *create = providers["openai"]
    providers["vllm"] = ("langchain_vllm", "ChatVLLM", *create)

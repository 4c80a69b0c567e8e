"""LangChain chat models served by vLLM, with a managed local server and its own CPU engine.

The names below are imported when first used: the command line and the server start without LangChain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from langchain_vllm._register import register
    from langchain_vllm.chat_models import ChatVLLM
    from langchain_vllm.embeddings import VLLMEmbeddings
    from langchain_vllm.launcher import VLLMServer
    from langchain_vllm.llms import VLLM
    from langchain_vllm.rerank import VLLMRerank

    __version__: str

__all__ = ["VLLM", "ChatVLLM", "VLLMEmbeddings", "VLLMRerank", "VLLMServer", "__version__", "register"]

_HOMES = {
    "ChatVLLM": "langchain_vllm.chat_models",
    "VLLM": "langchain_vllm.llms",
    "VLLMEmbeddings": "langchain_vllm.embeddings",
    "VLLMRerank": "langchain_vllm.rerank",
    "VLLMServer": "langchain_vllm.launcher",
    "register": "langchain_vllm._register",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: object = version("langchain-vllm")
        except PackageNotFoundError:  # a source tree that is not installed
            value = "0+source"
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

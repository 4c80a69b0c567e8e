"""`init_chat_model("vllm:…")` and `init_embeddings("vllm:…")`, by request.

LangChain knows a fixed list of providers, and packages cannot join it.
"""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Make `init_chat_model("vllm:MODEL")` mean `ChatVLLM`, and `init_embeddings("vllm:MODEL")` `VLLMEmbeddings`.

    `create_agent(model="vllm:MODEL")` then works as well. It adds to LangChain's private lists of providers, which no
    public function does.

    Raises:
        ImportError: `langchain` is not installed.
        RuntimeError: This version of it keeps its providers elsewhere.
    """
    for module, name in (("langchain.chat_models.base", "ChatVLLM"), ("langchain.embeddings.base", "VLLMEmbeddings")):
        providers = getattr(import_module(module), "_BUILTIN_PROVIDERS", None)
        if not isinstance(providers, dict) or not isinstance(providers.get("openai"), tuple):
            raise RuntimeError(f"This version of langchain keeps its providers elsewhere: construct {name} yourself.")
        _, _, *create = providers["openai"]
        providers["vllm"] = ("langchain_vllm", name, *create)

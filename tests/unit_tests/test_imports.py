"""The package is light until it is used, and exports what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import langchain_vllm

HEAVY = {
    "langchain_core",
    "langchain_openai",
    "openai",
    "httpx",
    "httpx2",
    "pydantic",
    "starlette",
    "langchain_vllm_server",
}


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_all_can_be_imported() -> None:
    names = ["ChatVLLM", "VLLM", "VLLMEmbeddings", "VLLMRerank", "VLLMServer", "__version__", "register"]
    assert sorted(langchain_vllm.__all__) == names
    for name in langchain_vllm.__all__:
        assert getattr(langchain_vllm, name)
        assert name in dir(langchain_vllm)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ChatWLLM'"):
        langchain_vllm.ChatWLLM  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import langchain_vllm", "from langchain_vllm import VLLMServer", "import langchain_vllm.cli"]
)
def test_imports_are_light(statement: str) -> None:
    assert not modules_after(statement) & HEAVY


def test_the_client_never_imports_the_server() -> None:
    assert "langchain_vllm_server" not in modules_after("from langchain_vllm import ChatVLLM")


def test_types_are_published() -> None:
    assert (Path(langchain_vllm.__file__).parent / "py.typed").exists()

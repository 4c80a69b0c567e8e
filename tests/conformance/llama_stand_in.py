"""`llama-server …` of llama.cpp's tests: our server, with SmolLM2 in the place of their model."""

from __future__ import annotations

import os
import sys

_SAME = {
    "--host": "--host",
    "--port": "--port",
    "--seed": "--seed",
    "--api-key": "--api-key",
    "--ctx-size": "--max-model-len",
    "--parallel": "--max-num-seqs",
    "--chat-template-file": "--chat-template",
}
# llama.cpp does not look at the name that a request gives.
_NAMES = ("gpt-3.5-turbo", "gpt-3.5-turbo-instruct", "davinci-002", "text-embedding-3-small", "codellama70b", "test")


def command(arguments: list[str]) -> list[str]:
    """Our options for theirs; those that speak of their engine are left out."""
    pairs = list(zip(arguments, [*arguments[1:], ""], strict=True))
    ours = [word for name, value in pairs if name in _SAME for word in (_SAME[name], value)]
    alias = next((value for name, value in pairs if name == "--alias"), "smollm2")
    return [*ours, "--served-model-name", alias, *_NAMES, "--memory", "1GiB"]


if __name__ == "__main__":
    options = ["SmolLM2-135M-Instruct", *command(sys.argv[1:])]
    os.execv(sys.executable, [sys.executable, "-m", "langchain_vllm_server", *options])

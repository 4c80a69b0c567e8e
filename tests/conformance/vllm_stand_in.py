"""`vllm serve MODEL …` of vLLM's tests: our server, with SmolLM2 in the place of whatever model they name.

Their names for it stay valid (--served-model-name). Left out of the command line: what describes the other model
(tokenizer, dtype, formats, a context longer than SmolLM2's) and LoRA adapters.
"""

from __future__ import annotations

import os
import sys

_ABOUT_THE_MODEL = frozenset(
    {"--tokenizer", "--tokenizer-mode", "--dtype", "--load-format", "--config-format", "--runner", "--model-impl"}
    | {"--lora-modules", "--max-lora-rank", "--max-loras", "--max-cpu-loras", "--speculative-config"}
)
_SWITCHES = frozenset({"--enable-lora"})
_MAX_MODEL_LEN = 8192


def command(arguments: list[str]) -> list[str]:
    """Our command line for theirs, which begins with `serve`."""
    model, rest = arguments[1], arguments[2:]
    if model == "--model":
        model, rest = rest[0], rest[1:]
    kept: list[str] = []
    skipping = False
    for word in rest:
        if word.startswith("--"):
            name = word.partition("=")[0].replace("_", "-")
            skipping = name in _ABOUT_THE_MODEL
            if skipping or name in _SWITCHES:
                continue
        if skipping:
            continue
        before = kept[-1] if kept else ""
        kept.append(str(min(int(word), _MAX_MODEL_LEN)) if before == "--max-model-len" else word)
    names = [] if "--served-model-name" in kept else ["--served-model-name", model]
    return ["serve", "SmolLM2-135M-Instruct", *kept, *names, "--memory", "2GiB"]


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "langchain_vllm_server", *command(sys.argv[1:])[1:]])

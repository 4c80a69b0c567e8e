"""`python -m tests.server.serve_fake ARGS`: the server process with a scripted engine in the place of the real one.

The model's name is the script: "load=0.5,step=0.01,length=100" or "error=no such model". With "die=0.1" the engine dies
so many seconds after a request.
"""

from __future__ import annotations

import asyncio
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.__main__ import main
from langchain_vllm_server.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_vllm_server.gate import Progress
    from langchain_vllm_server.settings import Settings


def load(settings: Settings, progress: Progress) -> Any:
    from langchain_vllm_server.served_model import ServedModel
    from tests.server.fakes import FakeEngine, byte_tokenizer, spell

    script = dict(part.split("=") for part in settings.model.split(","))
    if "error" in script:
        raise CheckpointError(script["error"])
    progress.enter("loading weights")
    time.sleep(float(script.get("load", 0)))
    tokenizer = byte_tokenizer()
    say = spell("x" * int(script.get("length", 5)), end=False)

    def say_and_die(prompt: Sequence[int], params: Any) -> Sequence[int]:
        asyncio.get_running_loop().call_later(float(script["die"]), engine.die, "cosmic ray")
        return say(prompt, params)

    engine = FakeEngine(say_and_die if "die" in script else say, float(script.get("step", 0)))
    model = ServedModel(
        names=("tiny",),
        root="tiny",
        version="1.2.3",
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        max_model_len=4096,
    )
    return SimpleNamespace(engine=engine, model=model)


if __name__ == "__main__":
    for name, content in (("load", {"load": load}), ("_engine", {"SamplingParams": SimpleNamespace})):
        module = ModuleType(f"langchain_vllm_server.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module
    sys.exit(main(sys.argv[1:]))

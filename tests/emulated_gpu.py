"""The server with the engine on an emulated GPU, and a model small enough for it.

`python -m tests.emulated_gpu ARGS` is the server's command line. SIGUSR1 takes its GPU away; and no server that starts
finds one as long as the file EMULATED_GPU_GONE is there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from langchain_vllm_server import _engine, _model_test
from langchain_vllm_server.__main__ import main

if TYPE_CHECKING:
    from collections.abc import Iterator

GONE = "EMULATED_GPU_GONE"
emulated = pytest.mark.skipif(not _model_test.cuda_is_emulated, reason="CUDA is not emulated, it runs on a GPU")


@contextmanager
def machine(**properties: Any) -> Iterator[None]:
    """A machine that is otherwise, see csrc/cuda_on_cpu/machine.h."""
    _model_test.set_cuda_machine(**properties)
    try:
        yield
    finally:
        _model_test.set_cuda_machine()


def make_model(folder: Path, **experts: Any) -> Path:
    """A tiny random Llama whose tokens are bytes, or a Mixtral with these knobs."""
    from tests.parity.test_tiny_models import make_llama, make_mixtral
    from tests.server.fakes import EOS, byte_backend

    backend = byte_backend()
    make = make_mixtral if experts else make_llama
    make(folder, vocab_size=backend.get_vocab_size(), **experts)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return folder


if __name__ == "__main__":
    hidden, _engine.Engine = _engine.Engine, _model_test.Engine  # a type that nobody names any more is forgotten
    _engine.cuda_problem = _model_test.cuda_problem
    _model_test.set_cuda_machine(devices=0 if Path(os.environ[GONE]).exists() else 1)
    signal.signal(signal.SIGUSR1, lambda *_: _model_test.set_cuda_machine(lost=True))
    sys.exit(main(sys.argv[1:]))

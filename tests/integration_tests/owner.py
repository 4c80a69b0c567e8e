"""A program that owns servers of the fake kind; the tests kill it. `owner.py WHAT MODEL`, see `main`."""

from __future__ import annotations

import os
import sys
import time

from langchain_vllm import VLLMServer
from tests.integration_tests.fakes import use_fake_server


def main(what: str, model: str) -> None:
    use_fake_server()
    server = VLLMServer(model)
    server.start()
    print(server.pid, flush=True)
    if what == "exit":  # without stop()
        return
    if what == "fork" and (child := os.fork()):
        print(child, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A program that owns a server of the fake kind; the tests kill it. `owner.py WHAT MODEL`, see `main`."""

from __future__ import annotations

import os
import sys
import time

from langchain_vllm import VLLMServer
from tests.integration_tests.fakes import use_fake_server


def main(what: str, model: str) -> None:
    if what == "vllm":
        server = VLLMServer(model, engine="vllm")
    else:
        use_fake_server()
        server = VLLMServer(model, shared=what != "alone")
    server.start()
    print(server.pid, flush=True)
    if what == "exit":  # without stop()
        return
    if what in ("fork", "fork-and-start") and (child := os.fork()):
        print(child, flush=True)
    elif what == "fork-and-start":
        server.start()
        print("started", flush=True)
    for line in sys.stdin:
        if line == "start\n":
            server.start()
            print(server.pid, flush=True)
        elif line == "stop\n":
            server.stop()
            print("stopped", flush=True)
        elif line == "exit\n":
            return
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])

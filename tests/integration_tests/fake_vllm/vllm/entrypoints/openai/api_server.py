"""Stands for vLLM: knows of no launcher, takes a while to listen, and has a worker that does not end by itself."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from http.server import ThreadingHTTPServer

from tests.integration_tests.fake_server import handler

WORKER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def main() -> None:
    print("fake vllm:", *sys.argv[1:], flush=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    args, _ = parser.parse_known_args()
    worker = subprocess.Popen([sys.executable, "-c", WORKER, __file__], start_new_session=True)
    print("worker", worker.pid, flush=True)
    if args.model == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.model == "crash":
        sys.exit("ValueError: no such model")
    for _ in range(10):
        time.sleep(0.25 if args.model == "slow" else 0.02)
        print("loading", flush=True)
    server = ThreadingHTTPServer((args.host, args.port), handler("good"))
    print("server", os.getpid(), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

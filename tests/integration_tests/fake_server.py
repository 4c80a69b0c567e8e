"""A server that keeps the launcher's contract and has no model: real process, real pipes, real HTTP.

The model's name says how it behaves: `good`, `slow` (half a second of loading), `steady` (three seconds), `crash` (at
start), `crash-loading`, `mute` (never greets), `stuck` (loading for ever), `deaf` (does not end when told to), `die`
(at a request), `drop` (the connection, at a request).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from langchain_vllm_server.owners import Owners


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--owners-fd", type=int)
    args, _ = parser.parse_known_args()
    if args.model == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("fake server:", *sys.argv[1:], flush=True)
    if args.model == "crash":
        sys.exit("CheckpointError: no such model")
    if args.model == "mute":
        time.sleep(600)
    server = ThreadingHTTPServer((args.host, args.port), handler(args.model))
    about = {"url": f"http://{args.host}:{server.server_port}", "pid": os.getpid()}
    about |= {"model": args.model, "engine": "bundled", "started": time.time()}
    threading.Thread(target=asyncio.run, args=(watch_owners(args.owners_fd, about),), daemon=True).start()
    if args.model == "crash-loading":
        threading.Timer(0.2, lambda: print("out of memory", flush=True) or os._exit(3)).start()
    server.serve_forever()


async def watch_owners(fd: int, about: dict[str, object]) -> None:
    owners = Owners(fd, about, stop=lambda: os._exit(0), abandon=lambda: os._exit(0))
    if about["model"] == "deaf":
        owners._take_leave = lambda owner, seconds: None  # type: ignore[method-assign]
    await asyncio.Event().wait()


def handler(model: str) -> type[BaseHTTPRequestHandler]:
    begin = time.monotonic()
    duration = {"slow": 0.5, "steady": 3.0, "crash-loading": 600.0, "stuck": 600.0}.get(model, 0.0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            done = (time.monotonic() - begin) / duration if duration else 1.0
            if self.path == "/v1/models":
                self.answer(200, {"object": "list", "data": [{"id": model, "object": "model"}]})
            elif done >= 1.0:
                self.answer(200, None)
            else:
                progress = 0.0 if model == "stuck" else int(done * 5) / 5
                self.answer(503, {"status": "loading", "phase": "weights", "progress": progress})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            print("a request", flush=True)
            if model == "drop":
                self.close_connection = True
                return
            if model == "die":
                if request.get("stream"):
                    self.begin_stream()
                print("segmentation fault", flush=True)
                os._exit(11)
            message = {"role": "assistant", "content": f"{os.getpid()} {request['messages'][-1]['content']}"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(200, {"id": "1", "object": "chat.completion", "model": model, "choices": [choice]})

        def begin_stream(self) -> None:
            chunk = {"id": "1", "object": "chat.completion.chunk", "model": model, "created": 1}
            choice = {"index": 0, "delta": {"role": "assistant", "content": "Once"}, "finish_reason": None}
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            event = b"data: " + json.dumps({**chunk, "choices": [choice]}).encode() + b"\n\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

        def answer(self, status: int, body: dict[str, Any] | None) -> None:
            content = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    main()

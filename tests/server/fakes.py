"""A scripted engine behind the real application, tokenizer and template."""

from __future__ import annotations

import asyncio
import ctypes
import os
import queue
import random
import time
from collections import deque
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from langchain_vllm_server.app import create_app
from langchain_vllm_server.async_engine import AsyncEngine, QueueLimits
from langchain_vllm_server.chat_template import ChatTemplate
from langchain_vllm_server.generation import Service
from langchain_vllm_server.metrics import Metrics
from langchain_vllm_server.middleware import ApiKeys, BodyLimits
from langchain_vllm_server.served_model import ServedModel
from langchain_vllm_server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

MAX_BODY_BYTES = 4_000_000
UNLIMITED = QueueLimits()
EOS = "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_backend() -> tokenizers.Tokenizer:
    """One token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", EOS])
    return backend


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(byte_backend(), {"eos_token": EOS})


LETTERS = byte_tokenizer().encode("abcdefgh")


def logprobs_of(token: int, count: int) -> list[tuple[int, float, int]]:
    """The token and, as the most likely ones, itself and those that follow it in the vocabulary."""
    others = [(token + 1 + i, -1.5 - i, 2 + i) for i in range(count - 1)]
    return [(token, -0.5, 1), *([(token, -0.5, 1), *others] if count else [])]


def vector_of(tokens: Sequence[int]) -> list[float]:
    """How often each of the first letters stands in a text: texts with the same letters are near to each other."""
    return [float(list(tokens).count(token)) for token in LETTERS]


class FakeEngine:
    """Answers with a script, a token a step, for all its requests at the same time. See _engine.pyi.

    Args:
        script: Prompt and parameters to the tokens of the answer; the engine's own limits then apply.
        step_seconds: How long a step takes.
    """

    def __init__(self, script: Callable[[Sequence[int], Any], Sequence[int]], step_seconds: float = 0.0) -> None:
        self.script = script
        self.step_seconds = step_seconds
        self.submitted: list[SimpleNamespace] = []
        self.cancelled: list[int] = []
        self.forgotten = 0
        self.finish_reasons: dict[str, str] = {}  # others in the place of those that the limits give
        self.stopped = False
        self.device_name, self.weight_bytes = "fake", 0
        self.error = ""
        self._running: dict[int, SimpleNamespace] = {}
        self._outbox: list[SimpleNamespace] = []
        self._read, self._write = os.pipe()
        self._timer: asyncio.TimerHandle | None = None
        self._generated = 0
        self._demands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def submit(self, request_id: int, prompt: Sequence[int], params: Any) -> None:
        if self.error:
            raise RuntimeError(f"the engine has stopped: {self.error}")
        request = SimpleNamespace(
            id=request_id, prompt=list(prompt), params=params, submitted=time.monotonic(), output=[]
        )
        request.tokens = deque(self.script(prompt, params))
        request.told = 0
        self.submitted.append(request)
        self._running[request_id] = request
        self._schedule()

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)
        if self._running.pop(request_id, None):
            self._post(self._event(request_id, finish="abort"))

    def forget_prefixes(self) -> None:
        self.forgotten += 1

    def fileno(self) -> int:
        return self._read

    def drain(self) -> list[SimpleNamespace]:
        if self._outbox:
            os.read(self._read, 1)
        events, self._outbox = self._outbox, []
        return events

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_running=len(self._running), num_waiting=0, num_blocks=100, num_free_blocks=75, num_steps=0,
            num_preemptions=0, step_tokens=45, steps_by_size=[2, 0, 0, 1, 0, 1], block_size=16,
            prefix_cache_queries=40, prefix_cache_hits=16, prompt_tokens=12,
            generation_tokens=self._generated, last_step_time=time.monotonic(), alive=not self.error, error=self.error,
        )  # fmt: skip

    def wait_masks(self) -> list[tuple[int, list[int], int]] | None:
        return self._demands.get()

    def answer_masks(self, answers: list[tuple[list[int], str]]) -> None:
        self._answers.put(answers)

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            self._demands.put(None)
            if self._timer is not None:
                self._timer.cancel()
            os.close(self._read)
            os.close(self._write)

    def die(self, error: str) -> None:
        """As when the engine's thread throws."""
        self.error = error
        for request_id in list(self._running):
            del self._running[request_id]
            self._post(self._event(request_id, finish="error"))

    def _schedule(self) -> None:
        if self._timer is None and self._running:
            self._timer = asyncio.get_running_loop().call_later(self.step_seconds, self._step)

    def _step(self) -> None:
        self._timer = None
        self._constrain([r for r in self._running.values() if getattr(r.params, "constrained", False)])
        for request in list(self._running.values()):
            self._advance(request)
        self._schedule()

    def _constrain(self, requests: list[SimpleNamespace]) -> None:
        """Puts first what the constraints force, or the first token they allow where the script's own is not."""
        if not requests:
            return
        masks = [(ctypes.c_uint32 * 16)() for _ in requests]  # 512 tokens: more than the byte tokenizer has
        demands = [(r.id, r.output[r.told :], ctypes.addressof(mask)) for r, mask in zip(requests, masks, strict=True)]
        self._demands.put(demands)
        for request, mask, (forced, error) in zip(requests, masks, self._answers.get(timeout=10), strict=True):
            request.told = len(request.output)
            request.error = error
            allowed = [i for i in range(512) if mask[i // 32] >> (i % 32) & 1]
            assert bool(allowed) + bool(forced) + bool(error) == 1
            if not error and request.tokens[0] not in (forced[:1] or allowed):
                request.tokens.appendleft((forced or allowed)[0])

    def _advance(self, request: SimpleNamespace) -> None:
        if error := getattr(request, "error", ""):
            del self._running[request.id]
            self._post(self._event(request.id, finish="error", error=error))
            return
        if request.params.pooling:
            del self._running[request.id]
            self._post(
                self._event(
                    request.id, finish="stop", embedding=vector_of(request.prompt), scheduled_time=request.submitted
                )
            )
            return
        scored = []
        if request.params.num_prompt_logprobs >= 0 and not request.output:
            scored = [logprobs_of(token, request.params.num_prompt_logprobs) for token in request.prompt[1:]]
        if request.params.max_tokens == 0:
            del self._running[request.id]
            self._post(
                self._event(request.id, finish="length", prompt_logprobs=scored, scheduled_time=request.submitted)
            )
            return
        token = request.tokens.popleft()
        request.output.append(token)
        self._generated += 1
        finish = ""
        early = len(request.output) <= request.params.min_tokens and not getattr(request.params, "constrained", False)
        if token in request.params.stop_token_ids and not early:
            finish = "stop"
        elif len(request.output) >= request.params.max_tokens:
            finish = "length"
        finish = self.finish_reasons.get(finish, finish)
        if finish:
            del self._running[request.id]
        logprobs = []
        if request.params.num_logprobs >= 0:
            logprobs = [logprobs_of(token, request.params.num_logprobs)]
        fields = {"tokens": [token], "logprobs": logprobs, "finish": finish, "prompt_logprobs": scored}
        self._post(self._event(request.id, scheduled_time=request.submitted, **fields))

    def _event(self, request_id: int, **fields: Any) -> SimpleNamespace:
        common = {
            "tokens": [],
            "logprobs": [],
            "prompt_logprobs": [],
            "embedding": [],
            "finish": "",
            "error": "",
            "num_cached_tokens": 16,
            "scheduled_time": 0.0,
        }
        return SimpleNamespace(request_id=request_id, time=time.monotonic(), **{**common, **fields})

    def _post(self, event: SimpleNamespace) -> None:
        if not self._outbox:
            os.write(self._write, b"x")
        self._outbox.append(event)


class Server:
    """The application on a fake engine, and a client to it."""

    def __init__(self, model: ServedModel, engine: FakeEngine, api_keys: Sequence[str], limits: QueueLimits) -> None:
        self.model = model
        self.fake = engine
        self.engine = AsyncEngine(engine, SimpleNamespace, limits)  # type: ignore[arg-type]
        self.service = Service(model, self.engine, Metrics(model.names[0], model.max_model_len))
        app = BodyLimits(create_app(self.service), MAX_BODY_BYTES, 60)
        self.app = ApiKeys(app, api_keys) if api_keys else app
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server")

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def chat(self, content: Any = "Hi", **body: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)

    async def complete(self, prompt: Any = "Hi", **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", prompt=prompt, **body)


def spell(text: str, *, end: bool = True) -> Callable[[Sequence[int], Any], list[int]]:
    """A script that spells a text, byte by byte, then ends, and never runs out."""
    tokenizer = byte_tokenizer()
    eos = tokenizer.token_id(EOS)
    assert eos is not None
    tokens = [*tokenizer.encode(text), *([eos] if end else [])]
    return lambda _prompt, _params: tokens + [tokenizer.encode(".")[0]] * 4096


@asynccontextmanager
async def running(
    answer: str | Callable[[Sequence[int], Any], Sequence[int]] = "Hello world",
    *,
    step_seconds: float = 0.0,
    api_keys: Sequence[str] = (),
    limits: QueueLimits = UNLIMITED,
    template: str | None = CHATML,
    **model: Any,
) -> AsyncIterator[Server]:
    tokenizer = byte_tokenizer()
    served: dict[str, Any] = {
        "names": ("tiny", "alias"),
        "root": "/models/tiny",
        "version": "1.2.3",
        "tokenizer": tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "max_model_len": 256,
        "hidden_size": len(LETTERS),
        "eos_token_ids": (tokenizer.token_id(EOS),),
        "chat_template": None if template is None else ChatTemplate(template, tokenizer.special_tokens),
        "seeds": random.Random(0),
        **model,
    }
    script = spell(answer) if isinstance(answer, str) else answer
    server = Server(ServedModel(**served), FakeEngine(script, step_seconds), api_keys, limits)
    try:
        yield server
    finally:
        await server.client.aclose()
        server.engine.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the fake engine does in the background."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def sse_data(text: str) -> list[str]:
    """The data of every event; the stream must be well-formed."""
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def prompt_text(server: Server, index: int = 0) -> str:
    return byte_tokenizer().decode(server.fake.submitted[index].prompt, skip_special_tokens=False)

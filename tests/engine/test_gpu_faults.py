"""What may go wrong with a GPU, through the engine and the application: an emulated one that fails when told to."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from langchain_vllm_server import _engine, _model_test
from langchain_vllm_server.app import create_app
from langchain_vllm_server.async_engine import AsyncEngine
from langchain_vllm_server.checkpoint import load_checkpoint
from langchain_vllm_server.engine_config import to_engine
from langchain_vllm_server.errors import StartError
from langchain_vllm_server.gate import Progress
from langchain_vllm_server.generation import Service
from langchain_vllm_server.load import load
from langchain_vllm_server.metrics import Metrics
from langchain_vllm_server.sampling import MAX_ENTRIES
from langchain_vllm_server.settings import parse_settings
from tests.emulated_gpu import emulated, machine, make_model
from tests.engines import Client
from tests.server.fakes import sse_data

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = emulated
SMALL = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 64}
REMEDY = "start the server again, and if that fails look at nvidia-smi and the system's log, or take --device cpu"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("byte-llama"))


def make_engine(model: Path, **given: Any) -> _engine.Engine:
    checkpoint = load_checkpoint(model)
    options = _engine.EngineOptions()
    for name, value in {"device": "cuda", "max_position": checkpoint.max_position, **SMALL, **given}.items():
        setattr(options, name, value)
    engine: _engine.Engine = _model_test.Engine(*to_engine(checkpoint), options, _engine.Loading())
    return engine


@contextmanager
def client_of(engine: _engine.Engine) -> Iterator[Client]:
    try:
        yield Client(engine)
    finally:
        engine.stop()


def assert_dead(client: Client, why: str) -> None:
    """All that was asked has an answer, the engine says why it ended, and so does a request that comes later."""
    assert {result.finish for result in client.wait(seconds=20)} <= {"length", "error"}
    stats = client.engine.stats()
    assert (stats.alive, stats.num_running, stats.num_waiting) == (False, 0, 0)
    assert why in stats.error
    with pytest.raises(RuntimeError, match="the engine has stopped: ") as raised:
        client.submit([1])
    assert why in str(raised.value)


@pytest.mark.parametrize(
    ("properties", "error"),
    [
        ({"driver": 0}, "there is no NVIDIA driver here: install one, or take --device cpu"),
        ({"driver": 12040}, "the NVIDIA driver knows CUDA 12.4, .*: update the driver, or take --device cpu"),
        ({"devices": 0}, "no GPU is visible here: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or take --device cpu"),
        ({"major": 7, "minor": 5}, r"capability 7.5, the engine's kernels need 8.0 \(Ampere\) or later"),
        (
            {"major": 12, "has_code": False},
            "12.0, for which the engine was not built: .*ARCHITECTURES=120, or take",
        ),
        ({"lost": True}, "CUDA does not start: an illegal .*: look at nvidia-smi, or take --device cpu"),
    ],
)
def test_a_machine_that_cannot_run_it(model: Path, properties: dict[str, Any], error: str) -> None:
    with machine(**properties):
        with pytest.raises(ValueError, match=error):
            make_engine(model)
        with client_of(make_engine(model, device="auto")) as client:
            assert client.engine.device_name.startswith("cpu (")
            assert client.generate([1], max_tokens=2).finish == "length"


@pytest.mark.parametrize(
    ("num_bytes", "options", "error"),
    [
        (64 << 10, {}, r"the weights .* do not fit in 1 MiB of memory on cuda \(CUDA on CPU, 0 MiB\): raise --memory"),
        (1 << 20, {"memory_bytes": 2 << 20}, r"but only 1 MiB are available on cuda \(.*\): lower --memory"),
        (496 << 10, {}, "out of GPU memory: a buffer takes 1 MiB, .*: raise --memory or --gpu-memory-utilization"),
        (1792 << 10, {}, "the key/value cache of one sequence of 64 tokens needs 1 MiB, but"),
    ],
)
def test_too_little_memory_at_load(model: Path, num_bytes: int, options: dict[str, Any], error: str) -> None:
    with machine(bytes=num_bytes), pytest.raises(ValueError, match=error):
        make_engine(model, **options)


def test_nothing_else_takes_what_work_needs(model: Path) -> None:
    """All that any step takes is the engine's before the first one."""
    with machine(), client_of(make_engine(model)) as client:
        _model_test.set_cuda_machine(bytes=_model_test.cuda_bytes_used())
        prompts = [[i] * (1 + 7 * i) for i in range(8)]
        results = client.wait(*(client.submit(prompt, max_tokens=8) for prompt in prompts))
        assert [result.finish for result in results] == ["length"] * 8


def test_no_request_takes_more_than_there_is(model: Path) -> None:
    """As many as run at once, each with far more to say of the vocabulary's tokens than would fit, and one beside."""
    vocab = load_checkpoint(model).spec.vocab_size
    everything = {
        "bad_words": [[i % (vocab - 1)] for i in range(400_000)],
        "stop_token_ids": [i % (vocab - 1) for i in range(400_000)],
        "allowed_token_ids": [i % vocab for i in range(400_000)],
        "logit_bias": [(token, 1.0) for token in range(vocab)],
        "logprob_token_ids": list(range(vocab)),
        "num_logprobs": 1,
        "min_tokens": 2,
    }
    with client_of(make_engine(model, memory_bytes=4 << 20)) as client:
        asked = [client.submit([i], max_tokens=2, **everything) for i in range(SMALL["max_num_seqs"])]
        results = client.wait(*asked, client.submit([1], max_tokens=2))
        assert [result.finish for result in results] == ["length"] * 5, client.engine.stats().error
        assert [result.tokens for result in results[:4]] == [[vocab - 1] * 2] * 4, "the only token that is not masked"


def test_experts_have_what_they_need_beside_a_cache_that_takes_the_rest(tmp_path: Path) -> None:
    """Many of them, each with tokens enough for groups of eight tiles, that it may leave empty but for one token."""
    make_model(tmp_path, num_local_experts=64, num_experts_per_tok=8, intermediate_size=32, num_hidden_layers=1)
    roomy = {"max_position": 1 << 17, "max_model_len": 0, "memory_bytes": 16 << 20, "max_num_batched_tokens": 260}
    with machine(), client_of(make_engine(tmp_path, **roomy)) as client:
        result = client.generate([i % 200 for i in range(260)], max_tokens=2)
        assert (result.finish, result.error) == ("length", "")


def test_too_many_experts_for_a_gpu(tmp_path: Path) -> None:
    make_model(tmp_path, num_local_experts=1025, num_experts_per_tok=1, intermediate_size=2, num_hidden_layers=1)
    with machine(), pytest.raises(ValueError, match=r"a GPU mixes at most 1024 experts, .* 1025: take --device cpu"):
        make_engine(tmp_path)


def test_the_cache_takes_what_is_left(model: Path) -> None:
    """Keys and values of 2 layers, 2 heads, 16 tokens and 16 numbers of 2 bytes: 4 KiB a block."""

    def blocks(**options: Any) -> int:
        roomy = {"max_position": 1 << 17, "max_model_len": 0}
        with client_of(make_engine(model, **roomy, **options)) as client:
            return int(client.engine.stats().num_blocks)

    with machine():
        few, more = blocks(gpu_memory_utilization=1 / 64), blocks(gpu_memory_utilization=1 / 32)
        assert more - few == (1 << 30) // 64 // (4 << 10)
        assert blocks(memory_bytes=1 << 24, gpu_memory_utilization=1.0) == few
        assert 0.7 * (1 << 24) < few * (4 << 10) < 1 << 24


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_of_memory_is_none(model: Path, share: float) -> None:
    with pytest.raises(ValueError, match="gpu_memory_utilization must be above 0 and at most 1"):
        make_engine(model, gpu_memory_utilization=share)


def test_lost_at_any_call(model: Path) -> None:
    """A load that fails says so, an engine that runs answers everybody, and nothing of it stays on the GPU."""
    ends, failures = [], []
    for calls in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987):
        with machine(calls_until_lost=calls):
            try:
                engine = make_engine(model)
            except (RuntimeError, ValueError) as error:
                failures.append(str(error))
                ends.append("load")
            else:
                with client_of(engine) as client:
                    with suppress(RuntimeError):  # it may have ended already
                        for i in range(6):  # more than run at once
                            client.submit([i] * 20, max_tokens=8)
                    if all(result.finish == "length" for result in client.wait(seconds=60)):
                        ends.append("answers")
                    else:
                        assert_dead(client, REMEDY)
                        ends.append("run")
                del client
                del engine
        gc.collect()
        assert _model_test.cuda_bytes_used() == 0
    assert all("CUDA" in failure and "take --device cpu" in failure for failure in failures)
    assert set(ends) >= {"load", "run"}
    assert ends == sorted(ends, key=["load", "run", "answers"].index)


def test_lost_while_a_server_loads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "Engine", _model_test.Engine)
    settings = parse_settings([str(model), "--device", "cuda", "--memory", "8MiB"])
    with machine(calls_until_lost=30), pytest.raises(StartError, match=f"^the engine does not start: CUDA: .*{REMEDY}"):
        load(settings, Progress())


async def test_the_application_at_its_limits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests as run at once, each with as many entries as a field may have."""
    monkeypatch.setattr(_engine, "Engine", _model_test.Engine)
    flags = ["--device", "cuda", "--memory", "8MiB", "--max-num-seqs", "4", "--max-model-len", "64"]
    loaded = load(parse_settings([str(model), *flags]), Progress())
    engine = AsyncEngine(loaded.engine, _engine.SamplingParams)
    app = create_app(Service(loaded.model, engine, Metrics("tiny", loaded.model.max_model_len)))
    vocab = range(loaded.model.vocab_size)
    body: dict[str, Any] = {
        "prompt": "a",
        "max_tokens": 2,
        "bad_words": [chr(97 + i % 26) * (1 + i // 26) for i in range(MAX_ENTRIES["bad_words"])],
        "stop_token_ids": [i % len(vocab) for i in range(MAX_ENTRIES["stop_token_ids"])],
        "logit_bias": {str(token): 1.0 for token in vocab},
        "logprob_token_ids": [token % 7 for token in range(MAX_ENTRIES["logprob_token_ids"])],
        "logprobs": 1,
        "min_tokens": 2,
    }
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=60) as client:
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(8)))
        more = {**body, "bad_words": [*body["bad_words"], "a"]}
        refused, health = await client.post("/v1/completions", json=more), await client.get("/health")
    assert [answer.status_code for answer in answers] == [200] * 8, answers[0].text
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "bad_words")
    assert health.status_code == 200
    engine.stop()


async def test_the_application_of_a_lost_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "Engine", _model_test.Engine)
    loaded = load(parse_settings([str(model), "--device", "cuda", "--memory", "8MiB"]), Progress())
    deaths: list[str] = []
    engine = AsyncEngine(loaded.engine, _engine.SamplingParams, died=deaths.append)
    app = create_app(Service(loaded.model, engine, Metrics("tiny", loaded.model.max_model_len)))
    body = {"prompt": "a", "max_tokens": 120, "ignore_eos": True}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=60) as client:
        with machine():
            asked = [asyncio.create_task(client.post("/v1/completions", json={**body, "stream": s})) for s in (0, 1)]
            while engine.stats().generation_tokens < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            _model_test.set_cuda_machine(lost=True)
            whole, stream = await asyncio.gather(*asked)
            health, later = await client.get("/health"), await client.post("/v1/completions", json=body)
    assert (whole.status_code, health.status_code, later.status_code) == (500, 503, 500)
    *_, error, done = sse_data(stream.text)
    messages = [whole.json()["error"]["message"], json.loads(error)["error"]["message"]]
    messages += [health.json()["error"], later.json()["error"]["message"], *deaths]
    assert all("CUDA: " in message and REMEDY in message for message in messages), messages
    assert (done, len(deaths)) == ("[DONE]", 1)
    engine.stop()

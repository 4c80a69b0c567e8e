"""What the settings become in the engine's words."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from langchain_vllm_server import _engine
from langchain_vllm_server import load as loading
from langchain_vllm_server.errors import CheckpointError, StartError
from langchain_vllm_server.gate import Progress
from langchain_vllm_server.load import engine_options, load, sampling_defaults, tokenizer_info
from langchain_vllm_server.settings import parse_settings
from langchain_vllm_server.stored_tensor import StoredTensor
from tests.server.checkpoint_fixtures import SMOLLM2
from tests.server.fakes import EOS, byte_tokenizer


def checkpoint(norm: str, *weights: str) -> Any:
    """A checkpoint as far as the options depend on it: a norm and a weight of each format named."""
    tensors = {"final_norm": [StoredTensor("norm", norm, (4,), "", 0, 0)]}
    tensors |= {f"w{i}": [StoredTensor(f"w{i}", f, (4, 4), "", 0, 0)] for i, f in enumerate(weights)}
    return SimpleNamespace(max_position=100, tensors=tensors, path=Path("m.gguf"), dtype=weights[0])


@pytest.mark.parametrize(
    ("flags", "weights", "cache"),
    [
        ([], "", "F16"),
        (["--dtype", "float32"], "F32", "F32"),
        (["--dtype", "float"], "F32", "F32"),
        (["--dtype", "bfloat16"], "BF16", "F16"),
        (["--dtype", "float32", "--kv-cache-dtype", "float16"], "F32", "F16"),
        (["--kv-cache-dtype", "bfloat16"], "", "BF16"),
        (["--quantization", "int8"], "INT8", "F16"),
        (["--kv-cache-dtype", "int8"], "", "INT8"),
        (["-q", "int4", "--kv-cache-dtype", "bfloat16"], "INT4", "BF16"),
    ],
)
def test_number_formats(flags: list[str], weights: str, cache: str) -> None:
    options = engine_options(parse_settings(["model", *flags]), checkpoint("F32", "BF16"))
    assert (options.weight_format, options.kv_format) == (weights, cache)


def test_how_much_memory() -> None:
    default, memory, share = (
        engine_options(parse_settings(["model", *flags]), checkpoint("F32", "BF16"))
        for flags in ([], ["--memory", "4GiB"], ["--device-memory-utilization", "0.5"])
    )
    assert (default.memory_bytes, default.gpu_memory_utilization) == (0, 0.9)
    assert (memory.memory_bytes, memory.gpu_memory_utilization) == (2**32, 0.9)
    assert (share.memory_bytes, share.gpu_memory_utilization) == (0, 0.5)


@pytest.mark.parametrize("flags", [[], ["--quantization", "int8"], ["--dtype", "bfloat16"]], ids=str)
def test_only_float32_is_exact(flags: list[str]) -> None:
    assert not engine_options(parse_settings(["model", *flags]), checkpoint("F32", "BF16")).exact
    assert engine_options(parse_settings(["model", "--dtype", "float32"]), checkpoint("F32", "BF16")).exact


def test_eager_is_the_engine_s() -> None:
    assert not engine_options(parse_settings(["model"]), checkpoint("F32", "BF16")).enforce_eager
    assert engine_options(parse_settings(["model", "--enforce-eager"]), checkpoint("F32", "BF16")).enforce_eager


def test_what_is_float_in_a_gguf_file_can_be_quantised() -> None:
    settings = parse_settings(["model", "--quantization", "int4"])
    assert engine_options(settings, checkpoint("F32", "Q4_1", "F16")).weight_format == "INT4"


def test_nothing_left_to_quantise_is_an_error() -> None:
    settings = parse_settings(["model", "--quantization", "int8"])
    with pytest.raises(ValueError, match=r"--quantization int8: m\.gguf has Q4_1 weights already: leave the flag out"):
        engine_options(settings, checkpoint("F32", "Q4_1", "Q8_0"))


def test_an_override_of_nothing_is_an_error() -> None:
    settings = parse_settings(["model", "--override-generation-config", '{"temperature": 0.5, "warmth": 1}'])
    with pytest.raises(CheckpointError, match="warmth"):
        sampling_defaults(settings, {})


def test_the_tokenizer_is_told_as_its_config_would() -> None:
    assert parse_settings(["model", "--enable-tokenizer-info-endpoint"]).enable_tokenizer_info_endpoint
    assert tokenizer_info(byte_tokenizer(), "{{ x }}", 256) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "model_max_length": 256,
        "vocab_size": 259,
        "chat_template": "{{ x }}",
    }


@pytest.mark.parametrize(
    ("flags", "driver", "level"),
    [([], False, logging.DEBUG), ([], True, logging.INFO), (["--device", "auto"], False, logging.INFO)],
    ids=str,
)
def test_why_no_gpu_is_taken_is_news_only_to_some(
    flags: list[str],
    driver: bool,
    level: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To those who asked for a choice, or have a driver of NVIDIA's."""
    monkeypatch.setattr(_engine, "cuda_problem", lambda: "the moon is full")
    monkeypatch.setattr("langchain_vllm_server.load.NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    with caplog.at_level(logging.DEBUG), pytest.raises(CheckpointError):
        load(parse_settings([str(tmp_path / "none.gguf"), *flags]), Progress())
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (level, "the model runs on the CPU: the moon is full")
    ]


class FakeEngine:
    """Stands for the engine; that is made as soon as `wait` has returned."""

    made: ClassVar[list[FakeEngine]] = []

    def __init__(self, *_: object) -> None:
        self.wait()
        self.options = SimpleNamespace(max_model_len=256)
        self.stopped = False
        self.made.append(self)

    def wait(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(_engine, "Engine", FakeEngine)
    return FakeEngine


def test_the_text_is_read_while_the_engine_loads(engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    read, read_text = threading.Event(), loading.read_text

    def read_and_tell(*args: Any) -> loading.Text:
        text = read_text(*args)
        read.set()
        return text

    def wait(_: FakeEngine) -> None:
        assert read.wait(20), "the engine was waited for first"

    monkeypatch.setattr(loading, "read_text", read_and_tell)
    monkeypatch.setattr(engine, "wait", wait)
    model = load(parse_settings([str(SMOLLM2)]), Progress()).model
    assert model.tokenizer.encode("Hello") == [19556]
    assert model.max_model_len == 256


def test_an_engine_without_a_text_side_is_stopped(engine: type[FakeEngine]) -> None:
    with pytest.raises(CheckpointError, match="the chat template is not valid"):
        load(parse_settings([str(SMOLLM2), "--chat-template", "{{ x"]), Progress())
    assert [one.stopped for one in engine.made] == [True]


def test_an_engine_that_does_not_start_is_named_before_a_bad_text_side(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: FakeEngine) -> None:
        raise RuntimeError("the GPU is lost")

    monkeypatch.setattr(engine, "wait", fail)
    with pytest.raises(StartError, match="the engine does not start: the GPU is lost"):
        load(parse_settings([str(SMOLLM2), "--chat-template", "{{ x"]), Progress())

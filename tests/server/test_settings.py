from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from langchain_vllm_server.settings import Settings, parse_settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def test_defaults() -> None:
    assert parse_settings([]) == Settings()
    assert Settings().host == "127.0.0.1"


def test_model_positional_or_flag() -> None:
    assert parse_settings(["org/name"]).model == "org/name"
    assert parse_settings(["--model", "org/name"]).model == "org/name"
    with pytest.raises(SystemExit):
        parse_settings(["a", "--model", "b"])


def test_every_flag_reaches_its_setting() -> None:
    line = (
        "m --tokenizer t --revision r --download-dir d --served-model-name a b --response-role bot --max-logprobs 5"
        ' --generation-config vllm --override-generation-config {"top_k":3} --dtype bfloat16 --kv-cache-dtype half'
        " --device cpu --max-model-len 32k --max-num-seqs 7 --max-num-batched-tokens 99 --no-enable-prefix-caching"
        " --threads 3 --memory 4GiB --seed 9 --host 0.0.0.0 --port 0 --uds /tmp/s --api-key k --log-level debug"
        " --disable-access-log --shutdown-timeout 1.5 --owners-fd 7 --chat-template {{x}}"
    )
    assert parse_settings(line.split()) == Settings(
        model="m",
        tokenizer="t",
        revision="r",
        download_dir="d",
        served_model_name=("a", "b"),
        chat_template="{{x}}",
        response_role="bot",
        generation_config="vllm",
        override_generation_config={"top_k": 3},
        max_logprobs=5,
        dtype="bfloat16",
        kv_cache_dtype="half",
        device="cpu",
        max_model_len=32000,
        max_num_seqs=7,
        max_num_batched_tokens=99,
        enable_prefix_caching=False,
        threads=3,
        memory=4 * 2**30,
        seed=9,
        host="0.0.0.0",
        port=0,
        uds="/tmp/s",
        api_key=("k",),
        log_level="debug",
        disable_uvicorn_access_log=True,
        shutdown_timeout=1.5,
        owners_fd=7,
    )


@pytest.mark.parametrize("flags", ["--quantization int8", "-q int8", "--quantization=int8", "-q int8 --dtype auto"])
def test_quantization(flags: str) -> None:
    assert parse_settings(["m", *flags.split()]) == Settings(model="m", quantization="int8")


def test_underscores_are_dashes() -> None:
    settings = parse_settings(["--max_model_len=8", "--served_model_name", "a_b", "--log_level", "error"])
    assert (settings.max_model_len, settings.served_model_name, settings.log_level) == (8, ("a_b",), "error")


def test_api_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_settings(["--api-key", "a", "b", "--api-key", "c"]).api_key == ("a", "b", "c")
    monkeypatch.setenv("VLLM_API_KEY", "env")
    assert parse_settings([]).api_key == ("env",)
    assert parse_settings(["--api-key", "a"]).api_key == ("a",)


def test_flags_for_gpus_are_accepted_and_remembered() -> None:
    argv = ["-tp", "2", "--swap_space=4", "--async-scheduling", "--trust-remote-code", "model"]
    settings = parse_settings(argv)
    assert settings.model == "model"
    assert settings.without_effect == (
        "--tensor-parallel-size",
        "--swap-space",
        "--async-scheduling",
        "--trust-remote-code",
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("32k", 32000), ("1.5k", 1500), ("32K", 32768), ("1M", 2**20), ("auto", 0), ("-1", 0)],
)
def test_model_len(text: str, tokens: int) -> None:
    assert parse_settings([f"--max-model-len={text}"]).max_model_len == tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 2**32), ("4g", 2**32), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("1000", 1000), ("10b", 10)],
)
def test_memory(text: str, size: int) -> None:
    assert parse_settings(["--memory", text]).memory == size


def test_chat_template_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    assert parse_settings(["--chat-template", str(file)]).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--port", "70000"], "--port: must be between 0 and 65535"),
        (["--port", "http"], "--port"),
        (["--max-model-len", "many"], "tokens such as 4096, 32k"),
        (["--max-model-len", "1.5K"], "tokens such as 4096, 32k"),
        (["--memory", "4 elephants"], "size such as 4GiB"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--kv-cache-dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--max-num-seqs", "0"], "--max-num-seqs: must be between 1 and"),
        (["--threads", "-1"], "--threads"),
        (["--chat-template", "nowhere.jinja"], "neither a Jinja template nor a readable file: nowhere.jinja"),
        (["--override-generation-config", "[1]"], "expected a JSON object"),
        (["--override-generation-config", "{"], "not JSON"),
        (["--api-key", ""], "must not be empty"),
        (["--quantization", "awq"], "--quantization/-q: 'awq' is not supported; supported: int8, int4"),
        (["-q", "gptq"], "'gptq' is not supported"),
        (["-q", "fp8"], "'fp8' is not supported"),
        (["-q", "gguf"], "a GGUF file is served as it is quantised, without this flag"),
        (["--memory", "4GiB", "--gpu-memory-utilization", "0.5"], "--memory and --gpu-memory-utilization"),
        (["--gpu-memory-utilization", "0"], "must be above 0 and at most 1, got 0"),
        (["--gpu-memory-utilization", "90"], "must be above 0 and at most 1, got 90"),
        (["--gpu-memory-utilization", "nan"], "must be above 0 and at most 1, got nan"),
        (["-q", "int8", "--dtype", "float32"], "--quantization int8 and --dtype float32"),
        (["--dtype", "half", "-q", "int4"], "--quantization int4 and --dtype half"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout: must be between"),
    ],
)
def test_bad_values_are_named(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_settings(argv)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_what_requests_may_ask_for() -> None:
    flags = ["--trust-request-chat-template", "--enable-force-include-usage", "--return-tokens-as-token-ids"]
    settings = parse_settings([*flags, "--scheduling-policy", "priority", "--stream-interval", "8"])
    assert (settings.scheduling_policy, settings.stream_interval) == ("priority", 8)
    assert settings.trust_request_chat_template
    assert settings.enable_force_include_usage
    assert settings.return_tokens_as_token_ids
    assert parse_settings([]).scheduling_policy == "fcfs"


@pytest.mark.parametrize("argv", [["--scheduling-policy", "random"], ["--stream-interval", "0"]])
def test_what_requests_may_not_ask_for(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(argv)


FLAGS_OF_VLLM = """
--host h --port 1 --uds u --api-key k --ssl-certfile c --allowed-origins ["*"] --root-path /p --middleware a.b
--enable-request-id-headers --disable-fastapi-docs --chat-template {{x}} --chat-template-content-format auto
--trust-request-chat-template --response-role r --enable-auto-tool-choice --tool-call-parser hermes
--tool-strict-level auto --exclude-tools-when-tool-choice-none --enable-prompt-tokens-details
--enable-per-request-metrics --enable-server-load-tracking --enable-force-include-usage --sse-keep-alive-interval 5
--enable-tokenizer-info-endpoint --enable-log-requests --enable-log-deltas --max-log-len 5 --uvicorn-log-level info
--disable-uvicorn-access-log --disable-access-log-for-endpoints /a,/b --log-error-stack --fingerprint-mode none
--enable-scale-out --api-server-count 2 --model m --tokenizer t --tokenizer-mode auto --revision r --dtype auto -q int8
--max-model-len 32k --served-model-name a --seed 1 --generation-config auto --override-generation-config {}
--max-logprobs 1 --load-format auto --download-dir d --tensor-parallel-size 2 -tp 2 -tp=2 --pipeline-parallel-size 2
--data-parallel-size 2 --max-loras 1 --max-lora-rank 8 --enable-prefix-caching --no-enable-prefix-caching
--kv-cache-dtype auto --block-size 16 --gpu-memory-utilization 0.9 --device-memory-utilization 0.9
--kv-cache-memory-bytes 1G --max-num-seqs 5 --max-num-batched-tokens 5 --max-num-queued-reqs 5
--max-num-queued-tokens 5 --scheduling-policy fcfs --enable-chunked-prefill --no-enable-chunked-prefill
--stream-interval 1 --speculative-config {} --spec-method ngram --structured-outputs-config {} --reasoning-parser qwen3
--reasoning-config {"reasoning_start_str":"a","reasoning_end_str":"b"} --pooler-config {}
--enforce-eager --no-enforce-eager -O 3 -O3 -O.mode=3 --trust-remote-code --shutdown-timeout 0
--enable-sleep-mode --otlp-traces-endpoint u --log-level info --compilation-config.mode 3
"""


def _cases() -> list[list[str]]:
    words, cases = FLAGS_OF_VLLM.split(), list[list[str]]()
    for word in words:
        if word.startswith("-"):
            cases.append([word])
        else:
            cases[-1].append(word)
    return cases


@pytest.mark.parametrize("argv", _cases(), ids=" ".join)
def test_the_flags_of_vllm(argv: list[str]) -> None:
    assert parse_settings(["m", *argv]).model == "m"
    if argv[0].startswith("--"):
        name, dot, key = argv[0].partition(".")
        parse_settings(["m", "--" + name[2:].replace("-", "_") + dot + key, *argv[1:]])


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--lora-modules", "a=b", "c=d"], "--lora-modules: not supported: LoRA adapters are not served"),
        (["--headless"], "no server without HTTP"),
        (["--load-format", "dummy"], "invalid choice: 'dummy'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--ssl-keyfile", "k"], "TLS needs --ssl-certfile"),
        (["--fingerprint-mode", "custom"], "--fingerprint-value need each other"),
        (["--enable-log-outputs"], "needs --enable-log-requests"),
        (["--root-path", "x"], "must begin with a slash"),
        (["--middleware", "nodots"], "package.module.Name"),
        (["--override-generation-config.top_k"], "--override-generation-config.top_k: expected a value"),
        (["--config", "/nowhere.yaml"], "--config: cannot read /nowhere.yaml"),
        (["--config"], "--config: expected a file"),
    ],
)
def test_what_cannot_be_had_is_refused(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(argv)
    assert complaint in capsys.readouterr().err


def test_dotted_keys_are_json() -> None:
    argv = ["--override_generation_config.top_k", "3", "--override-generation-config.eos_token_id+=1"]
    argv += ["--override-generation-config.eos_token_id+", "2", '--override-generation-config={"min_p": 0.5}']
    assert parse_settings(argv).override_generation_config == {"min_p": 0.5, "top_k": 3, "eos_token_id": [1, 2]}


def test_a_file_of_flags(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: from-file\nport: 12\nserved_model_name: [a, b]\nenable-prefix-caching: false\nenforce-eager: true\n"
        "override-generation-config: {top_k: 3}\nuds:\n"
    )
    settings = parse_settings(["--config", str(file), "--port", "13"])
    assert (settings.model, settings.port, settings.served_model_name) == ("from-file", 13, ("a", "b"))
    assert not settings.enable_prefix_caching
    assert settings.override_generation_config == {"top_k": 3}
    assert settings.enforce_eager
    settings = parse_settings(["m", f"--config={file}", "--served-model-name", "c"])
    assert (settings.model, settings.served_model_name) == ("m", ("c",))


def test_the_level_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    assert parse_settings([]).log_level == "warning"
    assert parse_settings(["--log-level", "debug"]).log_level == "debug"

"""The server's settings: `vllm serve`'s flag names, parsed once into a frozen dataclass."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROG = "langchain-vllm serve"
QUANTIZATIONS = ("int8", "int4")

# Flags of `vllm serve` that change nothing here: they steer a GPU, or switch on what is always on.
_VALUE_WITHOUT_EFFECT = (
    "--tensor-parallel-size -tp",
    "--pipeline-parallel-size -pp",
    "--data-parallel-size -dp",
    "--distributed-executor-backend",
    "--gpu-memory-utilization",
    "--device-memory-utilization",
    "--swap-space",
    "--cpu-offload-gb",
    "--block-size",
    "--attention-backend",
    "--compilation-config -O",
    "--max-seq-len-to-capture",
)
_SWITCH_WITHOUT_EFFECT = (
    "--enforce-eager",
    "--trust-remote-code",
    "--enable-chunked-prefill",
    "--disable-custom-all-reduce",
    "--disable-log-stats",
    "--disable-log-requests",
    "--disable-fastapi-docs",
    "--enable-prompt-tokens-details",
    "--enable-per-request-metrics",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `langchain-vllm serve` was asked for. Zero or None means: decide from the model and the machine."""

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    served_model_name: tuple[str, ...] = ()
    chat_template: str | None = None  # the template's text
    response_role: str = "assistant"
    generation_config: str = "auto"  # auto: the model's own; vllm: none; or a folder
    override_generation_config: dict[str, Any] | None = None
    max_logprobs: int = 20
    trust_request_chat_template: bool = False
    scheduling_policy: str = "fcfs"
    stream_interval: int = 1  # tokens
    return_tokens_as_token_ids: bool = False
    enable_force_include_usage: bool = False
    tool_call_parser: str | None = None  # None: by the chat template
    reasoning_parser: str | None = None
    exclude_tools_when_tool_choice_none: bool = False
    reasoning_content: bool = False
    enable_tokenizer_info_endpoint: bool = False

    dtype: str = "auto"
    quantization: str | None = None  # what float weights become while they load: int8 or int4
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    max_model_len: int = 0  # tokens
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    threads: int = 0
    memory: int = 0  # bytes, for weights, cache and activations
    seed: int = 0

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_key: tuple[str, ...] = ()
    log_level: str = "info"
    access_log: bool = True
    shutdown_timeout: float = 5.0  # seconds
    announce_fd: int | None = None
    parent_fd: int | None = None
    without_effect: tuple[str, ...] = ()  # flags given that change nothing


def parse_settings(argv: Sequence[str]) -> Settings:
    """Parse a command line; prints the error and raises SystemExit(2) when it is wrong."""
    parser = _parser()
    args = vars(parser.parse_args([_with_dashes(arg) for arg in argv]))
    if (positional := args.pop("model_tag")) is not None:
        if args["model"] not in (DEFAULT_MODEL, positional):
            parser.error(f"two models given: {positional!r} and --model {args['model']!r}")
        args["model"] = positional
    if args["quantization"] and args["dtype"] != "auto":
        parser.error(
            f"--quantization {args['quantization']} and --dtype {args['dtype']} both say what float weights become: "
            "give one of them"
        )
    args["api_key"] = _api_keys(parser, args["api_key"])
    values: dict[str, Any] = {}
    for field in fields(Settings):
        value = args[field.name]
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return Settings(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        allow_abbrev=False,
        description="Serve a model over OpenAI's HTTP API, with vLLM's flags.",
    )
    _add_model(parser.add_argument_group("model"))
    _add_engine(parser.add_argument_group("engine"))
    _add_requests(parser.add_argument_group("requests"))
    _add_server(parser.add_argument_group("server"))
    _add_without_effect(parser)
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "model_tag",
        nargs="?",
        metavar="MODEL",
        help=f"a checkpoint folder, a .gguf file or a hub id; default {DEFAULT_MODEL}",
    )
    group.add_argument("--model", default=DEFAULT_MODEL, help="the same, as a flag")
    group.add_argument("--tokenizer", help="a folder or file to take the tokenizer from, if not the model's own")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--download-dir", help="where hub models are kept")
    group.add_argument("--served-model-name", nargs="+", default=[], metavar="NAME", help="names that requests may use")
    group.add_argument("--chat-template", type=_template, help="a Jinja template, or the file that holds one")
    group.add_argument("--response-role", default="assistant", help="role of the answers, default assistant")
    group.add_argument(
        "--generation-config", default="auto", help="sampling defaults: auto (the model's), vllm (none) or a folder"
    )
    group.add_argument(
        "--override-generation-config", type=_json_object, metavar="JSON", help="sampling defaults to set or replace"
    )
    group.add_argument(
        "--max-logprobs",
        type=_integer(-1),
        default=20,
        help="most logprobs a request may ask for, default 20; -1: no limit",
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    floats = ["auto", "float32", "float", "bfloat16", "float16", "half"]
    group.add_argument(
        "--dtype",
        choices=floats,
        default="auto",
        help="of plain (not quantised) weights, auto keeps each tensor's own; float32 also multiplies quantised "
        "weights exactly, not in integers",
    )
    group.add_argument(
        "--quantization",
        "-q",
        type=_quantization,
        metavar="{int8,int4}",
        help="round float weights while they load, and multiply in integers: int8 (a scale per output channel) or int4 "
        "(a scale per group of 32); weights that a GGUF file has quantised stay as they are",
    )
    group.add_argument(
        "--kv-cache-dtype", choices=[*floats, "int8"], default="auto", help="of the KV cache; int8: attend in integers"
    )
    group.add_argument("--device", choices=["auto", "cpu"], default="auto", help="where the model runs")
    group.add_argument(
        "--max-model-len",
        type=_model_len,
        default=0,
        metavar="TOKENS",
        help="prompt and answer together: 4096, 32k or auto (0)",
    )
    group.add_argument(
        "--max-num-seqs", type=_integer(1), default=256, help="sequences that run at the same time, default 256"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=_integer(1),
        default=512,
        help="tokens of one step, default 512: on a CPU a larger step makes others wait and gains nothing",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the KV cache of equal prompt beginnings, on by default",
    )
    group.add_argument("--threads", type=_integer(0), default=0, help="worker threads; 0: one per core")
    group.add_argument(
        "--memory",
        type=_memory,
        default=0,
        metavar="SIZE",
        help="for weights and KV cache, such as 4GiB; 0: half of what is free",
    )
    group.add_argument("--seed", type=int, default=0, help="of the seeds of requests that give none")


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trust-request-chat-template", action="store_true", help="let requests bring a chat template of their own"
    )
    group.add_argument(
        "--enable-tokenizer-info-endpoint", action="store_true", help="tell the chat template at /tokenizer_info"
    )
    group.add_argument(
        "--scheduling-policy",
        choices=["fcfs", "priority"],
        default="fcfs",
        help="fcfs: first come, first served; priority: lower `priority` numbers first",
    )
    group.add_argument(
        "--stream-interval", type=_integer(1), default=1, metavar="TOKENS", help="from chunk to chunk of a stream"
    )
    group.add_argument(
        "--return-tokens-as-token-ids", action="store_true", help="name the tokens of log-probabilities token_id:N"
    )
    group.add_argument(
        "--enable-force-include-usage", action="store_true", help="tell the usage in every chunk of every stream"
    )
    group.add_argument(
        "--tool-call-parser", metavar="NAME", help="how the model spells tool calls; default: by its chat template"
    )
    group.add_argument(
        "--reasoning-parser", metavar="NAME", help="how the model marks reasoning; default: by its chat template"
    )
    group.add_argument(
        "--exclude-tools-when-tool-choice-none", action="store_true", help="hide tools that must not be called"
    )
    group.add_argument(
        "--reasoning-content", action="store_true", help="tell reasoning as `reasoning_content`, too, its older name"
    )


def _add_server(group: argparse._ArgumentGroup) -> None:
    levels = ["debug", "info", "warning", "error"]
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, default 127.0.0.1; 0.0.0.0 opens it to the network"
    )
    group.add_argument("--port", type=_integer(0, 65535), default=8000, help="default 8000; 0 takes a free one")
    group.add_argument("--uds", metavar="PATH", help="listen on a Unix socket instead")
    group.add_argument(
        "--api-key", nargs="+", action="extend", default=[], metavar="KEY", help="accepted keys; also VLLM_API_KEY"
    )
    group.add_argument(
        "--log-level",
        "--uvicorn-log-level",
        choices=levels,
        default="info",
        help="least severe messages to log, default info",
    )
    group.add_argument(
        "--disable-access-log",
        "--disable-uvicorn-access-log",
        dest="access_log",
        action="store_false",
        help="do not log requests",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_number(0, 86400),
        default=5.0,
        metavar="SECONDS",
        help="what open requests get after SIGTERM, default 5",
    )
    # For the launcher: where to write the address, and a pipe that closes when the parent is gone.
    group.add_argument("--announce-fd", type=_integer(0), help=argparse.SUPPRESS)
    group.add_argument("--parent-fd", type=_integer(0), help=argparse.SUPPRESS)


def _add_without_effect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(without_effect=[])
    for nargs, names in ((1, _VALUE_WITHOUT_EFFECT), (0, _SWITCH_WITHOUT_EFFECT)):
        for flags in names:
            parser.add_argument(*flags.split(), nargs=nargs, action=_WithoutEffect, help=argparse.SUPPRESS)


class _WithoutEffect(argparse.Action):
    """Remembers that a flag was given, for the warning."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, _values: Any, _option: str | None = None) -> None:
        namespace.without_effect = [*namespace.without_effect, self.option_strings[0]]


def _with_dashes(arg: str) -> str:
    """`--max_model_len=8` as `--max-model-len=8`."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def _api_keys(parser: argparse.ArgumentParser, given: list[str]) -> list[str]:
    if any(not key for key in given):
        parser.error("argument --api-key: a key must not be empty")
    key = os.environ.get("VLLM_API_KEY")
    return given or ([key] if key else [])


def _integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be between {minimum} and {maximum}, got {value}")
        return value

    return integer


def _number(minimum: float, maximum: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be between {minimum} and {maximum}, got {text}")
        return value

    return number


def _model_len(text: str) -> int:
    """As vLLM does: k, m, g are powers of 1000 and take decimals, K, M, G are powers of 1024."""
    if text.lower() in ("auto", "-1", "0"):
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text)
    if match is None or ("." in match[1] and not match[2].islower()):
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 4096, 32k or auto, got {text!r}")
    base = 1000 if match[2].islower() else 1024
    value = int(float(match[1]) * base ** " kmg".index(match[2].lower() or " "))
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be between 1 and {2**31 - 1}, got {text}")
    return value


def _quantization(text: str) -> str:
    """Other methods of vLLM's flag read a checkpoint that was quantised before."""
    if text not in QUANTIZATIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not supported; supported: {', '.join(QUANTIZATIONS)}, of a float checkpoint while it loads "
            "(a GGUF file is served as it is quantised, without this flag)"
        )
    return text


def _memory(text: str) -> int:
    """4GiB, 4G, 512MiB are powers of 1024; 4GB, 512MB powers of 1000; a bare number is bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GiB or 512MB, got {text!r}")
    base = 1000 if match[3] == "b" else 1024
    value = int(float(match[1]) * base ** " kmgt".index(match[2] or " "))
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is more than any machine has")
    return value


def _template(text: str) -> str:
    """A template itself (it has braces or line breaks), or else the file that holds it."""
    if any(mark in text for mark in "{}\n"):
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"neither a Jinja template nor a readable file: {text} ({error})") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value

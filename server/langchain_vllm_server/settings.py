"""The server's settings: `vllm serve`'s flag names, parsed once into a frozen dataclass."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from langchain_vllm_server import flags_of_gpus
from langchain_vllm_server.command_line import plain
from langchain_vllm_server.flags import FLAGS
from langchain_vllm_server.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_vllm_server.flag_configs import PoolerConfig, ReasoningConfig, StructuredOutputsConfig

PROG = "langchain-vllm serve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `langchain-vllm serve` was asked for. Zero or None means: decide from the model and the machine."""

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    served_model_name: tuple[str, ...] = ()
    chat_template: str | None = None  # the template's text
    chat_template_content_format: str = "auto"
    default_chat_template_kwargs: dict[str, Any] | None = None
    response_role: str = "assistant"
    generation_config: str = "auto"  # auto: the model's own; vllm: none; or a folder
    override_generation_config: dict[str, Any] | None = None
    max_logprobs: int = 20
    fingerprint_mode: str = "full"
    fingerprint_value: str | None = None
    trust_request_chat_template: bool = False
    scheduling_policy: str = "fcfs"
    stream_interval: int = 1  # tokens
    return_tokens_as_token_ids: bool = False
    enable_force_include_usage: bool = False
    tool_call_parser: str | None = None  # None: by the chat template
    reasoning_parser: str | None = None
    reasoning_config: ReasoningConfig | None = None
    structured_outputs_config: StructuredOutputsConfig | None = None
    pooler_config: PoolerConfig | None = None
    exclude_tools_when_tool_choice_none: bool = False
    reasoning_content: bool = False
    enable_tokenizer_info_endpoint: bool = False
    max_num_queued_reqs: int = 0  # sequences
    max_num_queued_tokens: int = 0
    sse_keep_alive_interval: float = 0.0  # seconds
    max_request_body_size: int = 32 * 2**20  # bytes
    request_body_timeout: float = 60.0  # seconds

    dtype: str = "auto"
    quantization: str | None = None  # what float weights become while they load: int8 or int4
    kv_cache_dtype: str = "auto"
    device: str | None = None  # None: auto, by default
    max_model_len: int = 0  # tokens
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    threads: int = 0
    memory: int = 0  # bytes, for weights, cache and activations
    gpu_memory_utilization: float | None = None  # the same, as a part of what a GPU has free
    enforce_eager: bool = False
    seed: int = 0

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_key: tuple[str, ...] = ()
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    allowed_origins: tuple[str, ...] = ("*",)
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    middleware: tuple[str, ...] = ()  # import paths
    enable_request_id_headers: bool = False
    disable_fastapi_docs: bool = False

    log_level: str = "info"
    uvicorn_log_level: str | None = None  # as log_level
    log_format: str = "text"
    disable_uvicorn_access_log: bool = False
    disable_access_log_for_endpoints: str | None = None  # paths, separated by commas
    enable_log_requests: bool = False
    enable_log_outputs: bool = False
    max_log_len: int | None = None  # bytes

    shutdown_timeout: float = 5.0  # seconds
    owners_fd: int | None = None
    without_effect: tuple[str, ...] = ()  # flags given that change nothing


def parse_settings(argv: Sequence[str]) -> Settings:
    """Parse a command line; prints the error and raises SystemExit(2) when it is wrong."""
    parser = _parser()
    try:
        args = vars(parser.parse_args(plain(argv)))
    except ValueError as error:
        parser.error(str(error))
    if (positional := args.pop("model_tag")) is not None:
        if args["model"] not in (DEFAULT_MODEL, positional):
            parser.error(f"two models given: {positional!r} and --model {args['model']!r}")
        args["model"] = positional
    args["api_key"] = _api_keys(parser, args["api_key"])
    values: dict[str, Any] = {}
    for field in fields(Settings):
        value = args[field.name]
        values[field.name] = tuple(value) if isinstance(value, list) else value
    settings = Settings(**values)
    _check(parser, settings)
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        allow_abbrev=False,
        description="Serve a model over OpenAI's HTTP API, with vLLM's flags.",
        epilog="--config FILE reads flags from a YAML mapping; --flag.key VALUE sets a key of a JSON flag. "
        "Flags of vllm serve that steer a GPU are accepted with a warning.",
    )
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    defaults = {field.name: field.default for field in fields(Settings)}
    defaults["log_level"] = _log_level(parser)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group, defaults[flag.field])
    _add_without_effect(parser)
    return parser


def _check(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """What no flag can tell alone."""
    if settings.quantization and settings.dtype != "auto":
        parser.error(
            f"--quantization {settings.quantization} and --dtype {settings.dtype} both say what float weights become: "
            "give one of them"
        )
    if settings.memory and settings.gpu_memory_utilization:
        parser.error("--memory and --gpu-memory-utilization both say how much memory to take: give one of them")
    if settings.ssl_certfile is None and (settings.ssl_keyfile or settings.ssl_ca_certs or settings.ssl_cert_reqs):
        parser.error("TLS needs --ssl-certfile, too")
    if settings.ssl_cert_reqs and settings.ssl_ca_certs is None:
        parser.error("--ssl-cert-reqs needs --ssl-ca-certs to check clients' certificates with")
    if (settings.fingerprint_mode == "custom") != (settings.fingerprint_value is not None):
        parser.error("--fingerprint-mode custom and --fingerprint-value need each other")
    config = settings.structured_outputs_config
    if settings.reasoning_config and (settings.reasoning_parser or (config and config.reasoning_parser)):
        parser.error("--reasoning-config and a reasoning parser both say how reasoning is marked: give one of them")
    if settings.enable_log_outputs and not settings.enable_log_requests:
        parser.error("--enable-log-outputs needs --enable-log-requests")


def _add_without_effect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(without_effect=[])
    for names in flags_of_gpus.VALUES.split():
        parser.add_argument(*names.split("/"), action=_WithoutEffect, help=argparse.SUPPRESS)
    for names in flags_of_gpus.SWITCHES.split():
        long = names.split("/")[0]
        no = "--no-" + long.removeprefix("--")
        parser.add_argument(*names.split("/"), no, nargs=0, action=_WithoutEffect, help=argparse.SUPPRESS)
    for name, only in flags_of_gpus.ONLY.items():
        parser.add_argument(name, choices=only, action=_WithoutEffect, help=argparse.SUPPRESS)
    for name in flags_of_gpus.REFUSED:
        no = "--no-" + name.removeprefix("--")
        parser.add_argument(name, no, nargs="*", action=_Refuse, help=argparse.SUPPRESS)


class _WithoutEffect(argparse.Action):
    """Remembers that a flag was given, for the warning."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, _values: Any, _option: str | None = None) -> None:
        namespace.without_effect = [*namespace.without_effect, self.option_strings[0]]


class _Refuse(argparse.Action):
    """Says why a flag cannot be had. Its opposite asks for nothing."""

    def __call__(self, parser: Any, _namespace: Any, _values: Any, option: str | None = None) -> None:
        if option in flags_of_gpus.REFUSED:
            parser.error(f"argument {option}: not supported: {flags_of_gpus.REFUSED[option]}")


def _log_level(parser: argparse.ArgumentParser) -> str:
    level = os.environ.get("VLLM_LOGGING_LEVEL", "info").lower()
    if level not in ("critical", "error", "warning", "info", "debug"):
        parser.error(f"VLLM_LOGGING_LEVEL: not a level: {level!r}")
    return level


def _api_keys(parser: argparse.ArgumentParser, given: list[str]) -> list[str]:
    if any(not key for key in given):
        parser.error("argument --api-key: a key must not be empty")
    key = os.environ.get("VLLM_API_KEY")
    return given or ([key] if key else [])

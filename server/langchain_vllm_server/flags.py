"""The flags of `langchain-vllm serve`: one line each. A flag's default is that of its field in `Settings`.

A flag sets the field of its first name (`--max-model-len` sets `max_model_len`). The field's default tells the rest:
for a bool there are `--flag` and `--no-flag`, a tuple takes several values.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.flag_values import (
    config,
    integer,
    json_object,
    json_strings,
    memory,
    model_len,
    module_path,
    number,
    path_prefix,
    quantization,
    share,
    template,
)
from langchain_vllm_server.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag.

    Args:
        names: All its names, separated by blanks.
        help: What it does; None hides the flag.
        type: From text to value, or the texts that are allowed.
        metavar: Stands for the value in the help.
        repeats: It may be given several times, and each adds to the ones before.
    """

    names: str
    help: str | None
    type: Callable[[str], Any] | tuple[str, ...] = str
    metavar: str | None = None
    repeats: bool = False

    @property
    def field(self) -> str:
        """The name in Settings."""
        return self.names.split()[0].lstrip("-").replace("-", "_")

    def add_to(self, group: argparse._ArgumentGroup, default: Any) -> None:
        """Have a parser know it."""
        help_ = argparse.SUPPRESS if self.help is None else self.help
        options: dict[str, Any] = {"dest": self.field, "default": default, "help": help_}
        if isinstance(default, bool):
            group.add_argument(*self.names.split(), action=argparse.BooleanOptionalAction, **options)
            return
        if isinstance(default, tuple) and self.type is not json_strings:
            options |= {"nargs": "+", "default": list(default), "action": "extend" if self.repeats else "store"}
        options |= {"choices": self.type} if isinstance(self.type, tuple) else {"type": self.type}
        group.add_argument(*self.names.split(), metavar=self.metavar, **options)


_FLOATS = ("auto", "float32", "float", "bfloat16", "float16", "half")
_LEVELS = ("critical", "error", "warning", "info", "debug")

FLAGS: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("--model", f"a checkpoint folder, a .gguf file or a hub id; default {DEFAULT_MODEL}"),
        Flag("--tokenizer", "a folder or file to take the tokenizer from, if not the model's own"),
        Flag("--revision", "branch, tag or commit of a hub model"),
        Flag("--download-dir", "where hub models are kept"),
        Flag("--served-model-name", "names that requests may use", metavar="NAME"),
        Flag("--chat-template", "a Jinja template, or the file that holds one", template),
        Flag(
            "--chat-template-content-format",
            "messages' contents as the template takes them: auto (as it reads them), string or openai (parts)",
            ("auto", "string", "openai"),
        ),
        Flag("--default-chat-template-kwargs", "for the template, where a request says nothing", json_object, "JSON"),
        Flag("--response-role", "role of the answers, default assistant"),
        Flag("--generation-config", "sampling defaults: auto (the model's), vllm (none) or a folder"),
        Flag("--override-generation-config", "sampling defaults to set or replace", json_object, "JSON"),
        Flag("--max-logprobs", "most logprobs a request may ask for, default 20; -1: no limit", integer(-1), "N"),
        Flag(
            "--fingerprint-mode",
            "system_fingerprint of answers: full or hash (version, and a hash of what is served), custom or none",
            ("full", "hash", "custom", "none"),
        ),
        Flag("--fingerprint-value", "the system_fingerprint of --fingerprint-mode custom", metavar="TEXT"),
    ),
    "engine": (
        Flag(
            "--dtype",
            "of plain (not quantised) weights, auto keeps each tensor's own; float32 also rounds no activations: "
            "quantised weights are not multiplied in integers, nor bfloat16 ones in bfloat16 (AMX; Zen 4, 5)",
            _FLOATS,
        ),
        Flag(
            "--quantization -q",
            "round float weights while they load, and multiply in integers: int8 (a scale per output channel) or int4 "
            "(a scale per group of 32); weights that a GGUF file has quantised stay as they are",
            quantization,
            "{int8,int4}",
        ),
        Flag("--kv-cache-dtype", "of the KV cache; int8: attend in integers, on a CPU", (*_FLOATS, "int8")),
        Flag("--device", "where the model runs; auto: on a GPU if one can be used", ("auto", "cpu", "cuda")),
        Flag("--max-model-len", "prompt and answer together: 4096, 32k or auto (0)", model_len, "TOKENS"),
        Flag("--max-num-seqs", "sequences that run at the same time, default 256", integer(1), "N"),
        Flag(
            "--max-num-batched-tokens",
            "tokens of one step, default 512: on a CPU a larger step makes others wait and gains nothing",
            integer(1),
            "TOKENS",
        ),
        Flag("--enable-prefix-caching", "reuse the KV cache of equal prompt beginnings, on by default"),
        Flag("--threads", "worker threads; 0: one per core", integer(0), "N"),
        Flag("--memory", "for weights and KV cache, such as 4GiB; 0: half of what is free", memory, "SIZE"),
        Flag(
            "--gpu-memory-utilization --device-memory-utilization",
            "for the same on a GPU, the part to take of what is free, default 0.9",
            share,
            "PART",
        ),
        Flag("--enforce-eager", "on a GPU, launch every step anew instead of replaying CUDA graphs"),
        Flag("--seed", "of the seeds of requests that give none", int),
    ),
    "requests": (
        Flag("--trust-request-chat-template", "let requests bring a chat template of their own"),
        Flag(
            "--scheduling-policy",
            "fcfs: first come, first served; priority: lower `priority` numbers first",
            ("fcfs", "priority"),
        ),
        Flag("--stream-interval", "from chunk to chunk of a stream", integer(1), "TOKENS"),
        Flag("--return-tokens-as-token-ids", "name the tokens of log-probabilities token_id:N"),
        Flag("--enable-force-include-usage", "tell the usage in every chunk of every stream"),
        Flag("--enable-tokenizer-info-endpoint", "tell the chat template at /tokenizer_info"),
        Flag("--tool-call-parser", "how the model spells tool calls; default: by its chat template", metavar="NAME"),
        Flag("--reasoning-parser", "how the model marks reasoning; default: by its chat template", metavar="NAME"),
        Flag("--reasoning-config", "texts that begin and end reasoning", config("ReasoningConfig"), "JSON"),
        Flag("--structured-outputs-config", "how JSON is spelled", config("StructuredOutputsConfig"), "JSON"),
        Flag("--pooler-config", "what vectors are made of", config("PoolerConfig"), "JSON"),
        Flag("--exclude-tools-when-tool-choice-none", "hide tools that must not be called"),
        Flag("--reasoning-content", "tell reasoning as `reasoning_content`, too, its older name"),
        Flag(
            "--max-num-queued-reqs",
            "most sequences in flight, running or waiting, `n` of a request counting n; more get 503; 0: no limit",
            integer(0),
            "N",
        ),
        Flag(
            "--max-num-queued-tokens",
            "no more requests (503) while so many prompt tokens wait for their first answer; 0: no limit",
            integer(0),
            "TOKENS",
        ),
        Flag(
            "--sse-keep-alive-interval",
            "send a comment on streams silent for so long; 0: none",
            number(0, 86400),
            "SECONDS",
        ),
        Flag("--max-request-body-size", "longest request body, default 32MiB; longer ones get 413", memory, "SIZE"),
        Flag("--request-body-timeout", "for a request's body to arrive, default 60", number(0.001, 86400), "SECONDS"),
    ),
    "server": (
        Flag("--host", "address to listen on, default 127.0.0.1; 0.0.0.0 opens it to the network"),
        Flag("--port", "default 8000; 0 takes a free one", integer(0, 65535)),
        Flag("--uds", "listen on a Unix socket instead", metavar="PATH"),
        Flag("--root-path", "the path under which a proxy shows the server", path_prefix, "PATH"),
        Flag("--api-key", "accepted keys; also VLLM_API_KEY", metavar="KEY", repeats=True),
        Flag("--ssl-keyfile", "the TLS key; needs --ssl-certfile", metavar="FILE"),
        Flag("--ssl-certfile", "the TLS certificate: serve https", metavar="FILE"),
        Flag("--ssl-ca-certs", "certificates that clients' certificates are checked with", metavar="FILE"),
        Flag("--ssl-cert-reqs", "clients' certificates: 0 none, 1 optional, 2 required", integer(0, 2), "{0,1,2}"),
        Flag(
            "--allowed-origins",
            'CORS origins as a JSON list, default ["*"]; [] switches CORS off',
            json_strings,
            "JSON",
        ),
        Flag("--allowed-methods", 'CORS methods as a JSON list, default ["*"]', json_strings, "JSON"),
        Flag("--allowed-headers", 'CORS headers as a JSON list, default ["*"]', json_strings, "JSON"),
        Flag("--allow-credentials", "let browsers send credentials across origins"),
        Flag(
            "--middleware",
            "an ASGI middleware class, or a function of request and call_next",
            module_path,
            "module.Name",
            repeats=True,
        ),
        Flag("--disable-fastapi-docs", "no /docs and no /openapi.json"),
        Flag("--enable-request-id-headers", "answer with X-Request-Id, the request's own or a new one"),
        Flag(
            "--shutdown-timeout",
            "what open requests get after SIGTERM, default 5; 0: none",
            number(0, 86400),
            "SECONDS",
        ),
    ),
    "logs": (
        Flag("--log-level", "least severe messages to log, default info; also VLLM_LOGGING_LEVEL", _LEVELS),
        Flag("--uvicorn-log-level", "the same for HTTP, if not --log-level", (*_LEVELS, "trace")),
        Flag("--log-format", "text, or json: an object a line", ("text", "json")),
        Flag("--disable-uvicorn-access-log --disable-access-log", "do not log a line for every request"),
        Flag("--disable-access-log-for-endpoints", "paths without a line, separated by commas", metavar="PATHS"),
        Flag("--enable-log-requests", "log the bodies of requests"),
        Flag("--enable-log-outputs", "with --enable-log-requests: log the answers, too"),
        Flag("--max-log-len", "longest body that is logged, in bytes", integer(0), "N"),
    ),
    # For launchers: a listening socket for those who need the server (owners.py).
    "launcher": (Flag("--owners-fd", None, integer(0)),),
}

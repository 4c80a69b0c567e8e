"""From settings to a running engine and the model that the routes serve."""

from __future__ import annotations

import hashlib
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from langchain_vllm_server import _engine, reasoning, tool_parsers
from langchain_vllm_server.chat_messages import RESERVED_KWARGS, content_format
from langchain_vllm_server.chat_template import ChatTemplate
from langchain_vllm_server.checkpoint import load_checkpoint
from langchain_vllm_server.engine_config import to_engine
from langchain_vllm_server.errors import CheckpointError, StartError
from langchain_vllm_server.hub import resolve_model
from langchain_vllm_server.json_schema import Spelling
from langchain_vllm_server.reasoning import ReasoningFormat
from langchain_vllm_server.sampling import model_defaults
from langchain_vllm_server.served_model import ServedModel
from langchain_vllm_server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from langchain_vllm_server.checkpoint import Checkpoint
    from langchain_vllm_server.gate import Progress
    from langchain_vllm_server.settings import Settings

logger = logging.getLogger(__name__)

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_FORMATS = {"float32": "F32", "float": "F32", "bfloat16": "BF16", "float16": "F16", "half": "F16"}
_KV_FORMATS = {**_FORMATS, "int8": "INT8"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What serving needs."""

    engine: _engine.Engine
    model: ServedModel


@dataclass(frozen=True, slots=True)
class Text:
    """How the model reads and writes.

    Attributes:
        tokenizer: The checkpoint's, or that of --tokenizer.
        template_source: Jinja; None: there is no chat template.
        chat_template: The same, compiled.
    """

    tokenizer: Tokenizer
    template_source: str | None
    chat_template: ChatTemplate | None


def load(settings: Settings, progress: Progress) -> Loaded:
    """Find, read and load the model. Blocks.

    Raises:
        CheckpointError: The model was not found, is damaged or not supported.
        ValueError: A setting cannot be met, such as a --max-model-len beyond the model's.
        MemoryError: There is too little memory.
        StartError: The engine does not start, such as on a GPU that fails.
    """
    if settings.device in (None, "auto") and (problem := _engine.cuda_problem()):
        # News to those who asked, or have a GPU; to all others it goes without saying.
        level = logging.INFO if settings.device or NVIDIA_DRIVER.exists() else logging.DEBUG
        logger.log(level, "the model runs on the CPU: %s", problem)
    progress.enter("finding the model")
    path = resolve_model(settings.model, settings.revision, settings.download_dir)
    progress.enter("reading the checkpoint")
    checkpoint = load_checkpoint(path)
    config, tensors = to_engine(checkpoint)
    loading = _engine.Loading()
    progress.enter("loading weights", loading)
    options = engine_options(settings, checkpoint)
    with ThreadPoolExecutor(1, "text") as beside:  # while the engine packs its weights, it leaves Python alone
        reading = beside.submit(read_text, settings, checkpoint)
        try:
            engine = _engine.Engine(config, tensors, options, loading)
        except RuntimeError as error:
            raise StartError(f"the engine does not start: {error}") from error
        try:
            progress.enter("reading the tokenizer")
            return Loaded(engine, served_model(settings, checkpoint, reading.result(), engine.options.max_model_len))
        except BaseException:
            engine.stop()
            raise


def _weight_format(settings: Settings, checkpoint: Checkpoint) -> str:
    """What float weights become; "" keeps each as it is. Raises ValueError where that would change nothing."""
    if settings.quantization is None:
        return _FORMATS.get(settings.dtype, "")
    weights = [tensor for parts in checkpoint.tensors.values() for tensor in parts if len(tensor.shape) == 2]
    if not any(tensor.format in _FORMATS.values() for tensor in weights):
        raise ValueError(
            f"--quantization {settings.quantization}: {checkpoint.path} has {checkpoint.dtype} weights already: leave "
            "the flag out to serve them as they are, or give the model as float weights"
        )
    return settings.quantization.upper()


def engine_options(settings: Settings, checkpoint: Checkpoint) -> _engine.EngineOptions:
    """The settings in the engine's words. Raises ValueError."""
    options = _engine.EngineOptions()
    options.device = settings.device or "auto"
    options.num_threads = settings.threads
    options.memory_bytes = settings.memory
    if settings.gpu_memory_utilization is not None:
        options.gpu_memory_utilization = settings.gpu_memory_utilization
    options.max_model_len = settings.max_model_len
    options.max_position = checkpoint.max_position
    options.max_num_seqs = settings.max_num_seqs
    options.max_num_batched_tokens = settings.max_num_batched_tokens
    options.enforce_eager = settings.enforce_eager
    options.enable_prefix_caching = settings.enable_prefix_caching
    options.weight_format = _weight_format(settings, checkpoint)
    options.exact = options.weight_format == "F32"
    if settings.kv_cache_dtype != "auto":
        options.kv_format = _KV_FORMATS[settings.kv_cache_dtype]
    elif options.weight_format == "F32":
        options.kv_format = "F32"  # who asks for f32 asks for exactness; otherwise f16 is the finer of the two halves
    return options


def read_text(settings: Settings, checkpoint: Checkpoint) -> Text:
    """The text side, which takes long to make. Raises CheckpointError for a bad tokenizer or template."""
    other = settings.tokenizer
    tokenizer = checkpoint.tokenizer if other is None else _other_tokenizer(other, settings)
    source = settings.chat_template if settings.chat_template is not None else checkpoint.chat_template
    return Text(tokenizer, source, None if source is None else _template(source, tokenizer))


def served_model(settings: Settings, checkpoint: Checkpoint, text: Text, max_model_len: int) -> ServedModel:
    """What the routes need to know. Raises CheckpointError and ValueError for a setting that does not fit the model."""
    tokenizer, source = text.tokenizer, text.template_source
    return ServedModel(
        names=settings.served_model_name or (settings.model,),
        root=settings.model,
        version=_engine.__version__,
        tokenizer=tokenizer,
        vocab_size=checkpoint.spec.vocab_size,
        hidden_size=checkpoint.spec.hidden_size,
        max_model_len=max_model_len,
        eos_token_ids=tuple(checkpoint.eos_token_ids),
        chat_template=text.chat_template,
        content_format=_content_format(settings, source),
        chat_template_kwargs=_template_kwargs(settings),
        spelling=_spelling(settings),
        pooling=settings.pooler_config.pooling if settings.pooler_config else "mean",
        sampling_defaults=sampling_defaults(settings, checkpoint.generation_config),
        max_logprobs=settings.max_logprobs,
        return_tokens_as_token_ids=settings.return_tokens_as_token_ids,
        priority_scheduling=settings.scheduling_policy == "priority",
        trust_request_chat_template=settings.trust_request_chat_template,
        force_include_usage=settings.enable_force_include_usage,
        stream_interval=settings.stream_interval,
        cache_block_size=_engine.KV_BLOCK_SIZE if settings.enable_prefix_caching else 0,
        tool_format=_named(tool_parsers, settings.tool_call_parser, source, "--tool-call-parser"),
        reasoning_format=_reasoning_format(settings, source),
        hides_unused_tools=settings.exclude_tools_when_tool_choice_none,
        reasoning_content=settings.reasoning_content,
        tokenizer_info=tokenizer_info(tokenizer, source, max_model_len)
        if settings.enable_tokenizer_info_endpoint
        else None,
        own_fingerprint=_fingerprint(settings, checkpoint),
        response_role=settings.response_role,
        seeds=random.Random(settings.seed),
    )


def _content_format(settings: Settings, template: str | None) -> str:
    if settings.chat_template_content_format != "auto":
        return settings.chat_template_content_format
    return "string" if template is None else content_format(template)


def _template_kwargs(settings: Settings) -> dict[str, Any]:
    kwargs = settings.default_chat_template_kwargs or {}
    if taken := RESERVED_KWARGS & kwargs.keys():
        raise ValueError(f"--default-chat-template-kwargs: {min(taken)} is what requests say in other fields")
    return kwargs


def _spelling(settings: Settings) -> Spelling:
    if (config := settings.structured_outputs_config) is None:
        return Spelling()
    return Spelling(config.disable_any_whitespace, config.disable_additional_properties)


def _reasoning_format(settings: Settings, template: str | None) -> ReasoningFormat | None:
    """Raises ValueError for a parser that there is not."""
    if (marks := settings.reasoning_config) is not None:
        return ReasoningFormat(("custom",), (), opens=(marks.reasoning_start_str,), closes=(marks.reasoning_end_str,))
    config = settings.structured_outputs_config
    name = settings.reasoning_parser or (config.reasoning_parser or None if config else None)
    return cast("ReasoningFormat | None", _named(reasoning, name, template, "--reasoning-parser"))


def tokenizer_info(tokenizer: Tokenizer, template: str | None, max_model_len: int) -> dict[str, Any]:
    """What /tokenizer_info tells: what a tokenizer_config.json would say of the tokenizer that is served."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens,
        "model_max_length": max_model_len,
        "vocab_size": tokenizer.vocab_size,
        "chat_template": template,
    }


def _named(family: Any, name: str | None, template: str | None, flag: str) -> Any:
    """The format that a flag names, else the one that the chat template shows. Raises ValueError."""
    if name is None:
        return family.of_template(template)
    if name not in family.BY_NAME:
        raise ValueError(f"{flag} {name}: expected one of {', '.join(sorted(family.BY_NAME))}")
    return family.BY_NAME[name]


def _fingerprint(settings: Settings, checkpoint: Checkpoint) -> str | None:
    """It changes with what may change the answers to a request with a seed."""
    if settings.fingerprint_mode in ("custom", "none"):
        return settings.fingerprint_value
    served = (str(checkpoint.path), settings.revision, settings.dtype, settings.quantization, settings.kv_cache_dtype)
    digest = hashlib.sha256(repr(served).encode()).hexdigest()
    return f"langchain-vllm-{_engine.__version__}-{digest[:8]}"


def sampling_defaults(settings: Settings, generation_config: dict[str, Any]) -> dict[str, Any]:
    """The model's own, or those of --generation-config, with --override-generation-config. Raises CheckpointError."""
    source = "generation_config.json"
    if settings.generation_config == "vllm":
        generation_config = {}
    elif settings.generation_config != "auto":
        path = Path(settings.generation_config) / source
        source = str(path)
        try:
            generation_config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.MsgspecError) as error:
            raise CheckpointError(f"--generation-config: {path}: {error}") from None
    override = settings.override_generation_config or {}
    overriding = model_defaults(override, "--override-generation-config")
    if unknown := sorted(override.keys() - overriding.keys()):
        raise CheckpointError(f"--override-generation-config: {', '.join(unknown)}: no sampling default of that name")
    return {**model_defaults(generation_config, source), **overriding}


def _other_tokenizer(name: str, settings: Settings) -> Tokenizer:
    """A folder needs no more than the tokenizer's files."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Tokenizer.from_folder(folder)
    return load_checkpoint(resolve_model(name, settings.revision, settings.download_dir)).tokenizer


def _template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    try:
        return ChatTemplate(source, tokenizer.special_tokens)
    except ValueError as error:
        raise CheckpointError(str(error)) from None

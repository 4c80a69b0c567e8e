"""The C++ engine: token ids in, token ids out."""

from collections.abc import Sequence

from typing_extensions import Buffer

class ModelConfig:
    """A transformer as data; see csrc/model/config.h for the meaning of each field."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm: str  # "rms" | "layer"
    norm_eps: float
    activation: str  # "silu" | "gelu" | "gelu_tanh" | "relu"
    gated_mlp: bool
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    attention_scale: float
    clip_qkv: float
    logit_scale: float
    rope_inv_freq: list[float]
    rope_interleaved: bool
    rope_attention_factor: float
    alibi_slopes: list[float]
    sliding_window: list[int]
    def __init__(self) -> None: ...

class TensorInfo:
    """Where a tensor lies in a file. `format` is one of F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K."""

    def __init__(self, name: str, format: str, shape: Sequence[int], file: str, offset: int) -> None: ...
    name: str
    format: str
    shape: list[int]
    file: str
    offset: int

class EngineOptions:
    device: str
    num_threads: int
    memory_bytes: int
    gpu_memory_utilization: float
    max_model_len: int
    max_position: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_format: str  # F32, F16, BF16, or INT8: attention in integers
    weight_format: str  # "" keeps each tensor's own; F32, F16, BF16, INT8 or INT4 converts the plain-float ones
    exact: bool  # multiply with f32 activations: no integers, no bf16
    enforce_eager: bool  # launch every step anew, none as a CUDA graph; a CPU has none
    enable_prefix_caching: bool
    def __init__(self) -> None: ...

class SamplingParams:
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: list[tuple[int, float]]
    seed: int
    num_logprobs: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: list[int]
    allowed_token_ids: list[int]  # empty: all
    bad_words: list[list[int]]
    logprob_token_ids: list[int]
    num_prompt_logprobs: int  # -1: none
    repetition_detection: tuple[int, int, int]  # max_pattern_size (0: off), min_pattern_size, min_count
    pooling: str  # "" | "last" | "mean": a vector in place of tokens; max_tokens is 0 then
    priority: int
    cache_salt: str
    constrained: bool  # somebody must answer wait_masks()
    eager: bool  # every token makes fileno() readable at once; otherwise the first and the last
    def __init__(self) -> None: ...

class Loading:
    def __init__(self) -> None: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes_total(self) -> int: ...

class Event:
    request_id: int
    tokens: list[int]
    logprobs: list[list[tuple[int, float, int]]]  # per token: (token, logprob, rank), the chosen one first
    prompt_logprobs: list[list[tuple[int, float, int]]]  # likewise, of all prompt tokens but the first
    embedding: list[float]  # f32, hidden_size of them; of a pooling request
    finish: str  # "" | "stop" | "length" | "abort" | "error" | "repetition"
    error: str  # why, where an error is this request's own
    num_cached_tokens: int
    scheduled_time: float  # time.monotonic()
    time: float

class Stats:
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_steps: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    step_tokens: int  # of all steps
    steps_by_size: list[int]  # [k]: steps of more than 2**(k-1) and at most 2**k tokens
    block_size: int  # tokens
    last_step_time: float
    alive: bool
    error: str

class Engine:
    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, list[TensorInfo]],
        options: EngineOptions,
        loading: Loading,
    ) -> None:
        """Load and start, with the GIL released. Raises ValueError (bad checkpoint or options) or MemoryError."""

    def submit(self, request_id: int, prompt: Sequence[int], params: SamplingParams) -> None:
        """Queue a request; ids only grow.

        Raises ValueError naming the parameter that can never be served, RuntimeError when the engine has stopped.
        """

    def cancel(self, request_id: int) -> None: ...
    def forget_prefixes(self) -> None:
        """Empty the prefix cache of what no live request holds, before the next step."""

    def fileno(self) -> int:
        """Readable when `drain` has something."""

    def drain(self) -> list[Event]: ...
    def stats(self) -> Stats: ...
    def wait_masks(self) -> list[tuple[int, list[int], int]] | None:
        """Wait, with the GIL released, for what constrained rows need to know; None when the engine has stopped.

        For each: the request's id, the tokens appended to its answer since it was asked about last, and the address of
        its mask: (vocab_size + 31) // 32 words of uint32, all 0, bit i % 32 of word i // 32 for token i.
        """

    def answer_masks(self, answers: list[tuple[list[int], str]]) -> None:
        """For each: tokens that must come next, why the request has to end, or neither and its mask is filled."""

    def stop(self) -> None: ...
    @property
    def options(self) -> EngineOptions:
        """As given, with the defaults filled in."""

    @property
    def weight_bytes(self) -> int: ...
    @property
    def device_name(self) -> str: ...

KV_BLOCK_SIZE: int
__version__: str

def cuda_problem() -> str:
    """Why no GPU can be used here, with the remedy; empty if one can."""

def dequantize(format: str, data: bytes, count: int) -> bytes:
    """`count` numbers of a row in `format` as little-endian f32: the scalar definition of the format."""

def read_strings(data: Buffer, position: int, end: int, count: int) -> tuple[list[str], int]:
    """Strings as GGUF has them, each after its length in eight bytes (little-endian), and where they end.

    Where that is beyond `end`, one of them would go so far: then the strings are those before it.

    Raises UnicodeDecodeError for one that is not UTF-8, ValueError for a position or an end outside the data.
    """

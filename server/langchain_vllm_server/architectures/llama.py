"""The Llama family: RMSNorm, rotary positions, grouped-query attention, a gated MLP. Mistral adds a sliding window."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from langchain_vllm_server.fields import Fields
from langchain_vllm_server.model_spec import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, Model, ModelSpec
from langchain_vllm_server.rope import Rope, compute_rope, f32

if TYPE_CHECKING:
    from langchain_vllm_server.model_spec import TensorNames

HF_ROLES = {
    "embed": ["model.embed_tokens.weight"],
    "final_norm": ["model.norm.weight"],
    "lm_head": ["lm_head.weight"],
    "layers.{i}.attn_norm": ["model.layers.{i}.input_layernorm.weight"],
    "layers.{i}.qkv": [
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ],
    "layers.{i}.attn_out": ["model.layers.{i}.self_attn.o_proj.weight"],
    "layers.{i}.mlp_norm": ["model.layers.{i}.post_attention_layernorm.weight"],
    "layers.{i}.mlp_in": ["model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"],
    "layers.{i}.mlp_out": ["model.layers.{i}.mlp.down_proj.weight"],
}

GGUF_ROLES = {
    "embed": ["token_embd.weight"],
    "final_norm": ["output_norm.weight"],
    "lm_head": ["output.weight"],
    "layers.{i}.attn_norm": ["blk.{i}.attn_norm.weight"],
    "layers.{i}.qkv": ["blk.{i}.attn_q.weight", "blk.{i}.attn_k.weight", "blk.{i}.attn_v.weight"],
    "layers.{i}.attn_out": ["blk.{i}.attn_output.weight"],
    "layers.{i}.mlp_norm": ["blk.{i}.ffn_norm.weight"],
    "layers.{i}.mlp_in": ["blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight"],
    "layers.{i}.mlp_out": ["blk.{i}.ffn_down.weight"],
}

# config.json's hidden_act → the engine's activation.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# GGUF metadata → the name in config.json's rope parameters.
_GGUF_ROPE = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


# What MistralConfig means by a field that is absent; null is none.
_MISTRAL_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def from_config(config: Fields) -> Model:
    """LlamaForCausalLM, as transformers' LlamaConfig describes it."""
    act = config.text("hidden_act", "silu")
    if act not in _ACTIVATIONS:
        raise config.error("hidden_act", f"{act!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    heads = config.count("num_attention_heads", maximum=MAX_HEADS)
    head_dim = _head_dim(config, "head_dim", config.count("hidden_size"), heads)
    max_position = config.count("max_position_embeddings", 2048)
    inv_freq, attention_factor = _config_rope(config, head_dim, max_position)
    layers = config.count("num_hidden_layers", maximum=MAX_LAYERS)
    spec = ModelSpec(
        vocab_size=config.count("vocab_size"),
        hidden_size=config.count("hidden_size"),
        intermediate_size=config.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        norm="rms",
        norm_eps=config.number("rms_norm_eps", 1e-6, positive=True),
        activation=_ACTIVATIONS[act],
        gated_mlp=True,
        attention_scale=head_dim**-0.5,
        rope_inv_freq=inv_freq,
        rope_attention_factor=attention_factor,
        sliding_window=(0,) * layers,
    )
    # transformers ties nothing that the checkpoint holds twice, so an lm_head that is there counts either way.
    tied = config.flag("tie_word_embeddings", default=False)
    unused = (r".*\.rotary_emb\.inv_freq",)  # older transformers stored them: always the unscaled ones
    return Model(spec, max_position, HF_ROLES, tied, _config_biases(config), unused)


def mistral_from_config(config: Fields) -> Model:
    """MistralForCausalLM: Llama with a window, the same in every layer."""
    config = Fields({**_MISTRAL_DEFAULTS, **config.values}, config.source)
    model = from_config(config)
    window = config.count("sliding_window", 0, minimum=0)
    spec = replace(model.spec, sliding_window=(window,) * model.spec.num_hidden_layers)
    return replace(model, spec=spec)


def from_gguf(metadata: Fields, tensors: TensorNames) -> Model:
    """GGUF's `llama`, which covers Mistral too. Its q and k rows are ordered for rotating neighbouring pairs."""
    settings = llama_section(metadata)
    heads = settings.count("attention.head_count", maximum=MAX_HEADS)
    head_dim = _head_dim(settings, "attention.key_length", settings.count("embedding_length"), heads)
    settings.refuse("attention.value_length", head_dim)
    max_position = settings.count("context_length")
    inv_freq, attention_factor = _gguf_rope(settings, head_dim, max_position, tensors)
    layers = settings.count("block_count", maximum=MAX_LAYERS)
    spec = ModelSpec(
        vocab_size=settings.count("vocab_size", tensors.rows("token_embd.weight")),
        hidden_size=settings.count("embedding_length"),
        intermediate_size=settings.count("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(settings, "attention.head_count_kv", heads),
        head_dim=head_dim,
        norm="rms",
        norm_eps=settings.number("attention.layer_norm_rms_epsilon", positive=True),
        activation="silu",
        gated_mlp=True,
        attention_scale=head_dim**-0.5,
        rope_inv_freq=inv_freq,
        rope_interleaved=True,
        rope_attention_factor=attention_factor,
        sliding_window=(settings.count("attention.sliding_window", 0, minimum=0),) * layers,
    )
    return Model(spec, max_position, GGUF_ROLES, tied=True, unused=(r"rope_freqs\.weight",))


def _config_biases(config: Fields) -> dict[str, bool]:
    attention, mlp = config.flag("attention_bias", default=False), config.flag("mlp_bias", default=False)
    return {
        **dict.fromkeys(HF_ROLES, False),
        **dict.fromkeys(("layers.{i}.qkv", "layers.{i}.attn_out"), attention),
        **dict.fromkeys(("layers.{i}.mlp_in", "layers.{i}.mlp_out"), mlp),
    }


def _config_rope(config: Fields, head_dim: int, max_position: int) -> Rope:
    """Both spellings: `rope_parameters`, and the older `rope_scaling` with `rope_theta` beside it."""
    name = "rope_scaling" if config.get("rope_scaling", None) else "rope_parameters"
    values = dict(config.section(name).values)
    if any(isinstance(value, dict) for value in values.values()):
        raise config.error(name, "one set of values for each kind of layer is not supported")
    for outside in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if values.get(outside) is None:
            values[outside] = config.get(outside, None)
    rope = Fields(values, config.source, f"{name}.")
    rope.refuse("partial_rotary_factor", 1)
    return compute_rope(rope, head_dim, max_position)


def llama_section(metadata: Fields) -> Fields:
    """GGUF's settings of a `llama`, without their prefix."""
    prefix = "llama."
    values = {k.removeprefix(prefix): v for k, v in metadata.values.items() if k.startswith(prefix)}
    settings = Fields(values, metadata.source, prefix)
    settings.refuse("attention.clamp_kqv", 0)
    settings.refuse("rope.scaling.yarn_ext_factor", 1, -1)
    settings.refuse("rope.scaling.yarn_log_multiplier", 0)
    settings.refuse("expert_shared_count", 0)
    for scale in ("attention.scale", "logit_scale", "embedding_scale", "residual_scale", "expert_weights_scale"):
        settings.refuse(scale, 0, 1)
    return settings


def _gguf_rope(settings: Fields, head_dim: int, max_position: int, tensors: TensorNames) -> Rope:
    dim = settings.count("rope.dimension_count", head_dim, maximum=head_dim)
    values = {ours: settings.get(theirs, None) for theirs, ours in _GGUF_ROPE.items()}
    if values["rope_type"] is None:
        values["rope_type"] = "linear"  # llama.cpp's reading of a file that names no type
        values["factor"] = values["factor"] or settings.get("rope.scale_linear", 1.0)
    elif values["rope_type"] == "none":
        values["rope_type"] = "default"
    inv_freq, attention_factor = compute_rope(Fields(values, settings.source, "llama.rope: "), dim, max_position)
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        attention_factor *= settings.number(name, 1.0, positive=True)
    if "rope_freqs.weight" in tensors:
        inv_freq = _divided(inv_freq, tensors.floats("rope_freqs.weight"), settings)
    return inv_freq, attention_factor


def _divided(inv_freq: tuple[float, ...], factors: list[float], settings: Fields) -> tuple[float, ...]:
    """Llama 3's scaling, which GGUF stores as one divisor per frequency."""
    if len(factors) != len(inv_freq) or not all(0 < factor < math.inf for factor in factors):
        problem = f"expected {len(inv_freq)} positive numbers, found {len(factors)} or some that are not"
        raise settings.error("rope_freqs.weight", problem)
    return tuple(f32(f / factor) for f, factor in zip(inv_freq, factors, strict=True))


def _head_dim(fields: Fields, name: str, hidden_size: int, heads: int) -> int:
    if name not in fields and hidden_size % heads:
        raise fields.error(name, f"missing, and {heads} heads do not divide a hidden size of {hidden_size}")
    return fields.count(name, hidden_size // heads, maximum=MAX_HEAD_DIM)


def _kv_heads(fields: Fields, name: str, heads: int) -> int:
    kv_heads = fields.count(name, heads)
    if heads % kv_heads:
        raise fields.error(name, f"expected a divisor of the {heads} attention heads, found {kv_heads}")
    return kv_heads

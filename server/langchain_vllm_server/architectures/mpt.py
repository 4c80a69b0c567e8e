"""MPT: LayerNorm, ALiBi positions, one fused qkv matrix, a plain MLP, embeddings tied to the output.

Described by mosaicml/llm-foundry's MPTConfig and transformers' MptConfig, which read the same config.json.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from langchain_vllm_server.model_spec import MAX_HEADS, MAX_LAYERS, Model, ModelSpec
from langchain_vllm_server.rope import f32

if TYPE_CHECKING:
    from langchain_vllm_server.fields import Fields

_ROLES = {
    "embed": ["transformer.wte.weight"],
    "final_norm": ["transformer.norm_f.weight"],
    "lm_head": ["lm_head.weight"],
    "layers.{i}.attn_norm": ["transformer.blocks.{i}.norm_1.weight"],
    "layers.{i}.qkv": ["transformer.blocks.{i}.attn.Wqkv.weight"],
    "layers.{i}.attn_out": ["transformer.blocks.{i}.attn.out_proj.weight"],
    "layers.{i}.mlp_norm": ["transformer.blocks.{i}.norm_2.weight"],
    "layers.{i}.mlp_in": ["transformer.blocks.{i}.ffn.up_proj.weight"],
    "layers.{i}.mlp_out": ["transformer.blocks.{i}.ffn.down_proj.weight"],
}


def from_config(config: Fields) -> Model:
    """MPTForCausalLM (mosaicml) and MptForCausalLM (transformers)."""
    attention = config.section("attn_config")
    _refuse_variants(config, attention)
    layers = config.count("n_layers", 24, maximum=MAX_LAYERS)
    hidden, heads = config.count("d_model", 2048), config.count("n_heads", 16, maximum=MAX_HEADS)
    if hidden % heads:
        raise config.error("n_heads", f"expected a divisor of d_model ({hidden}), found {heads}")
    head_dim = hidden // heads
    expansion = config.number("expansion_ratio", 4, positive=True)
    spec = ModelSpec(
        vocab_size=config.count("vocab_size", 50368),
        hidden_size=hidden,
        intermediate_size=int(expansion * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5, positive=True),
        activation="gelu",
        gated_mlp=False,
        attention_scale=attention.number("softmax_scale", head_dim**-0.5, positive=True),
        clip_qkv=_clip(attention),
        logit_scale=_logit_scale(config, hidden),
        alibi_slopes=alibi_slopes(heads, attention.number("alibi_bias_max", 8, positive=True)),
        sliding_window=(0,) * layers,
    )
    return Model(spec, config.count("max_seq_len", 2048), _ROLES, tied=config.flag("tie_word_embeddings", default=True))


def alibi_slopes(heads: int, bias_max: float) -> tuple[float, ...]:
    """How fast each head's attention fades with distance: 2^(-bias_max·k/n), k = 1 … n, n the next power of two.

    Where the head count is not a power of two, the even ones of the n come first, then the odd ones (arXiv 2108.12409).
    """
    power = 1 << (heads - 1).bit_length()
    slopes = [f32(2.0 ** -f32(k * f32(bias_max / power))) for k in range(1, power + 1)]
    if power != heads:
        slopes = slopes[1::2] + slopes[::2]
    return tuple(slopes[:heads])


def _refuse_variants(config: Fields, attention: Fields) -> None:
    # learned_pos_emb has no say here: with ALiBi neither implementation makes position embeddings.
    if not attention.flag("alibi", default=True):
        raise attention.error("alibi", "false (learned positions) is not supported, only true")
    attention.refuse("attn_type", "multihead_attention")
    for name in ("prefix_lm", "qk_ln", "qk_gn", "attn_uses_sequence_id", "rope"):
        attention.refuse(name, False)
    attention.refuse("sliding_window_size", -1)
    config.refuse("norm_type", "low_precision_layernorm", "layernorm")
    config.section("ffn_config").refuse("ffn_type", "mptmlp")


def _clip(attention: Fields) -> float:
    clip = attention.number("clip_qkv", 0)
    if clip < 0:
        raise attention.error("clip_qkv", f"expected a positive number or null, found {clip}")
    return clip


def _logit_scale(config: Fields, hidden: int) -> float:
    if config.get("logit_scale", None) == "inv_sqrt_d_model":
        return 1 / math.sqrt(hidden)
    return config.number("logit_scale", 1)

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MixtralConfig, MptConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import langchain_vllm_server
from langchain_vllm_server.architectures import model_from_config, model_from_gguf
from langchain_vllm_server.architectures.mpt import alibi_slopes
from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.fields import Fields
from langchain_vllm_server.model_spec import Model, ModelSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
MIXTRAL = {**MISTRAL, "architectures": ["MixtralForCausalLM"]}
# mosaicml/mpt-7b's config.json, as far as it says anything about the model.
MPT: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 4096,
    "expansion_ratio": 4,
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "torch_dtype": "bfloat16",
    "vocab_size": 50432,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.7},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
    "yarn, factor inferred": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
    "yarn, betas": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 20,
        "beta_slow": 2.5,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.3,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 100,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
}

# A power in float32 is right to 2 units in the last place, a reciprocal, product or sum to half of one; the longest
# chain (YaRN: power, product, reciprocal, product, sum; two terms) adds up to fewer than 8.
ROPE_TOLERANCE = 8 * np.finfo(np.float32).eps


class Tensors:
    """What a GGUF file holds beside its metadata."""

    def __init__(self, floats: dict[str, list[float]] | None = None) -> None:
        self._floats = floats or {}

    def __contains__(self, name: object) -> bool:
        return name in self._floats

    def rows(self, name: str) -> int:
        assert name == "token_embd.weight"
        return 128

    def floats(self, name: str) -> list[float]:
        return self._floats[name]


def from_config(config: dict[str, Any]) -> Model:
    return model_from_config(Fields(config, "config.json"))[1]


def from_gguf(metadata: dict[str, Any], floats: dict[str, list[float]] | None = None) -> Model:
    return model_from_gguf(Fields(metadata, "model.gguf"), Tensors(floats))[1]


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_that_of_transformers(rope: str, spelling: str, head_dim: int, theta: float) -> None:
    values = ROPES[rope]
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=head_dim, max_position_embeddings=4096, rope_parameters={**values, "rope_theta": theta})
    )
    if spelling == "rope_parameters":
        config = {"rope_parameters": {**values, "rope_theta": theta}}
    else:
        config = {"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in values.items()}}
        config["rope_theta"] = theta  # type: ignore[assignment]
    spec = from_config({**LLAMA, "head_dim": head_dim, **config}).spec
    np.testing.assert_allclose(spec.rope_inv_freq, theirs.inv_freq.numpy(), rtol=ROPE_TOLERANCE, atol=0)
    assert all(f == float(np.float32(f)) for f in spec.rope_inv_freq)
    assert spec.rope_attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-15)


def test_gguf_rope_is_the_same_rope() -> None:
    plain = from_gguf(GGUF).spec
    assert plain.rope_interleaved
    assert plain.rope_inv_freq == from_config(LLAMA).spec.rope_inv_freq
    for name, factor in (("rope.scaling.factor", "rope.scaling.type"), ("rope.scale_linear", "")):
        metadata = {**GGUF, f"llama.{name}": 4.0, **({f"llama.{factor}": "linear"} if factor else {})}
        assert from_gguf(metadata).spec.rope_inv_freq == tuple(f / 4 for f in plain.rope_inv_freq)
    none = {**GGUF, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    assert from_gguf(none).spec.rope_inv_freq == plain.rope_inv_freq
    scaling = {"type": "yarn", "factor": 8.0, "original_context_length": 512}
    yarn = from_gguf({**GGUF, **{f"llama.rope.scaling.{k}": v for k, v in scaling.items()}}).spec
    theirs = from_config({**LLAMA, "rope_scaling": ROPES["yarn"]}).spec
    assert yarn.rope_inv_freq == theirs.rope_inv_freq
    assert yarn.rope_attention_factor == theirs.rope_attention_factor == 0.1 * math.log(8) + 1


def test_gguf_rope_freqs_are_llama_3s_scaling() -> None:
    llama3 = from_config({**LLAMA, "rope_scaling": ROPES["llama3"]}).spec.rope_inv_freq
    plain = from_gguf(GGUF).spec.rope_inv_freq
    factors = [float(np.float32(a / b)) for a, b in zip(plain, llama3, strict=True)]
    found = from_gguf(GGUF, {"rope_freqs.weight": factors}).spec.rope_inv_freq
    np.testing.assert_allclose(found, llama3, rtol=2 * np.finfo(np.float32).eps)
    for wrong in (factors[1:], [0.0, *factors[1:]], [math.nan, *factors[1:]], [math.inf, *factors[1:]]):
        with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: expected 32 positive numbers"):
            from_gguf(GGUF, {"rope_freqs.weight": wrong})


def test_gguf_may_rotate_a_part_of_each_head() -> None:
    spec = from_gguf({**GGUF, "llama.rope.dimension_count": 32}).spec
    assert (spec.head_dim, len(spec.rope_inv_freq)) == (64, 16)


@pytest.mark.parametrize("heads", range(1, 21))
@pytest.mark.parametrize("bias_max", [8, 5])
def test_alibi_slopes_are_those_of_transformers(heads: int, bias_max: int) -> None:
    # The tensor is (heads, 1, positions) with slope * (position - last); position last - 1 gives -slope.
    theirs = -build_mpt_alibi_tensor(heads, 2, bias_max)[:, 0, 0].numpy()
    slopes = alibi_slopes(heads, bias_max)
    np.testing.assert_allclose(slopes, theirs, rtol=3 * np.finfo(np.float32).eps, atol=0)  # a power and a reciprocal


def test_llama() -> None:
    name, model = model_from_config(Fields(LLAMA, "config.json"))
    assert name == "LlamaForCausalLM"
    assert model.max_position == 4096
    assert not model.tied
    spec = dataclasses.replace(model.spec, rope_inv_freq=())
    assert spec == ModelSpec(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        norm="rms",
        norm_eps=1e-6,
        activation="silu",
        gated_mlp=True,
        attention_scale=0.125,
        sliding_window=(0, 0),
    )


def test_llama_options() -> None:
    options = {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    model = from_config({**LLAMA, **options, "attention_bias": True, "sliding_window": 7, "hidden_act": "gelu_new"})
    spec = model.spec
    assert (spec.num_key_value_heads, spec.head_dim, spec.norm_eps, model.tied) == (2, 32, 1e-5, True)
    assert spec.attention_scale == 32**-0.5
    assert spec.activation == "gelu_tanh"
    assert spec.sliding_window == (0, 0)  # LlamaForCausalLM knows none
    assert {role for role, bias in model.biased.items() if bias} == {"layers.{i}.qkv", "layers.{i}.attn_out"}
    model = from_config({**LLAMA, "mlp_bias": True})
    assert {role for role, bias in model.biased.items() if bias} == {"layers.{i}.mlp_in", "layers.{i}.mlp_out"}


@pytest.mark.parametrize(
    ("change", "window"), [({}, 4096), ({"sliding_window": 100}, 100), ({"sliding_window": None}, 0)]
)
def test_mistral_has_a_window(change: dict[str, Any], window: int) -> None:
    assert from_config({**MISTRAL, **change}).spec.sliding_window == (window, window)


def test_mixtral() -> None:
    """With what MixtralConfig takes for what is absent."""
    name, model = model_from_config(Fields(MIXTRAL, "config.json"))
    theirs = MixtralConfig()
    spec = model.spec
    assert name == "MixtralForCausalLM"
    assert (spec.num_experts, spec.num_experts_per_tok) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    assert (spec.norm_eps, spec.norm_topk_prob, spec.sliding_window) == (theirs.rms_norm_eps, True, (0, 0))
    assert spec.rope_inv_freq == from_config({**LLAMA, "rope_theta": theirs.default_theta}).spec.rope_inv_freq
    absent = {"max_position_embeddings", "num_key_value_heads"}
    sparse = {key: value for key, value in MIXTRAL.items() if key not in absent}
    changed = from_config({**sparse, "num_attention_heads": 8, "num_local_experts": 4, "num_experts_per_tok": 3})
    assert (changed.spec.num_experts, changed.spec.num_experts_per_tok) == (4, 3)
    assert changed.spec.num_key_value_heads == theirs.num_key_value_heads
    assert changed.max_position == theirs.max_position_embeddings
    assert from_config({**MIXTRAL, "sliding_window": 100}).spec.sliding_window == (100, 100)


def test_a_llama_of_experts_in_gguf_is_a_mixtral() -> None:
    metadata = {**GGUF, "llama.expert_count": 8, "llama.expert_used_count": 3}
    name, model = model_from_gguf(Fields(metadata, "model.gguf"), Tensors())
    assert (name, model.spec.num_experts, model.spec.num_experts_per_tok) == ("MixtralForCausalLM", 8, 3)
    name, model = model_from_gguf(Fields({**GGUF, "llama.expert_count": 0}, "model.gguf"), Tensors())
    assert (name, model.spec.num_experts, model.spec.num_experts_per_tok) == ("LlamaForCausalLM", 0, 0)


def test_mpt_7b() -> None:
    model = from_config(MPT)
    assert (model.max_position, model.tied) == (2048, True)
    assert model.spec.alibi_slopes == alibi_slopes(32, 8)
    assert dataclasses.replace(model.spec, alibi_slopes=()) == ModelSpec(
        vocab_size=50432,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        gated_mlp=False,
        attention_scale=128**-0.5,
        sliding_window=(0,) * 32,
    )


def test_mpt_options() -> None:
    attention = {"clip_qkv": 6, "softmax_scale": 0.5, "alibi_bias_max": 4}
    config = {**MPT, "attn_config": {**MPT["attn_config"], **attention}, "logit_scale": "inv_sqrt_d_model"}
    spec = from_config({**config, "expansion_ratio": 2, "layer_norm_epsilon": 1e-6}).spec
    assert (spec.clip_qkv, spec.attention_scale, spec.norm_eps) == (6, 0.5, 1e-6)
    assert spec.alibi_slopes == alibi_slopes(32, 4)
    assert (spec.logit_scale, spec.intermediate_size) == (1 / 64, 8192)
    assert from_config({**MPT, "logit_scale": 0.25}).spec.logit_scale == 0.25


def test_mpt_as_transformers_writes_it() -> None:
    config = MptConfig(d_model=48, n_heads=6, n_layers=2, vocab_size=100, architectures=["MptForCausalLM"]).to_dict()
    spec = from_config(config).spec
    assert (spec.hidden_size, spec.head_dim, spec.intermediate_size, spec.norm_eps) == (48, 8, 192, 1e-5)
    assert spec.alibi_slopes == alibi_slopes(6, 8)


def attn(**changes: Any) -> dict[str, Any]:
    return {"attn_config": {**MPT["attn_config"], **changes}}


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": changes}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "architecture": (
        LLAMA,
        {"architectures": ["GPT2LMHeadModel"]},
        "'GPT2LMHeadModel' is not .*: LlamaFor",
    ),
    "no architecture": (LLAMA, {"architectures": []}, "architectures: expected a list of one name"),
    "architecture text": (LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures: expected a list"),
    "quantised": (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config: method 'awq'"),
    "activation": (LLAMA, {"hidden_act": "mish"}, "hidden_act: 'mish' is not supported; supported: silu"),
    "missing": (LLAMA, {"hidden_size": None}, "config.json: hidden_size: missing"),
    "text": (LLAMA, {"hidden_size": "256"}, "hidden_size: expected a whole number .* found '256'"),
    "fraction": (LLAMA, {"vocab_size": 1.5}, "vocab_size: expected a whole number"),
    "boolean": (LLAMA, {"vocab_size": True}, "vocab_size: expected a whole number"),
    "negative": (LLAMA, {"intermediate_size": -1}, "intermediate_size: expected a whole number"),
    "absurd": (LLAMA, {"num_hidden_layers": 1 << 30}, "num_hidden_layers: expected a whole number from 1 to 16384"),
    "kv heads": (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of the 4"),
    "heads": (LLAMA, {"num_attention_heads": 3}, "head_dim: missing, and 3 heads do not divide"),
    "odd head": (LLAMA, {"head_dim": 63}, "expected an even number"),
    "eps": (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps: expected a positive number"),
    "eps NaN": (LLAMA, {"rms_norm_eps": math.nan}, "rms_norm_eps: expected a finite number"),
    "bias flag": (LLAMA, {"attention_bias": "yes"}, "attention_bias: expected true or false"),
    "rope type": (
        LLAMA,
        rope(rope_type="longrope"),
        "rope_scaling.rope_type: 'longrope' is not .*: def",
    ),
    "rope object": (LLAMA, {"rope_scaling": [1]}, "rope_scaling: expected an object"),
    "rope factor": (LLAMA, rope(rope_type="linear"), "rope_scaling.factor: missing"),
    "rope factor 0": (LLAMA, rope(rope_type="linear", factor=0), "rope_scaling.factor: expected a positive number"),
    "rope theta": (LLAMA, {"rope_theta": -1}, "rope_theta: expected a positive number"),
    "rope theta huge": (LLAMA, {"rope_theta": 1e300}, "rope_theta: expected a finite number"),
    "rope tiny": (LLAMA, {"rope_theta": 1e-45}, "infinite frequencies"),
    "rope theta 0": (LLAMA, {"rope_theta": 1e-60}, "infinite frequencies"),
    "yarn factor": (LLAMA, rope(rope_type="yarn", factor=1e-200), "infinite frequencies"),
    "yarn mscale": (
        LLAMA,
        rope(rope_type="yarn", factor=2, mscale=1, mscale_all_dim=-10 / math.log(2)),
        "mscale_all_dim: .* makes the attention factor infinite",
    ),
    "rope per layer": (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "each kind of layer"),
    "llama3": (
        LLAMA,
        rope(rope_type="llama3", factor=2, low_freq_factor=4, high_freq_factor=4),
        "high_freq_factor: expected more than",
    ),
    "yarn theta": (LLAMA, {"rope_theta": 1, **rope(rope_type="yarn", factor=2)}, "expected more than 1 for yarn"),
    "partial": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    "window": (MISTRAL, {"sliding_window": -5}, "sliding_window: expected a whole number from 0"),
    "no experts": (MIXTRAL, {"num_local_experts": 0}, "num_local_experts: expected a whole number from 1"),
    "more than all experts": (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok: .* from 1 to 8, found 9"),
    "alibi": (MPT, attn(alibi=False), "attn_config.alibi: false .learned positions. is not supported"),
    "prefix": (MPT, attn(prefix_lm=True), "attn_config.prefix_lm: True is not supported .only False"),
    "qk_ln": (MPT, attn(qk_ln=True), "attn_config.qk_ln"),
    "sequence ids": (MPT, attn(attn_uses_sequence_id=True), "attn_config.attn_uses_sequence_id"),
    "multi-query": (MPT, attn(attn_type="multiquery_attention"), "attn_config.attn_type: 'multiquery_attention'"),
    "mpt rope": (MPT, attn(rope=True), "attn_config.rope"),
    "mpt window": (MPT, attn(sliding_window_size=512), "attn_config.sliding_window_size"),
    "clip": (MPT, attn(clip_qkv=-1), "attn_config.clip_qkv: expected a positive number"),
    "norm": (MPT, {"norm_type": "rmsnorm"}, "norm_type: 'rmsnorm' is not supported .only 'low_precision_layernorm'"),
    "ffn": (MPT, {"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type"),
    "mpt heads": (MPT, {"n_heads": 7}, "n_heads: expected a divisor of d_model"),
    "mpt many heads": (MPT, {"n_heads": 1 << 31}, "n_heads: expected a whole number"),
    "logit scale": (MPT, {"logit_scale": "big"}, "logit_scale: expected a finite number, found 'big'"),
}
GGUF_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"general.architecture": "qwen2"},
        "general.architecture: 'qwen2' is not .*: llama",
    ),
    "missing": ({"llama.block_count": None}, "model.gguf: llama.block_count: missing"),
    "per layer": ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count: expected a whole number"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_used_count: missing"),
    "many experts": ({"llama.expert_count": 1 << 20}, "llama.expert_count: expected a whole number"),
    "more than all experts": (
        {"llama.expert_count": 8, "llama.expert_used_count": 9},
        "llama.expert_used_count: expected a whole number from 1 to 8, found 9",
    ),
    "shared experts": ({"llama.expert_shared_count": 1}, "llama.expert_shared_count: 1 is not supported"),
    "scaled experts": ({"llama.expert_weights_scale": 2.5}, "llama.expert_weights_scale: 2.5 is not supported"),
    "value length": ({"llama.attention.value_length": 32}, "llama.attention.value_length: 32 .* .only 64"),
    "clamp": ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv"),
    "logit scale": ({"llama.logit_scale": 0.1}, "llama.logit_scale"),
    "rope dimensions": ({"llama.rope.dimension_count": 65}, "llama.rope.dimension_count: expected .* to 64"),
    "rope odd": ({"llama.rope.dimension_count": 63}, "expected an even number"),
    "rope type": ({"llama.rope.scaling.type": "longrope"}, "rope_type: 'longrope' is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case: str) -> None:
    base, change, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        from_config({**base, **change})


@pytest.mark.parametrize("case", GGUF_REFUSED)
def test_what_is_not_supported_in_gguf_is_refused_by_name(case: str) -> None:
    change, message = GGUF_REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        from_gguf({**GGUF, **change})


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=3)
rope_keys = ["rope_type", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "attention_factor", "mscale"]


@pytest.mark.parametrize(
    "base", [LLAMA, MISTRAL, MIXTRAL, MPT, GGUF], ids=["llama", "mistral", "mixtral", "mpt", "gguf"]
)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_value_is_read_or_refused(base: dict[str, Any], data: st.DataObject) -> None:
    keys = [*base, "head_dim", "hidden_act", "rms_norm_eps", "sliding_window", "rope_theta", "attention_bias"]
    keys += ["num_local_experts", "num_experts_per_tok", "llama.expert_count", "llama.expert_used_count"]
    keys += ["rope_scaling", "rope_parameters", "expansion_ratio", "layer_norm_epsilon", "llama.rope.scaling.factor"]
    changed = {**base, **data.draw(st.dictionaries(st.sampled_from(keys), values, max_size=3))}
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
        changed["rope_scaling"] = {
            "rope_type": kind,
            **data.draw(st.dictionaries(st.sampled_from(rope_keys), scalars)),
        }
    try:
        model = from_gguf(changed) if base is GGUF else from_config(changed)
    except CheckpointError:
        return
    assert all(math.isfinite(f) for f in (*model.spec.rope_inv_freq, *model.spec.alibi_slopes))


def test_the_spec_has_the_fields_of_the_engines_config() -> None:
    stub = Path(langchain_vllm_server.__file__).with_name("_engine.pyi")
    classes = {c.name: c for c in ast.parse(stub.read_text()).body if isinstance(c, ast.ClassDef)}
    names = [a.target.id for a in classes["ModelConfig"].body if isinstance(a, ast.AnnAssign)]  # type: ignore[union-attr]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(ModelSpec))

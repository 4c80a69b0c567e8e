"""Mixtral: Mistral with a mixture of experts for an MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from langchain_vllm_server.architectures import llama
from langchain_vllm_server.fields import Fields
from langchain_vllm_server.model_spec import MAX_EXPERTS, Model

if TYPE_CHECKING:
    from langchain_vllm_server.model_spec import TensorNames

_HF_EXPERTS = {
    "layers.{i}.router": ["model.layers.{i}.block_sparse_moe.gate.weight"],
    "layers.{i}.mlp_in": [
        "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
        "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    ],
    "layers.{i}.mlp_out": ["model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight"],
}

_GGUF_EXPERTS = {
    "layers.{i}.router": ["blk.{i}.ffn_gate_inp.weight"],
    "layers.{i}.mlp_in": ["blk.{i}.ffn_gate_exps.weight[{e}]", "blk.{i}.ffn_up_exps.weight[{e}]"],
    "layers.{i}.mlp_out": ["blk.{i}.ffn_down_exps.weight[{e}]"],
}

# What MixtralConfig means by a field that is absent.
_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def from_config(config: Fields) -> Model:
    """MixtralForCausalLM, as transformers' MixtralConfig describes it."""
    config = Fields({**_DEFAULTS, **config.values}, config.source)
    model = llama.from_config(config)
    window = config.count("sliding_window", 0, minimum=0)
    spec = replace(model.spec, sliding_window=(window,) * model.spec.num_hidden_layers)
    return _with_experts(replace(model, spec=spec), config, "num_local_experts", "num_experts_per_tok", _HF_EXPERTS)


def from_gguf(metadata: Fields, tensors: TensorNames) -> tuple[str, Model]:
    """GGUF's `llama`, which is Mixtral where it has experts; the name of the one that it is, and the model."""
    model, settings = llama.from_gguf(metadata, tensors), llama.llama_section(metadata)
    if settings.count("expert_count", 0, minimum=0) == 0:
        return "LlamaForCausalLM", model
    return "MixtralForCausalLM", _with_experts(model, settings, "expert_count", "expert_used_count", _GGUF_EXPERTS)


def _with_experts(model: Model, settings: Fields, count: str, used: str, roles: dict[str, list[str]]) -> Model:
    num_experts = settings.count(count, maximum=MAX_EXPERTS)
    spec = replace(model.spec, num_experts=num_experts, num_experts_per_tok=settings.count(used, maximum=num_experts))
    return replace(
        model, spec=spec, roles={**model.roles, **roles}, biased={**model.biased, "layers.{i}.router": False}
    )

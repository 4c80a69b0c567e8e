"""Checkpoints, transformers' model of each (tiny and random, or a GGUF file's), and our forward on the same files."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

from langchain_vllm_server import _model_test
from langchain_vllm_server.checkpoint import load_checkpoint
from langchain_vllm_server.engine_config import to_engine

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

BLOCK = 16
VOCAB = 131  # no multiple of a panel


@dataclasses.dataclass(frozen=True)
class Reference:
    """A transformers model and the folder it was saved to."""

    model: torch.nn.Module
    folder: Path

    def logits(self, tokens: list[int], dtype: torch.dtype = torch.float32) -> NDArray[Any]:
        """Logits (len(tokens), vocab) computed in `dtype` on exactly the stored weights."""
        with torch.no_grad():
            return self.model.to(dtype)(torch.tensor([tokens])).logits[0].double().numpy()

    def states(self, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Likewise the states (len(tokens), hidden_size) behind the final norm, in float64."""
        with torch.no_grad():
            return self.model.to(dtype).model(torch.tensor([tokens])).last_hidden_state[0].double()  # type: ignore[operator,union-attr]


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> Reference:
    """Save the model in `dtype`; the reference keeps the rounded weights, and its rotary frequencies unrounded."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return Reference(model.eval(), folder)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention is peaked and every bias and norm matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5 * 1.5)


def from_gguf(gguf: Path) -> LlamaForCausalLM:
    """transformers' model on the weights as the `gguf` package de-quantises them: nothing of ours."""
    return copy.deepcopy(_from_gguf(gguf))


@functools.lru_cache(maxsize=1)  # de-quantising takes half a minute
def _from_gguf(gguf: Path) -> LlamaForCausalLM:
    reader = GGUFReader(gguf)

    def setting(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    config = LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=setting("embedding_length"),
        intermediate_size=setting("feed_forward_length"),
        num_hidden_layers=setting("block_count"),
        num_attention_heads=setting("attention.head_count"),
        num_key_value_heads=setting("attention.head_count_kv"),
        max_position_embeddings=setting("context_length"),
        rms_norm_eps=setting("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": setting("rope.freq_base")},
        tie_word_embeddings=True,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:  # GGUF keeps the pairs that rotate together side by side, transformers half a head apart
            weight = weight.reshape(heads[part], -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        state[hugging_face_name(tensor.name)] = torch.from_numpy(np.array(weight))
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


def hugging_face_name(name: str) -> str:
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
    }
    *block, part, weight = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{names[part]}.{weight}"


def our_model(folder: Path, **options: Any) -> Any:
    """Our forward on a checkpoint folder or GGUF file."""
    config, tensors = to_engine(load_checkpoint(folder))
    return _model_test.Model(config, tensors, **options)


def num_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def run(tokens: list[int], num_computed: int, blocks: list[int]) -> Any:
    """The next `tokens` of a sequence whose first `num_computed` are in the cache already."""
    return _model_test.Run(tokens, num_computed, blocks[: num_blocks(num_computed + len(tokens))])


def assert_as_exact(ours: NDArray[Any], reference: Reference, tokens: list[int]) -> None:
    """Our f32 logits are as near to the float64 truth as transformers' own f32 logits are.

    Both round in f32 in different orders, so neither error bounds the other exactly; four times the larger of the
    reference's error and one f32 rounding of the largest logit covers the difference in order.
    """
    truth = reference.logits(tokens, torch.float64)
    theirs = np.abs(reference.logits(tokens) - truth).max()
    floor = np.finfo(np.float32).eps * np.abs(truth).max() * 4
    assert np.abs(ours - truth).max() <= 4 * max(theirs, floor)

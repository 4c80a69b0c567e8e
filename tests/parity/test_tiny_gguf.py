"""Every logit of tiny random Llamas written as GGUF, for each block format, against transformers.

The weights of the reference are those that the `gguf` package de-quantises from the same file: nothing of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.parity.models import Reference, assert_as_exact, hugging_face_name, num_blocks, our_model, run

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 131, 256, 512, 2, 4, 2  # columns fill whole superblocks
HEAD_DIM = HIDDEN // HEADS
EXPERTS_USED = 2
LENGTH = 75

FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
# As llama.cpp mixes them in Q4_K_M: some tensors keep more bits, so q, k and v that are stacked differ in format.
MIXED = {"token_embd": "Q6_K", "attn_v": "Q6_K", "ffn_down": "Q5_K", "ffn_gate": "Q8_0"}

# Of the blocks that the package cannot quantise to: where the f16 scales lie, and how far a quant may be from 0.
SCALES = {"Q4_K": ((0, 2), 63 * 15), "Q5_K": ((0, 2), 63 * 31), "Q6_K": ((208,), 127 * 32)}


def shapes(experts: int) -> dict[str, tuple[int, ...]]:
    mlp: dict[str, tuple[int, ...]] = {
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    if experts:
        mlp = {"ffn_gate_inp": (experts, HIDDEN)} | {f"{name}_exps": (experts, *shape) for name, shape in mlp.items()}
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        **mlp,
    }
    whole: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    return whole | {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def random_blocks(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Rows of `shape` in a format, of about the size that keeps activations at 1."""
    kind = GGMLQuantizationType[name]
    if name not in SCALES:
        return np.asarray(quantize((rng.standard_normal(shape) / HIDDEN**0.5).astype(np.float32), kind))
    size, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, block_bytes), np.uint8)
    offsets, largest = SCALES[name]
    for offset in offsets:
        scales = rng.uniform(2, 6, (*blocks.shape[:-1], 1)) / HIDDEN**0.5 / largest
        blocks[..., offset : offset + 2] = scales.astype("<f2").view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(path: Path, format_of: dict[str, str], default: str, experts: int = 0) -> None:
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(EXPERTS_USED)
    for name, shape in shapes(experts).items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32))
        else:
            format_name = format_of.get(name.rpartition(".")[2], default)
            blocks = random_blocks(rng, format_name, shape)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=GGMLQuantizationType[format_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference_of(path: Path, experts: int = 0) -> Reference:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    }
    state, of_experts = {}, {}
    for tensor in GGUFReader(path).tensors:
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if "_exps" in tensor.name:
            of_experts[tensor.name] = torch.from_numpy(weight)
            continue
        if tensor.name.split(".")[-2] in ("attn_q", "attn_k"):  # GGUF keeps rotated pairs side by side
            weight = weight.reshape(-1, HEAD_DIM // 2, 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
        state[hugging_face_name(tensor.name)] = torch.from_numpy(weight)
    for i in range(LAYERS) if experts else ():
        gate, up, down = (of_experts[f"blk.{i}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        state[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"model.layers.{i}.mlp.experts.down_proj"] = down
    model: torch.nn.Module
    if experts:
        sizes |= {"num_local_experts": experts, "num_experts_per_tok": EXPERTS_USED}
        model = MixtralForCausalLM(MixtralConfig(**sizes, experts_implementation="eager"))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()  # type: ignore[operator]
    return Reference(model.eval(), path.parent)


@pytest.mark.parametrize(
    ("device", "name"), [*(("cpu", name) for name in [*FORMATS, "mixed"]), ("cuda", "Q8_0"), ("cuda", "Q6_K")]
)
def test_logits(device: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    if name == "mixed":
        write_gguf(path, MIXED, "Q4_K")
    else:
        write_gguf(path, {}, name)
    model = our_model(path, device=device)
    tokens = np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()
    blocks = list(range(num_blocks(LENGTH)))
    whole = model.forward([run(tokens, 0, blocks)])
    assert_as_exact(whole, reference_of(path), tokens)
    assert whole.std() > 0.1, "the logits say something"
    chunks = [model.forward([run(tokens[i : i + 25], i, blocks)]) for i in range(0, LENGTH, 25)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K", "Q6_K", "mixed"])
def test_logits_of_experts(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    formats = {"ffn_gate_inp": "F32"}
    if name == "mixed":
        formats |= {"ffn_down_exps": "Q5_K", "ffn_gate_exps": "Q8_0"}
    write_gguf(path, formats, "Q4_K" if name == "mixed" else name, experts=5)
    tokens = np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist()
    blocks = list(range(num_blocks(LENGTH)))
    for exact in (True, False):
        model = our_model(path, exact=exact)
        whole = model.forward([run(tokens, 0, blocks)])
        if exact:
            assert_as_exact(whole, reference_of(path, experts=5), tokens)
        chunks = [model.forward([run(tokens[i : i + 25], i, blocks)]) for i in range(0, LENGTH, 25)]
        np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_a_quantised_router_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", {"ffn_gate_inp": "Q8_0"}, "Q8_0", experts=5)
    with pytest.raises(ValueError, match=r"tensor blk\.0\.ffn_gate_inp\.weight is Q8_0, expected F32, F16 or BF16"):
        our_model(tmp_path / "tiny.gguf")


def test_devices_differ_less_than_rounded_activations(tmp_path: Path) -> None:
    """In integers both devices round activations to bytes; where their f32 sums differ, a byte may be another."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, MIXED, "Q4_K")
    runs = [run(np.random.default_rng(1).integers(0, VOCAB, LENGTH).tolist(), 0, list(range(num_blocks(LENGTH))))]
    exact = our_model(path).forward(runs)
    on_cpu, on_cuda = (our_model(path, exact=False, device=device).forward(runs) for device in ("cpu", "cuda"))
    rounding = np.abs(on_cpu - exact)
    assert np.abs(on_cuda - on_cpu).mean() < rounding.mean()
    assert np.abs(on_cuda - exact).max() < 2 * rounding.max()

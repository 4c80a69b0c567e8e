"""Every logit of tiny random checkpoints against transformers, for each knob of the two families.

Whole: against transformers. In chunks, with a cached prefix, and in a ragged batch: bit for bit what the whole gives.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from langchain_vllm_server import _kernels_test
from tests.kernels.test_int8_weights import rounded as rounded_to_bytes
from tests.parity.models import (
    BLOCK,
    VOCAB,
    Reference,
    assert_as_exact,
    num_blocks,
    our_model,
    randomise,
    run,
    save,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LENGTH = 75  # several blocks and a part of one

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}

LLAMA_KNOBS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "wide_heads": {"head_dim": 24},
    "odd_sizes": {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 55},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "rope_dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "rope_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "rope_yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}

MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",  # the others know no float64
}

MIXTRAL_KNOBS: dict[str, dict[str, Any]] = {
    "two_of_five": {},
    "one_of_five": {"num_experts_per_tok": 1},
    "all_five": {"num_experts_per_tok": 5},
    "one_of_one": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "sliding_window": {"sliding_window": 21},
    "mqa": {"num_key_value_heads": 1},
    "odd_sizes": {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 55},
    "gelu": {"hidden_act": "gelu"},
}

MPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 128,
}

MPT_KNOBS: dict[str, dict[str, Any]] = {
    "alibi": {},
    "heads_not_power_of_two": {"d_model": 60, "n_heads": 6},
    "three_heads": {"d_model": 48, "n_heads": 3},
    "clip_qkv": {"attn_config": {"clip_qkv": 0.5}},
    "softmax_scale": {"attn_config": {"softmax_scale": 0.3}},
    "alibi_bias_max": {"attn_config": {"alibi_bias_max": 4}},
}


def make_llama(folder: Path, dtype: torch.dtype = torch.float32, **knobs: Any) -> Reference:
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **knobs}))
    randomise(model, seed=1)
    return save(model, folder, dtype)


def make_mistral(folder: Path) -> Reference:
    model = MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=21))
    randomise(model, seed=2)
    return save(model, folder, torch.float32)


def make_mixtral(folder: Path, dtype: torch.dtype = torch.float32, **knobs: Any) -> Reference:
    model = MixtralForCausalLM(MixtralConfig(**{**MIXTRAL, **knobs}))
    randomise(model, seed=4)
    return save(model, folder, dtype)


def make_mpt(folder: Path, *, bias: bool = False, **knobs: Any) -> Reference:
    model = MptForCausalLM(MptConfig(**{**MPT, **knobs, "no_bias": not bias}))
    if bias:  # transformers builds MPT without biases; the original code has them unless no_bias is set
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)) and module is not model.lm_head:
                size = module.weight.shape[0]
                module.bias = torch.nn.Parameter(torch.zeros(size))
    bias_max = model.config.attn_config.alibi_bias_max
    build = model.transformer.build_mpt_alibi_tensor  # called without the config's value: an oversight of transformers
    model.transformer.build_mpt_alibi_tensor = functools.partial(build, alibi_bias_max=bias_max)
    randomise(model, seed=3)
    return save(model, folder, torch.float32)


CASES: dict[str, Callable[[Path], Reference]] = {
    **{f"llama-{name}": lambda p, k=knobs: make_llama(p, **k) for name, knobs in LLAMA_KNOBS.items()},
    "llama-bf16": lambda p: make_llama(p, torch.bfloat16),
    "llama-f16": lambda p: make_llama(p, torch.float16),
    "mistral-sliding_window": make_mistral,
    **{f"mixtral-{name}": lambda p, k=knobs: make_mixtral(p, **k) for name, knobs in MIXTRAL_KNOBS.items()},
    "mixtral-bf16": lambda p: make_mixtral(p, torch.bfloat16),
    **{f"mpt-{name}": lambda p, k=knobs: make_mpt(p, **k) for name, knobs in MPT_KNOBS.items()},
    "mpt-bias": lambda p: make_mpt(p, bias=True),
}


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# CUDA's kernels, which an emulator runs here, differ in no more than a few of the knobs.
ON_CUDA = [
    *("llama-gqa", "llama-odd_sizes", "llama-attention_bias", "llama-rope_yarn", "llama-bf16", "llama-f16"),
    *("llama-gelu", "mistral-sliding_window", "mpt-alibi", "mpt-clip_qkv", "mpt-bias"),
    *("mixtral-two_of_five", "mixtral-all_five", "mixtral-odd_sizes", "mixtral-bf16"),
]


@pytest.mark.parametrize(
    ("device", "name"), [*(("cpu", name) for name in CASES), *(("cuda", name) for name in ON_CUDA)]
)
def test_logits(device: str, name: str, tmp_path: Path) -> None:
    reference = CASES[name](tmp_path)
    model = our_model(tmp_path, device=device)
    tokens, others = random_tokens(LENGTH, 1), random_tokens(LENGTH, 2)
    count = num_blocks(LENGTH)
    whole = model.forward([run(tokens, 0, list(range(count)))])
    assert_as_exact(whole, reference, tokens)

    # In chunks of every awkward size, through a shuffled block table.
    blocks = [40 - i for i in range(count)]
    at = 0
    for size in (1, 15, 16, 17, 1, LENGTH - 50):
        chunk = model.forward([run(tokens[at : at + size], at, blocks)])
        np.testing.assert_array_equal(chunk, whole[at : at + size])
        at += size

    # Behind a prefix that another sequence left in the cache.
    shared = 3 * BLOCK
    fresh = [*range(3), *range(50, 50 + count)]
    cached = model.forward([run(tokens[shared:], shared, fresh)])
    np.testing.assert_array_equal(cached, whole[shared:])

    # In one ragged batch: a decode step, a whole prompt, and a chunk in the middle of one.
    alone = model.forward([run(others, 0, list(range(20, 20 + count)))])
    ragged = model.forward(
        [
            run(tokens[-1:], LENGTH - 1, blocks),
            run(others, 0, list(range(30, 30 + count))),
            run(tokens[20:50], 20, blocks),
        ]
    )
    np.testing.assert_array_equal(ragged, np.concatenate([whole[-1:], alone, whole[20:50]]))


@pytest.mark.parametrize("make", [make_llama, make_mixtral])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(threads: int, make: Callable[[Path], Reference], tmp_path: Path) -> None:
    make(tmp_path)
    tokens = random_tokens(LENGTH, 1)
    runs = [run(tokens, 0, list(range(num_blocks(LENGTH))))]
    np.testing.assert_array_equal(
        our_model(tmp_path, num_threads=threads).forward(runs), our_model(tmp_path, num_threads=2).forward(runs)
    )


@pytest.mark.parametrize("rows", [1, 3, 16, LENGTH - 1])
@pytest.mark.parametrize("name", ["llama-gqa", "mixtral-two_of_five", "mixtral-all_five", "mpt-bias"])
def test_rows_at_once_do_not_matter(name: str, rows: int, tmp_path: Path) -> None:
    """An MLP in pieces, the last of them smaller: gated and plain, with weights of floats and of bytes."""
    CASES[name](tmp_path)
    runs = [run(random_tokens(LENGTH, 1), 0, list(range(num_blocks(LENGTH))))]
    for options in ({}, {"weight_format": "INT8", "exact": False}):
        whole, pieces = (our_model(tmp_path, rows_at_once=most, **options) for most in (LENGTH, rows))
        np.testing.assert_array_equal(pieces.forward(runs), whole.forward(runs))
        assert pieces.rows_activated == whole.rows_activated >= 2 * LENGTH, "as many rows as there are"


@pytest.mark.parametrize(("asked", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_matrices_rounded_at_load(asked: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = make_llama(tmp_path)
    tokens = random_tokens(LENGTH, 1)
    ours = our_model(tmp_path, weight_format=asked).forward([run(tokens, 0, list(range(num_blocks(LENGTH))))])
    for parameter in reference.model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype).float()
    assert_as_exact(ours, reference, tokens)


def test_bf16_activations_cost_less_than_bf16_throughout(tmp_path: Path) -> None:
    """Where the multiply rounds them (AMX, AVX512-BF16), all else is f32; transformers rounds all it computes."""
    reference = make_llama(tmp_path, torch.bfloat16)
    tokens = random_tokens(LENGTH, 1)
    model = our_model(tmp_path, exact=False)
    ours = model.forward([run(tokens, 0, list(range(num_blocks(LENGTH))))])
    truth = reference.logits(tokens, torch.float64)
    theirs = reference.logits(tokens, torch.bfloat16)
    assert np.abs(ours - truth).max() <= np.abs(theirs - truth).max()
    assert np.abs(ours - truth).mean() <= np.abs(theirs - truth).mean()


def test_widening_at_load_changes_nothing(tmp_path: Path) -> None:
    make_llama(tmp_path, torch.bfloat16)
    runs = [run(random_tokens(LENGTH, 1), 0, list(range(num_blocks(LENGTH))))]
    np.testing.assert_array_equal(
        our_model(tmp_path, weight_format="F32").forward(runs), our_model(tmp_path).forward(runs)
    )


def rounded(kind: str, parameter: torch.Tensor) -> torch.Tensor:
    rows = parameter.detach().numpy().reshape(-1, parameter.shape[-1])
    if kind == "INT8":
        return torch.from_numpy(rounded_to_bytes("cpu", rows).reshape(parameter.shape))
    back = [_kernels_test.dequantize(kind, _kernels_test.quantize(kind, row), len(row)) for row in rows]
    return torch.from_numpy(np.concatenate(back).reshape(parameter.shape))


@pytest.mark.parametrize("asked", ["BF16", "INT8", "INT4"])
def test_experts_rounded_at_load_but_not_their_router(asked: str, tmp_path: Path) -> None:
    reference = make_mixtral(tmp_path)
    tokens = random_tokens(LENGTH, 1)
    ours = our_model(tmp_path, weight_format=asked).forward([run(tokens, 0, list(range(num_blocks(LENGTH))))])
    for name, parameter in reference.model.named_parameters():
        if parameter.dim() == 1 or name.endswith("mlp.gate.weight"):
            continue
        of_words = "embed" in name or "lm_head" in name
        kind = asked if asked != "INT4" else "INT8" if of_words else "Q4_1"
        parameter.data = rounded(kind, parameter)
    assert_as_exact(ours, reference, tokens)

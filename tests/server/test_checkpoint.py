from __future__ import annotations

import contextlib
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
from typing import TYPE_CHECKING, Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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

from langchain_vllm_server.checkpoint import load_checkpoint
from langchain_vllm_server.errors import CheckpointError
from tests.server.checkpoint_fixtures import SMOLLM2, spm_metadata, spm_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from langchain_vllm_server.stored_tensor import StoredTensor

NUMPY = {"F32": np.float32, "F16": np.float16}
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def stored_numbers(tensor: StoredTensor) -> np.ndarray[Any, Any]:
    with open(tensor.file, "rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.size), NUMPY[tensor.format]).reshape(tensor.shape)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def assert_roles(folder: Path, model: torch.nn.Module, expected: dict[str, list[str]]) -> None:
    """Each role has the named parameters' numbers, and there is no other role."""
    checkpoint = load_checkpoint(folder)
    state = model.state_dict()
    assert checkpoint.tensors.keys() == expected.keys()
    for role, names in expected.items():
        assert [t.name for t in checkpoint.tensors[role]] == names
        for tensor in checkpoint.tensors[role]:
            np.testing.assert_array_equal(stored_numbers(tensor), state[tensor.name].numpy())


def llama_roles(layers: int = 2, *, tied: bool = False, attention_bias: bool = False, mlp_bias: bool = False) -> Any:
    roles = {"embed": ["model.embed_tokens.weight"], "final_norm": ["model.norm.weight"]}
    if not tied:
        roles["lm_head"] = ["lm_head.weight"]
    for i in range(layers):
        layer = f"model.layers.{i}"
        attention = {"qkv": ["q_proj", "k_proj", "v_proj"], "attn_out": ["o_proj"]}
        mlp = {"mlp_in": ["gate_proj", "up_proj"], "mlp_out": ["down_proj"]}
        for part, names_of, bias in (("self_attn", attention, attention_bias), ("mlp", mlp, mlp_bias)):
            for role, names in names_of.items():
                roles[f"layers.{i}.{role}"] = [f"{layer}.{part}.{name}.weight" for name in names]
                if bias:
                    roles[f"layers.{i}.{role}.bias"] = [f"{layer}.{part}.{name}.bias" for name in names]
        roles[f"layers.{i}.attn_norm"] = [f"{layer}.input_layernorm.weight"]
        roles[f"layers.{i}.mlp_norm"] = [f"{layer}.post_attention_layernorm.weight"]
    return roles


def save_llama(folder: Path, **options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, **options})
    model = randomised(LlamaForCausalLM(config))
    model.save_pretrained(folder)
    return model  # type: ignore[return-value]


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 10}],
    ids=str,
)
def test_a_llama_saved_by_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    model = save_llama(tmp_path, **options)
    flags = {k.replace("tie_word_embeddings", "tied"): v for k, v in options.items() if isinstance(v, bool)}
    assert_roles(tmp_path, model, llama_roles(**flags))
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.architecture, checkpoint.max_position, checkpoint.dtype) == ("LlamaForCausalLM", 64, "float32")
    assert checkpoint.spec.head_dim == options.get("head_dim", 4)
    assert checkpoint.spec.num_key_value_heads == 2


def test_shards_saved_by_transformers(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_roles(tmp_path / "shards", model, llama_roles())


def test_a_mistral_saved_by_transformers(tmp_path: Path) -> None:
    model = randomised(MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7)))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert_roles(tmp_path, model, llama_roles())
    assert load_checkpoint(tmp_path).spec.sliding_window == (7, 7)


def test_a_mixtral_saved_by_transformers(tmp_path: Path) -> None:
    """Whose model has the experts' matrices in one tensor, and whose files have each by itself."""
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, sliding_window=7)
    model = randomised(MixtralForCausalLM(config))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    checkpoint, state = load_checkpoint(tmp_path), model.state_dict()
    spec = checkpoint.spec
    assert (checkpoint.architecture, spec.num_experts, spec.num_experts_per_tok) == ("MixtralForCausalLM", 3, 2)
    assert spec.sliding_window == (7, 7)
    for i in range(2):
        for role, name in (
            ("router", "gate.weight"),
            ("mlp_in", "experts.gate_up_proj"),
            ("mlp_out", "experts.down_proj"),
        ):
            theirs = state[f"model.layers.{i}.mlp.{name}"].numpy()
            ours = [stored_numbers(tensor) for tensor in checkpoint.tensors[f"layers.{i}.{role}"]]
            np.testing.assert_array_equal(np.concatenate(ours), theirs.reshape(-1, theirs.shape[-1]))


MPT_ROLES = {
    "embed": ["transformer.wte.weight"],
    "final_norm": ["transformer.norm_f.weight"],
    **{f"layers.{i}.attn_norm": [f"transformer.blocks.{i}.norm_1.weight"] for i in range(2)},
    **{f"layers.{i}.qkv": [f"transformer.blocks.{i}.attn.Wqkv.weight"] for i in range(2)},
    **{f"layers.{i}.attn_out": [f"transformer.blocks.{i}.attn.out_proj.weight"] for i in range(2)},
    **{f"layers.{i}.mlp_norm": [f"transformer.blocks.{i}.norm_2.weight"] for i in range(2)},
    **{f"layers.{i}.mlp_in": [f"transformer.blocks.{i}.ffn.up_proj.weight"] for i in range(2)},
    **{f"layers.{i}.mlp_out": [f"transformer.blocks.{i}.ffn.down_proj.weight"] for i in range(2)},
}


def test_an_mpt_saved_by_transformers(tmp_path: Path) -> None:
    config = MptConfig(d_model=24, n_heads=3, n_layers=2, vocab_size=50, attn_config={"clip_qkv": 2.0})
    model = randomised(MptForCausalLM(config))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert_roles(tmp_path, model, MPT_ROLES)
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.architecture, checkpoint.spec.clip_qkv) == ("MptForCausalLM", 2.0)


def test_an_mpt_with_biases(tmp_path: Path) -> None:
    """As llm-foundry saves one with no_bias: false; transformers knows no such MPT."""
    from safetensors.torch import load_file, save_file

    config = MptConfig(d_model=24, n_heads=3, n_layers=2, vocab_size=50)
    model = randomised(MptForCausalLM(config))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    state = load_file(tmp_path / "model.safetensors")
    biases = {n.replace(".weight", ".bias"): t[:, 0] if t.dim() > 1 else t for n, t in state.items() if "wte" not in n}
    save_file({**state, **{n: t.clone() for n, t in biases.items()}}, tmp_path / "model.safetensors")
    found = load_checkpoint(tmp_path).tensors
    assert found.keys() == {*MPT_ROLES, *(f"{role}.bias" for role in MPT_ROLES if role != "embed")}
    assert found["layers.1.qkv.bias"][0].shape == (72,)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a folder's model.safetensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


Q = "model.layers.1.self_attn.q_proj"
CONTRADICTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: edit(f, lambda t: t.pop(f"{Q}.weight")), rf"{Q}\.weight' is missing; expected .* \[16, 16\]"),
    "shape": (
        lambda f: edit(f, lambda t: t.update({f"{Q}.weight": torch.ones(16, 8)})),
        rf"{Q}\.weight': the settings ask for shape \[16, 16\], found \[16, 8\]",
    ),
    "vector": (
        lambda f: edit(f, lambda t: t.update({"model.norm.weight": torch.ones(1, 16)})),
        r"model\.norm\.weight': the settings ask for shape \[16\], found \[1, 16\]",
    ),
    "dtype": (
        lambda f: edit(f, lambda t: t.update({f"{Q}.weight": torch.ones(16, 16, dtype=torch.int8)})),
        rf"{Q}\.weight': I8 is not supported",
    ),
    "unknown": (
        lambda f: edit(f, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)})),
        r"1 tensors that LlamaForCausalLM does not have: 'model\.layers\.0\.self_attn\.q_norm\.weight'",
    ),
    "bias too many": (
        lambda f: edit(f, lambda t: t.update({f"{Q}.bias": torch.ones(16)})),
        rf"{Q}\.bias' is there, but the settings say that there is no such bias",
    ),
    "bias missing": (lambda f: configure(f, attention_bias=True), r"q_proj\.bias' is missing"),
    "untied": (lambda f: edit(f, lambda t: t.pop("lm_head.weight")), r"lm_head\.weight' is missing"),
    "layers": (lambda f: configure(f, num_hidden_layers=3), r"layers\.2\.input_layernorm\.weight' is missing"),
    "fewer layers": (lambda f: configure(f, num_hidden_layers=1), r"9 tensors that LlamaForCausalLM does not have"),
    "vocabulary": (lambda f: configure(f, vocab_size=49), r"ask for shape \[49, 16\], found \[48, 16\]"),
    "heads": (lambda f: configure(f, num_key_value_heads=4), r"k_proj\.weight': .* \[16, 16\], found \[8, 16\]"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: "),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: expected a JSON object"),
    "eos": (lambda f: configure(f, eos_token_id="x"), "eos_token_id: expected a token id"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_named(case: str, llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    change, message = CONTRADICTIONS[case]
    change(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(folder)
    assert str(folder) in str(error.value)


def test_what_older_files_hold_besides_is_left_alone(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert load_checkpoint(folder).tensors.keys() == llama_roles().keys()


def test_a_head_of_its_own_counts_even_when_the_config_says_tied(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    configure(folder, tie_word_embeddings=True)
    assert "lm_head" in load_checkpoint(folder).tensors


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_checkpoint(tmp_path / "nothing")


def test_templates_and_settings_of_a_folder(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load_checkpoint(folder).chat_template is None
    assert load_checkpoint(folder).generation_config == {}
    settings_file = folder / "tokenizer_config.json"
    settings_file.write_text(json.dumps({"chat_template": "A"}))
    assert load_checkpoint(folder).chat_template == "A"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    settings_file.write_text(json.dumps({"chat_template": named}))
    assert load_checkpoint(folder).chat_template == "D"
    settings_file.write_text(json.dumps({"chat_template": named[:1]}))
    assert load_checkpoint(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("J")
    assert load_checkpoint(folder).chat_template == "J"
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [7, 8]}')
    assert load_checkpoint(folder).generation_config == {"temperature": 0.6, "eos_token_id": [7, 8]}
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        load_checkpoint(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="generation_config"):
        load_checkpoint(folder)


def test_end_of_text_comes_from_every_place(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    configure(folder, eos_token_id=2, dtype="bfloat16")
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "</s>": 3}, "merges": []},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    checkpoint = load_checkpoint(folder)
    assert checkpoint.eos_token_ids == [5, 2, 3]
    assert checkpoint.dtype == "bfloat16"


def test_the_tokenizer_is_read_when_it_is_needed(llama_folder: Path) -> None:
    checkpoint = load_checkpoint(llama_folder)
    with pytest.raises(CheckpointError, match="no tokenizer; looked for"):
        _ = checkpoint.tokenizer


def write_gguf(file: Path, *, tied: bool = False, bias: bool = False, freqs: bool = False, experts: int = 0) -> None:
    """A tiny Llama, or Mixtral, as llama.cpp's converter lays it out, with a SentencePiece tokenizer."""
    tokens, scores, types_ = spm_vocabulary()
    writer = gguf_package.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_chat_template("T")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types_)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    writer.add_unk_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32)} | ({} if tied else {"output": (len(tokens), 32)})
    mlp: dict[str, tuple[int, ...]] = {
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        mlp = {f"{name}_exps": (experts, *shape) for name, shape in mlp.items()}
        mlp["blk.0.ffn_gate_inp"] = (experts, 32)
    shapes |= mlp
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
        if bias and name[-2:] in ("_q", "_k", "_v"):
            writer.add_tensor(f"{name}.bias", generator.standard_normal(shape[0]).astype(np.float32))
    if freqs:
        writer.add_tensor("rope_freqs.weight", np.array([1, 2, 4, 8], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gguf_file(tied: bool, bias: bool, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tied=tied, bias=bias, freqs=True)
    checkpoint = load_checkpoint(file)
    blocks = ["attn_norm", "qkv", "attn_out", "mlp_norm", "mlp_in", "mlp_out", *(["qkv.bias"] if bias else [])]
    roles = {"embed", "final_norm", *(f"layers.0.{role}" for role in blocks), *([] if tied else ["lm_head"])}
    assert checkpoint.tensors.keys() == roles
    assert [t.name for t in checkpoint.tensors["layers.0.mlp_in"]] == ["blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"]
    assert [t.shape for t in checkpoint.tensors["layers.0.qkv"]] == [(32, 32), (16, 32), (16, 32)]
    reader = {t.name: t.data for t in gguf_package.GGUFReader(file).tensors}
    for parts in checkpoint.tensors.values():
        for part in parts:
            np.testing.assert_array_equal(stored_numbers(part), reader[part.name])
    assert checkpoint.spec.vocab_size == len(spm_vocabulary()[0])
    assert checkpoint.spec.rope_interleaved
    expected = [1, 0.1 / 2, 0.01 / 4, 0.001 / 8]
    np.testing.assert_allclose(checkpoint.spec.rope_inv_freq, expected, rtol=4 * np.finfo(np.float32).eps)
    assert (checkpoint.max_position, checkpoint.dtype, checkpoint.chat_template) == (32, "F32", "T")
    assert checkpoint.eos_token_ids == [2, 5]
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("Hello world")) == "Hello world"


def test_a_gguf_file_with_experts(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, experts=3)
    checkpoint = load_checkpoint(file)
    spec = checkpoint.spec
    assert (checkpoint.architecture, spec.num_experts, spec.num_experts_per_tok) == ("MixtralForCausalLM", 3, 2)
    reader = {t.name: t.data for t in gguf_package.GGUFReader(file).tensors}
    parts = {
        "mlp_in": [f"blk.0.ffn_{part}_exps.weight[{e}]" for e in range(3) for part in ("gate", "up")],
        "mlp_out": [f"blk.0.ffn_down_exps.weight[{e}]" for e in range(3)],
    }
    for role, names in parts.items():
        tensors = checkpoint.tensors[f"layers.0.{role}"]
        assert [t.name for t in tensors] == names
        for tensor in tensors:
            whole, _, expert = tensor.name.removesuffix("]").partition("[")
            np.testing.assert_array_equal(stored_numbers(tensor), reader[whole][int(expert)])
    assert [t.name for t in checkpoint.tensors["layers.0.router"]] == ["blk.0.ffn_gate_inp.weight"]


def test_another_number_of_experts_than_the_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, experts=3)
    key = b"llama.expert_count" + struct.pack("<I", 4)
    raw = file.read_bytes()
    assert raw.count(key + struct.pack("<I", 3)) == 1
    file.write_bytes(raw.replace(key + struct.pack("<I", 3), key + struct.pack("<I", 4)))
    with pytest.raises(
        CheckpointError, match=r"tensor 'blk.0.ffn_.*exps.weight': the settings ask for 4 experts, found"
    ):
        load_checkpoint(file)


def test_smollm2() -> None:
    checkpoint = load_checkpoint(SMOLLM2)
    assert (checkpoint.architecture, checkpoint.dtype) == ("LlamaForCausalLM", "Q4_1")
    assert (checkpoint.max_position, checkpoint.eos_token_ids) == (8192, [2])
    assert "lm_head" not in checkpoint.tensors
    assert checkpoint.tensors["embed"][0].format == "Q8_0"
    assert checkpoint.chat_template is not None
    assert "<|im_start|>" in checkpoint.chat_template


def test_the_path_to_a_loaded_checkpoint_is_light() -> None:
    code = (
        "import sys; from pathlib import Path; from langchain_vllm_server.checkpoint import load_checkpoint;"
        "import langchain_vllm_server.chat_template, langchain_vllm_server.detokenizer, langchain_vllm_server.hub;"
        f"load_checkpoint(Path({str(SMOLLM2)!r})).tokenizer.encode('x'); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in out.stdout.split()}
    assert not modules & {"torch", "transformers", "numpy", "huggingface_hub", "langchain_core", "gguf", "safetensors"}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, freqs=True)
    return file.read_bytes()


@given(data=st.data())
@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_gguf_is_an_error_or_loads(data: st.DataObject, tiny_gguf: bytes, tmp_path: Path) -> None:
    raw = bytearray(tiny_gguf)
    # Half of the damage goes to the settings, which are few bytes, half to the vocabulary and the tensor infos.
    header = 12_000
    places = st.integers(4, 700) | st.integers(4, header)
    for position, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3)):
        raw[position] = byte
    file = tmp_path / "damaged.gguf"
    file.write_bytes(raw)
    tracemalloc.start()
    try:
        _ = load_checkpoint(file).tokenizer.encode("Hello")
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 << 20


def test_every_pair_of_metadata_type_and_key_is_read_or_refused(tmp_path: Path) -> None:
    """Each field of the metadata, in turn, holds a value of the wrong type."""
    from langchain_vllm_server.architectures import model_from_gguf
    from langchain_vllm_server.fields import Fields
    from langchain_vllm_server.gguf_file import read_gguf
    from langchain_vllm_server.tokenizer import Tokenizer

    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    metadata = {**read_gguf(file).metadata, **spm_metadata(add_bos_token=True, add_space_prefix=True)}

    class Tensors:
        def __contains__(self, name: object) -> bool:
            return False

        def rows(self, name: str) -> int:
            return 48

        def floats(self, name: str) -> list[float]:
            raise AssertionError

    for key in metadata:
        for wrong in (None, -1, 1 << 62, 0.5, float("nan"), True, "x", [], [1], ["a", 1], [[1]]):
            fields = Fields({**metadata, key: wrong}, "x.gguf")
            for read in (lambda f=fields: model_from_gguf(f, Tensors()), lambda f=fields: Tokenizer.from_gguf(f)):
                with contextlib.suppress(CheckpointError):
                    read()


def test_to_engine_says_what_the_checkpoint_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class ModelConfig:
        pass

    engine = types.ModuleType("_engine")
    engine.ModelConfig = ModelConfig  # type: ignore[attr-defined]
    engine.TensorInfo = lambda *args: args  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "langchain_vllm_server._engine", engine)
    monkeypatch.delitem(sys.modules, "langchain_vllm_server.engine_config", raising=False)
    from langchain_vllm_server.engine_config import to_engine

    monkeypatch.delitem(sys.modules, "langchain_vllm_server.engine_config")
    checkpoint = load_checkpoint(SMOLLM2)
    config, tensors = to_engine(checkpoint)
    assert vars(config) == {k: list(v) if isinstance(v, tuple) else v for k, v in vars(checkpoint.spec).items()}
    embed = checkpoint.tensors["embed"][0]
    assert tensors["embed"] == [("token_embd.weight", "Q8_0", [49152, 576], str(SMOLLM2), embed.offset)]
    assert tensors.keys() == checkpoint.tensors.keys()


def test_header_of_zeros(tmp_path: Path) -> None:
    file = tmp_path / "zeros.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(CheckpointError, match=r"general\.architecture: missing"):
        load_checkpoint(file)

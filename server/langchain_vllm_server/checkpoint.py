"""A model on disk, read and checked: its configuration, where each weight lies, and its text side.

Nothing here reads the weights themselves; the engine does, from the files and offsets listed.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_vllm_server.architectures import model_from_config, model_from_gguf
from langchain_vllm_server.errors import CheckpointError
from langchain_vllm_server.fields import Fields, read_json
from langchain_vllm_server.gguf_file import read_gguf
from langchain_vllm_server.safetensors_file import read_safetensors
from langchain_vllm_server.stored_tensor import BLOCKS, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_vllm_server.gguf_file import GgufFile
    from langchain_vllm_server.model_spec import Model, ModelSpec
    from langchain_vllm_server.tokenizer import Tokenizer

__all__ = ["Checkpoint", "StoredTensor", "load_checkpoint"]

_FLOAT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to be loaded and talked to.

    Attributes:
        path: The folder, or the GGUF file.
        architecture: As config.json names it, e.g. "LlamaForCausalLM".
        spec: The transformer.
        tensors: Role (csrc/model/weights.h) → its tensors, stacked by rows.
        max_position: Tokens that the model can see at once.
        chat_template: Jinja source, or None.
        generation_config: The model's own sampling defaults; {} when it has none.
        dtype: What the weights are stored as: "bfloat16", …, or a GGUF format such as "Q4_1".
    """

    path: Path
    architecture: str
    spec: ModelSpec
    tensors: dict[str, list[StoredTensor]]
    max_position: int
    chat_template: str | None
    generation_config: dict[str, Any]
    dtype: str
    configured_eos: tuple[int, ...] = field(repr=False)
    read_tokenizer: Callable[[], Tokenizer] = field(repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built at first use, so that it can be while the weights load. Raises CheckpointError."""
        return self.read_tokenizer()

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text: those of the generation config, the config and the tokenizer, each once."""
        own = self.tokenizer.eos_token_id
        return list(dict.fromkeys((*self.configured_eos, *(() if own is None else (own,)))))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder (config.json, safetensors, tokenizer files) or a GGUF file.

    Raises:
        CheckpointError: It is damaged, contradicts itself, lacks a tensor, or asks for what is not supported.
    """
    if path.is_dir():
        return _load_folder(path)
    if path.is_file():
        return _load_gguf(path)
    raise CheckpointError(f"{path}: no such file or folder")


def _load_folder(folder: Path) -> Checkpoint:
    config = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    architecture, model = model_from_config(config)
    tensors = _assign(model, read_safetensors(folder), str(folder), architecture)
    return Checkpoint(
        path=folder,
        architecture=architecture,
        spec=model.spec,
        tensors=tensors,
        max_position=model.max_position,
        chat_template=_folder_template(folder),
        generation_config=generation,
        dtype=_folder_dtype(config, tensors),
        configured_eos=(*_eos_ids(Fields(generation, str(generation_path))), *_eos_ids(config)),
        read_tokenizer=partial(_folder_tokenizer, folder),
    )


def _load_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    metadata = Fields(file.metadata, file.path)
    architecture, model = model_from_gguf(metadata, _GgufTensors(file))
    template = metadata.get("tokenizer.chat_template", None)
    return Checkpoint(
        path=path,
        architecture=architecture,
        spec=model.spec,
        tensors=_assign(model, file.tensors, file.path, architecture),
        max_position=model.max_position,
        chat_template=None if template is None else metadata.text("tokenizer.chat_template"),
        generation_config={},
        dtype=_dominant_format(file.tensors),
        configured_eos=tuple(
            metadata.count(name, minimum=0)
            for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
            if name in metadata
        ),
        read_tokenizer=partial(_gguf_tokenizer, metadata),
    )


class _GgufTensors:
    """The tensors of a GGUF file as an architecture sees them (model_spec.TensorNames)."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def __contains__(self, name: object) -> bool:
        return name in self._file.tensors

    def rows(self, name: str) -> int:
        return self._tensor(name).shape[0]

    def floats(self, name: str) -> list[float]:
        tensor = self._tensor(name)
        if tensor.format != "F32" or tensor.size > 1 << 20:
            raise CheckpointError(f"{self._file.path}: tensor {name!r}: expected a few F32, found {tensor.format}")
        with Path(tensor.file).open("rb") as file:
            file.seek(tensor.offset)
            return list(struct.unpack(f"<{tensor.size // 4}f", file.read(tensor.size)))

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._file.tensors:
            raise CheckpointError(f"{self._file.path}: tensor {name!r} is missing")
        return self._file.tensors[name]


def _assign(
    model: Model, stored: dict[str, StoredTensor], source: str, architecture: str
) -> dict[str, list[StoredTensor]]:
    """Give each role its tensors, and check that they are there, no others are, and all have the right shape."""
    stored = _split_experts(stored, model.spec.num_experts)
    tensors: dict[str, list[StoredTensor]] = {}
    for template, name_templates in model.roles.items():
        for layer in range(model.spec.num_hidden_layers) if "{i}" in template else (0,):
            names = [name.replace("{i}", str(layer)) for name in _of_experts(name_templates, model.spec.num_experts)]
            role = template.replace("{i}", str(layer))
            if role == "lm_head" and model.tied and names[0] not in stored:
                continue
            tensors[role] = _weights(model.spec, role, names, stored, source)
            if biases := _biases(model, template, names, tensors[role], stored, source):
                tensors[f"{role}.bias"] = biases
    used = {tensor.name for parts in tensors.values() for tensor in parts}
    unknown = [n for n in stored if n not in used and not any(re.fullmatch(p, n) for p in model.unused)]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:3])
        raise CheckpointError(f"{source}: {len(unknown)} tensors that {architecture} does not have: {shown}, …")
    return tensors


def _split_experts(stored: dict[str, StoredTensor], num_experts: int) -> dict[str, StoredTensor]:
    """The tensors by name, one of all experts as a matrix for each."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if num_experts == 0 or len(tensor.shape) != 3:
            tensors[name] = tensor
        elif tensor.shape[0] != num_experts:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r}: the settings ask for {num_experts} experts, "
                f"found shape {list(tensor.shape)}"
            )
        else:
            tensors |= {part.name: part for part in tensor.parts()}
    return tensors


def _of_experts(names: list[str], num_experts: int) -> list[str]:
    if not any("{e}" in name for name in names):
        return names
    return [name.replace("{e}", str(expert)) for expert in range(num_experts) for name in names]


def _weights(
    spec: ModelSpec, role: str, names: list[str], stored: dict[str, StoredTensor], source: str
) -> list[StoredTensor]:
    rows, columns = _shape(spec, role.rpartition(".")[2])
    if len(names) == 1:
        rows = (sum(rows),)
    parts = []
    for name, part_rows in zip(names, rows, strict=True):
        expected = (part_rows,) if columns is None else (part_rows, columns)
        parts.append(_checked(name, expected, stored, source))
    return parts


def _biases(
    model: Model,
    template: str,
    names: list[str],
    weights: list[StoredTensor],
    stored: dict[str, StoredTensor],
    source: str,
) -> list[StoredTensor]:
    names = [name.removesuffix(".weight") + ".bias" for name in names]
    present = [name for name in names if name in stored]
    if present and model.biased.get(template) is False:
        raise CheckpointError(
            f"{source}: tensor {present[0]!r} is there, but the settings say that there is no such bias"
        )
    if not present and not model.biased.get(template):
        return []
    return [_checked(name, weight.shape[:1], stored, source) for name, weight in zip(names, weights, strict=True)]


def _shape(spec: ModelSpec, role: str) -> tuple[tuple[int, ...], int | None]:
    """Rows of each stacked part, and columns (None: a vector)."""
    hidden, inner, mlps = spec.hidden_size, spec.intermediate_size, spec.num_experts or 1
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "embed": ((spec.vocab_size,), hidden),
        "lm_head": ((spec.vocab_size,), hidden),
        "final_norm": ((hidden,), None),
        "attn_norm": ((hidden,), None),
        "qkv": ((spec.q_size, spec.kv_size, spec.kv_size), hidden),
        "attn_out": ((hidden,), spec.q_size),
        "mlp_norm": ((hidden,), None),
        "router": ((spec.num_experts,), hidden),
        "mlp_in": (((inner, inner) if spec.gated_mlp else (inner,)) * mlps, hidden),
        "mlp_out": ((hidden,) * mlps, inner),
    }
    return shapes[role]


def _checked(name: str, expected: tuple[int, ...], stored: dict[str, StoredTensor], source: str) -> StoredTensor:
    if name not in stored:
        raise CheckpointError(f"{source}: tensor {name!r} is missing; expected one of shape {list(expected)}")
    tensor = stored[name]
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r}: the settings ask for shape {list(expected)}, found {list(tensor.shape)}"
        )
    if tensor.format not in BLOCKS:
        raise CheckpointError(
            f"{tensor.file}: tensor {name!r}: {tensor.format} is not supported; supported: {', '.join(BLOCKS)}"
        )
    return tensor


def _eos_ids(fields: Fields) -> list[int]:
    value = fields.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise fields.error("eos_token_id", f"expected a token id or a list of them, found {value!r}")
    return ids


def _folder_template(folder: Path) -> str | None:
    """The file of its own wins over the entry in tokenizer_config.json, as in transformers."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: {error}") from None
    if not settings.is_file():
        return None
    fields = Fields(read_json(settings), str(settings))
    if isinstance(named := fields.get("chat_template", None), list):
        default = [t.get("template") for t in named if isinstance(t, dict) and t.get("name") == "default"]
        fields = Fields({"chat_template": default[0] if default else None}, str(settings))
    return fields.text("chat_template") if "chat_template" in fields else None


def _folder_dtype(config: Fields, tensors: dict[str, list[StoredTensor]]) -> str:
    stored = tensors["embed"][0].format
    name = config.get("dtype", config.get("torch_dtype", _FLOAT_NAMES.get(stored, stored)))
    return str(name).removeprefix("torch.")


def _dominant_format(tensors: dict[str, StoredTensor]) -> str:
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        block, block_bytes = BLOCKS[tensor.format]
        numbers[tensor.format] += tensor.size // block_bytes * block
    return numbers.most_common(1)[0][0]


def _folder_tokenizer(folder: Path) -> Tokenizer:
    from langchain_vllm_server.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder)


def _gguf_tokenizer(metadata: Fields) -> Tokenizer:
    from langchain_vllm_server.tokenizer import Tokenizer

    return Tokenizer.from_gguf(metadata)

"""Architectures as data: one small file per family maps a checkpoint's settings and tensor names to a Model.

To add one: write a module with functions from settings to Model like those of `llama`, and enter them below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_vllm_server.architectures import llama, mixtral, mpt

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_vllm_server.errors import CheckpointError
    from langchain_vllm_server.fields import Fields
    from langchain_vllm_server.model_spec import Model, TensorNames

# The `architectures` entry of config.json → its reading.
HF_ARCHITECTURES: dict[str, Callable[[Fields], Model]] = {
    "LlamaForCausalLM": llama.from_config,
    "MistralForCausalLM": llama.mistral_from_config,
    "MixtralForCausalLM": mixtral.from_config,
    "MPTForCausalLM": mpt.from_config,
    "MptForCausalLM": mpt.from_config,
}

# GGUF's general.architecture → its reading, with the name among those above.
GGUF_ARCHITECTURES: dict[str, Callable[[Fields, TensorNames], tuple[str, Model]]] = {
    "llama": mixtral.from_gguf,
}


def model_from_config(config: Fields) -> tuple[str, Model]:
    """The architecture's name and the model that a config.json describes.

    Raises:
        CheckpointError: The architecture or a value is not supported, or a value is missing or impossible.
    """
    names = config.get("architectures", [])
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise config.error("architectures", f"expected a list of one name, found {names!r}")
    if (architecture := names[0]) not in HF_ARCHITECTURES:
        raise _unsupported(config, "architectures", architecture, list(HF_ARCHITECTURES))
    if "quantization_config" in config:
        method = config.section("quantization_config").get("quant_method", "unnamed")
        raise config.error(
            "quantization_config", f"method {method!r} is not supported; use the unquantised checkpoint or a GGUF file"
        )
    return architecture, HF_ARCHITECTURES[architecture](config)


def model_from_gguf(metadata: Fields, tensors: TensorNames) -> tuple[str, Model]:
    """The architecture's name and the model that GGUF metadata describes.

    Raises:
        CheckpointError: As `model_from_config`.
    """
    architecture = metadata.text("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise _unsupported(metadata, "general.architecture", architecture, list(GGUF_ARCHITECTURES))
    return GGUF_ARCHITECTURES[architecture](metadata, tensors)


def _unsupported(fields: Fields, name: str, found: str, supported: list[str]) -> CheckpointError:
    return fields.error(name, f"{found!r} is not supported; supported: {', '.join(supported)}")

"""From a checkpoint to the engine's own types."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from langchain_vllm_server._engine import ModelConfig, TensorInfo

if TYPE_CHECKING:
    from langchain_vllm_server.checkpoint import Checkpoint


def to_engine(checkpoint: Checkpoint) -> tuple[ModelConfig, dict[str, list[TensorInfo]]]:
    """The engine's config and tensor index: field by field, and role by role, what the checkpoint says."""
    config = ModelConfig()
    for field in fields(checkpoint.spec):
        value = getattr(checkpoint.spec, field.name)
        setattr(config, field.name, list(value) if isinstance(value, tuple) else value)
    tensors = {
        role: [TensorInfo(t.name, t.format, list(t.shape), t.file, t.offset) for t in parts]
        for role, parts in checkpoint.tensors.items()
    }
    return config, tensors

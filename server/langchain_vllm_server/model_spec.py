"""A transformer as data: what an architecture file makes of a checkpoint's settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

# Bounds that no real model comes near, so that an absurd count makes an error and not a huge list.
MAX_LAYERS = MAX_HEADS = MAX_HEAD_DIM = 1 << 14
MAX_EXPERTS = 1 << 12


@dataclass(frozen=True)
class ModelSpec:
    """The fields of the engine's ModelConfig; csrc/model/config.h has the meaning of each."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm: str  # "rms" | "layer"
    norm_eps: float
    activation: str  # "silu" | "gelu" | "gelu_tanh" | "relu"
    gated_mlp: bool
    attention_scale: float
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    clip_qkv: float = 0.0
    logit_scale: float = 1.0
    rope_inv_freq: tuple[float, ...] = ()
    rope_interleaved: bool = False
    rope_attention_factor: float = 1.0
    alibi_slopes: tuple[float, ...] = ()
    sliding_window: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        """Rows of q."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k, and of v."""
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Model:
    """What an architecture says of a checkpoint.

    Attributes:
        spec: The transformer.
        max_position: Tokens that it can see at once.
        roles: Role (csrc/model/weights.h), with `{i}` for the layer → the checkpoint's names, stacked by rows, where
            they have an `{e}` for one expert after the other. `name[{e}]` is that part of a tensor of all experts.
            Biases are not listed: a weight's is named like it, with `.bias` for `.weight`.
        tied: Whether the checkpoint may lack `lm_head`, whose part `embed` then plays.
        biased: Roles whose biases the settings ask for (True) or rule out (False); where absent the checkpoint decides.
        unused: Patterns (regular expressions) of tensors that the model does without.
    """

    spec: ModelSpec
    max_position: int
    roles: dict[str, list[str]]
    tied: bool
    biased: dict[str, bool] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


class TensorNames(Protocol):
    """The tensors of a checkpoint, as far as an architecture needs to see them."""

    def __contains__(self, name: object) -> bool: ...

    def rows(self, name: str) -> int:
        """The first dimension of a tensor."""

    def floats(self, name: str) -> list[float]:
        """The numbers of a small F32 tensor."""

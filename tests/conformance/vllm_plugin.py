"""A pytest plugin for vLLM's tests: SmolLM2's tokenizer in the place of every other, and nothing is downloaded.

Runs in vLLM's environment, with its `tests` on the path. SMOLLM2 names the folder of a Hugging Face checkpoint.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

CHECKPOINT = os.environ["SMOLLM2"]
VOCAB_SIZE = 49152

transformers: Any = importlib.import_module("transformers")
tokenizers: Any = importlib.import_module("vllm.tokenizers")
utils: Any = importlib.import_module("tests.utils")

_from_pretrained = transformers.AutoTokenizer.from_pretrained


def _tokenizer(*_args: Any, **_kwargs: Any) -> Any:
    return _from_pretrained(CHECKPOINT)


transformers.AutoTokenizer.from_pretrained = staticmethod(_tokenizer)
tokenizers.get_tokenizer = _tokenizer
utils.RemoteVLLMServer._pre_download_model = lambda *_args: None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The vocabulary's size is asked of a model's config, which is not there."""
    for item in items:
        if hasattr(item.module, "get_vocab_size"):
            item.module.get_vocab_size = lambda *_args: VOCAB_SIZE

"""A pytest plugin for llama.cpp's tests: its second names of the OpenAI routes become the first, nothing is downloaded.

Run it in their folder `tools/server/tests`, which is on the path.
"""

from __future__ import annotations

import importlib
from typing import Any

utils: Any = importlib.import_module("utils")

_make_url = utils.ServerProcess.make_url
_make_request = utils.ServerProcess.make_request
_OPENAI = frozenset({"/chat/completions", "/completions", "/embeddings", "/models"})


def _url(server: Any, path: str, host: str | None = None) -> Any:
    return _make_url(server, f"/v1{path}" if path in _OPENAI else path, host)


def _request(server: Any, method: str, path: str, data: Any = None, *args: Any, **kwargs: Any) -> Any:
    if path == "/tokenize" and data and "content" in data:
        data = {"prompt" if name == "content" else name: value for name, value in data.items()}
    return _make_request(server, method, path, data, *args, **kwargs)


utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.ServerProcess.make_url = _url
utils.ServerProcess.make_request = _request

"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_vllm_server.served_model import ServedModel


def model_list(model: ServedModel) -> dict[str, Any]:
    """A card for every name."""
    return {"object": "list", "data": [model_card(model, name) for name in model.names]}


def model_card(model: ServedModel, name: str) -> dict[str, Any]:
    """The card of one name, as vLLM draws it."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "vllm",
        "root": model.root,
        "parent": None,
        "max_model_len": model.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{uuid.uuid4().hex}",
                "object": "model_permission",
                "created": model.created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }

"""JSON schemas: what is accepted holds for every answer of a model that knows nothing of JSON; the rest is named."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from langchain_vllm_server import json_schema
from langchain_vllm_server.errors import BadRequestError
from langchain_vllm_server.structured import GrammarCompiler
from tests.engines import running_engine
from tests.parity.test_tiny_models import make_llama
from tests.server.fakes import EOS, byte_tokenizer
from tests.server.random_schemas import SchemaMaker, random_answer
from tests.server.schemas import REFUSED, accepted

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = byte_tokenizer()
END = TOKENIZER.token_id(EOS)
# What ends strings, lists and objects is a little likelier, so that random answers end.
BIAS = [(TOKENIZER.encode(char)[0], 4.0) for char in '"]}']


@pytest.fixture(scope="module")
def model() -> Any:
    return SimpleNamespace(
        compiler=GrammarCompiler(), tokenizer=TOKENIZER, vocab_size=TOKENIZER.vocab_size, eos_token_ids=(END,)
    )


def is_valid(schema: Any, text: str) -> bool:
    validator = validator_for(schema, default=Draft202012Validator)
    return validator(schema, format_checker=validator.FORMAT_CHECKER).is_valid(json.loads(text))


async def test_every_finished_answer_is_valid(model: Any, tmp_path: Path) -> None:
    make_llama(tmp_path, vocab_size=TOKENIZER.vocab_size, max_position_embeddings=1024)
    options = {"max_model_len": 600, "memory_bytes": 64 << 20, "max_num_seqs": 64}
    with running_engine(tmp_path, **options) as client:
        ids = {}
        for number, schema in enumerate(accepted()):
            constraint = await model.compiler.compile(json_schema.grammar(schema, "json"), model, "json")
            for seed in range(4):
                sampled = {"temperature": 1.0, "seed": seed, "logit_bias": BIAS if seed else []}
                ends = {"max_tokens": 400, "stop_token_ids": [END]}
                ids[client.submit([number % 200, seed], constraint.fork(), **sampled, **ends)] = schema
        client.wait()
        finished = set()
        for request_id, schema in ids.items():
            result = client.results[request_id]
            assert result.finish in ("stop", "length"), (schema, result.error)
            if result.finish == "stop":
                finished.add(json.dumps(schema))
                text = TOKENIZER.decode(result.tokens)
                assert is_valid(schema, text), (schema, text)
    unfinished = [schema for schema in accepted() if json.dumps(schema) not in finished]
    assert len(unfinished) <= 3, unfinished


@pytest.mark.parametrize(("schema", "path"), REFUSED, ids=lambda v: json.dumps(v)[:40])
async def test_what_cannot_be_enforced_is_named(model: Any, schema: Any, path: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        await model.compiler.compile(json_schema.grammar(schema, "the_field"), model, "the_field")
    assert refused.value.param == "the_field"
    assert refused.value.message.startswith(f"the_field: {path}: ") or path in refused.value.message.split(": ", 1)[1]


@pytest.mark.parametrize("seed", range(10))
async def test_random_schemas_are_enforced_or_refused(model: Any, seed: int) -> None:
    """Whatever the combination of keywords: an answer that is over is valid, and few schemas are refused."""
    rng = random.Random(seed)
    likelier = [token for token, _ in BIAS]
    refused = finished = 0
    for _ in range(40):
        schema = SchemaMaker(rng).document()
        try:
            constraint = await model.compiler.compile(json_schema.grammar(schema, "json"), model, "json")
        except BadRequestError:
            refused += 1
            continue
        for _ in range(3):
            tokens = random_answer(constraint.fork(), rng, model.vocab_size, END or 0, likelier)
            if tokens is not None:
                finished += 1
                assert is_valid(schema, TOKENIZER.decode(tokens)), (schema, TOKENIZER.decode(tokens))
    assert refused < 15
    assert finished > 30

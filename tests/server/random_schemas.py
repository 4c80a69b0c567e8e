"""Random JSON schemas, and random answers to a grammar."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

    from langchain_vllm_server.structured import Constraint

NAMES = ["a", "b", "name", "x-y", "é", ""]
PATTERNS = ["^[a-c]{1,4}$", "^x", "z$", "^[0-9]{2,3}$", "a|bc", "^([a-z]|-)*$", "^.?$"]
FORMATS = ["date", "time", "ipv4", "uuid", "email", "hostname"]


class SchemaMaker:
    """Draws schemas: every keyword that is enforced, in combinations that may have no instance."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def document(self) -> dict[str, Any]:
        schema = self.schema(3)
        return {**schema, "$defs": {"d0": self.schema(1), "d1": self.schema(1)}}

    def schema(self, depth: int) -> Any:
        kinds = [self.integer, self.number, self.string, self.constant, self.simple]
        if depth > 0:
            kinds += [self.object, self.object, self.array, self.combined, self.reference]
        return self.rng.choice(kinds)(depth)

    def integer(self, _depth: int) -> Any:
        low = self.rng.randint(-200, 200)
        high = low + self.rng.randint(-1, 300)
        return {"type": "integer", **self._some(minimum=low, maximum=high, multipleOf=self.rng.choice([2, 3, 10]))}

    def number(self, _depth: int) -> Any:
        low = self.rng.uniform(-2, 2)
        bounds = {"exclusiveMinimum": round(low, 3), "maximum": round(low + self.rng.uniform(0, 3), 2)}
        return {"type": "number", **self._some(**bounds)}

    def string(self, _depth: int) -> Any:
        low = self.rng.randint(0, 3)
        more = self._some(minLength=low, maxLength=low + self.rng.randint(0, 5), pattern=self.rng.choice(PATTERNS))
        return {"type": "string", **(more if self.rng.random() < 0.8 else {"format": self.rng.choice(FORMATS)})}

    def constant(self, depth: int) -> Any:
        values = [1, -2.5, "a", 'q"\\\n', None, True, [], {}, [1, {"a": "é"}], {"a": [None]}, "🙂"]
        if self.rng.random() < 0.5:
            return {"const": self.rng.choice(values)}
        other = self.integer(depth) if self.rng.random() < 0.2 else {}
        return {"enum": self.rng.sample(values, self.rng.randint(1, 4)), **other}

    def simple(self, _depth: int) -> Any:
        types = ["boolean", "null", "integer"]
        return {"type": self.rng.choice([*types, self.rng.sample(types, 2)])}

    def object(self, depth: int) -> Any:
        names = self.rng.sample(NAMES, self.rng.randint(0, 3))
        made: dict[str, Any] = {"type": "object", "properties": {name: self.schema(depth - 1) for name in names}}
        if names and self.rng.random() < 0.7:
            made["required"] = self.rng.sample(names, self.rng.randint(1, len(names)))
        made |= self._some(additionalProperties=self.rng.choice([False, True, self.schema(0)]))
        if self.rng.random() < 0.2:
            made["patternProperties"] = {self.rng.choice(PATTERNS): self.schema(0)}
        if self.rng.random() < 0.2:
            made |= self._some(minProperties=self.rng.randint(0, 2), maxProperties=self.rng.randint(1, 4))
        return made

    def array(self, depth: int) -> Any:
        low = self.rng.randint(0, 2)
        made = {"type": "array", **self._some(minItems=low, maxItems=low + self.rng.randint(0, 2))}
        if self.rng.random() < 0.3:
            made["prefixItems"] = [self.schema(depth - 1) for _ in range(self.rng.randint(1, 2))]
        return {**made, "items": self.rng.choice([self.schema(depth - 1), False])}

    def combined(self, depth: int) -> Any:
        key = self.rng.choice(["anyOf", "anyOf", "oneOf", "allOf"])
        beside = self.schema(0) if self.rng.random() < 0.2 else {}
        return {**beside, key: [self.schema(depth - 1) for _ in range(self.rng.randint(1, 3))]}

    def reference(self, _depth: int) -> Any:
        return {"$ref": f"#/$defs/d{self.rng.randint(0, 1)}"}

    def _some(self, **keywords: Any) -> dict[str, Any]:
        return {key: value for key, value in keywords.items() if self.rng.random() < 0.5}


def random_answer(
    constraint: Constraint, rng: random.Random, vocab_size: int, end: int, likelier: list[int], limit: int = 300
) -> list[int] | None:
    """Tokens of an answer that draws from what is allowed; None for one that is not over after `limit` tokens."""
    words = (vocab_size + 31) // 32
    tokens: list[int] = []
    while len(tokens) < limit:
        new = constraint.forced()
        if not new:
            mask = (ctypes.c_uint32 * words)()
            constraint.fill_mask(ctypes.addressof(mask))
            allowed = [i for i in range(vocab_size) if mask[i // 32] >> (i % 32) & 1]
            closing = [token for token in likelier if token in allowed]
            new = [rng.choice(closing if closing and rng.random() < 0.3 else allowed)]
        if new[-1] == end:
            return tokens + new[:-1]
        constraint.consume(new)
        tokens += new
    return None

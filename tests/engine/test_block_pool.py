"""BlockPool against a list and two dictionaries."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from langchain_vllm_server._engine_test import KV_BLOCK_SIZE, BlockPool, InvariantError

Key = tuple[int, int]  # prefix id, token that fills the block


def tokens(fill: int) -> list[int]:
    return [fill] * KV_BLOCK_SIZE


class BlockPoolMachine(RuleBasedStateMachine):
    """Block tables are opened, filled, published, shared and released; the pool does what the model does."""

    @initialize(num_blocks=st.integers(1, 8), max_cached=st.integers(0, 8))
    def start(self, num_blocks: int, max_cached: int) -> None:
        self.pool = BlockPool(num_blocks, max_cached)
        self.max_cached = max_cached
        self.empty: list[int] = []  # free, used before; the last one is reused first
        self.unused = list(range(num_blocks))
        self.used = 0
        self.idle: list[int] = []  # free and cached, in order of reuse
        self.cached: dict[Key, int] = {}
        self.ids: dict[Key, int] = {}  # of the cached ones
        self.issued: set[int] = set()
        self.tables: list[list[int]] = []
        self.prefixes: list[list[int]] = []  # per table, the ids of its published blocks

    @rule()
    def open_table(self) -> None:
        self.tables.append([])
        self.prefixes.append([])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        block = self.pool.allocate()
        if self.empty:
            assert block == self.empty.pop()
        elif self.unused and (self.used < self.max_cached or len(self.idle) <= self.max_cached // 2):
            assert block == self.unused.pop(0)
            self.used += 1
        elif self.idle:
            assert block == self.idle.pop(0)
        else:
            assert block == -1
            return
        for key in [key for key, cached in self.cached.items() if cached == block]:
            del self.cached[key], self.ids[key]
        table.append(block)

    @precondition(lambda self: any(len(t) > len(p) for t, p in zip(self.tables, self.prefixes, strict=True)))
    @rule(data=st.data(), fill=st.integers(0, 1))
    def publish(self, data: st.DataObject, fill: int) -> None:
        choices = [i for i, table in enumerate(self.tables) if len(table) > len(self.prefixes[i])]
        i = data.draw(st.sampled_from(choices))
        prefixes = self.prefixes[i]
        block = self.tables[i][len(prefixes)]
        key = (prefixes[-1] if prefixes else 0, fill)
        prefix = self.pool.publish(block, key[0], tokens(fill))
        if key in self.cached:
            assert prefix == self.ids[key]
        else:
            assert prefix not in self.issued
            self.issued.add(prefix)
            self.cached[key], self.ids[key] = block, prefix
        prefixes.append(prefix)

    @rule(fills=st.lists(st.integers(0, 1), max_size=4))
    def share(self, fills: list[int]) -> None:
        table: list[int] = []
        prefixes: list[int] = []
        for fill in fills:
            key = (prefixes[-1] if prefixes else 0, fill)
            block = self.pool.find(key[0], tokens(fill))
            assert block == self.cached.get(key, -1)
            if block < 0:
                break
            assert self.pool.is_free(block) == (block in self.idle)
            self.pool.acquire(block)
            if block in self.idle:
                self.idle.remove(block)
            table.append(block)
            prefixes.append(self.pool.prefix(block))
            assert prefixes[-1] == self.ids[key]
        self.tables.append(table)
        self.prefixes.append(prefixes)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release_table(self, data: st.DataObject) -> None:
        i = data.draw(st.sampled_from(range(len(self.tables))))
        table = self.tables.pop(i)
        self.prefixes.pop(i)
        for block in reversed(table):
            self.pool.release(block)
            if any(block in other for other in self.tables):
                continue
            if block in self.cached.values():
                self.idle.append(block)  # the most recently used
            else:
                self.empty.append(block)  # holds nothing of use

    @rule()
    def forget_cached(self) -> None:
        self.pool.forget_cached()
        for key in [key for key, cached in self.cached.items() if cached in self.idle]:
            del self.cached[key], self.ids[key]
        self.empty += self.idle
        self.idle = []

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.num_free == len(self.empty) + len(self.unused) + len(self.idle)


BlockPoolMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, derandomize=True, database=None
)
test_random_operations = BlockPoolMachine.TestCase


def test_an_evicted_prefix_never_comes_back_under_its_old_name() -> None:
    """A block that was reused must not be reachable through the id of what it held before."""
    pool = BlockPool(1)
    block = pool.allocate()
    old = pool.publish(block, 0, tokens(1))
    pool.release(block)
    assert pool.find(0, tokens(1)) == block
    assert pool.allocate() == block
    assert pool.find(0, tokens(1)) == -1
    new = pool.publish(block, 0, tokens(1))
    assert new != old


def test_many_blocks_in_use_leave_less_room_for_idle_ones() -> None:
    """Up to max_cached blocks none makes room for new ones; from there on half as many idle ones stay."""
    pool = BlockPool(8, max_cached=4)
    for fill in range(3):
        pool.publish(pool.allocate(), 0, tokens(fill))
    for block in range(3):
        pool.release(block)
    assert [pool.allocate() for _ in range(5)] == [3, 0, 4, 5, 6]


def test_one_token_of_difference_is_another_key() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.publish(block, 0, list(range(16)))
    for i in range(16):
        other = list(range(16))
        other[i] += 1
        assert pool.find(0, other) == -1
    assert pool.find(1, list(range(16))) == -1


def test_broken_promises_are_noticed() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    with pytest.raises(InvariantError, match="differs from the block tables"):
        pool.check_integrity([])
    with pytest.raises(InvariantError, match="names a block twice"):
        pool.check_integrity([[block, block]])
    with pytest.raises(InvariantError, match="outside the pool"):
        pool.check_integrity([[2]])
    pool.acquire(block)
    with pytest.raises(InvariantError, match="private block is shared"):
        pool.check_integrity([[block], [block]])
    pool.release(block)
    pool.release(block)
    with pytest.raises(InvariantError, match="free block is released"):
        pool.release(block)
    with pytest.raises(InvariantError, match="only a held, private block"):
        pool.publish(block, 0, tokens(1))

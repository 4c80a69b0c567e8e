"""Owners of a server, on real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from langchain_vllm_server.errors import StartError
from langchain_vllm_server.owners import Owners

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SECONDS = 5.0  # to wait for what must come


class Server:
    """Owners of nothing but a list of what was called."""

    def __init__(self) -> None:
        self.name = f"\0langchain-vllm-test-{uuid.uuid4()}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.name)
        listener.listen()
        self.calls: list[str] = []
        self.called = asyncio.Event()
        self.owners = Owners(
            listener.detach(), {"url": "u"}, stop=lambda: self.call("stop"), abandon=lambda: self.call("abandon")
        )

    def call(self, what: str) -> None:
        self.calls.append(what)
        self.called.set()

    def close(self) -> None:
        self.owners.end()
        for owner in self.owners._until:
            owner.close()

    @contextmanager
    def owner(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as owner:
            owner.setblocking(False)
            owner.connect(self.name)
            yield owner

    async def calls_in_the_end(self) -> list[str]:
        async with asyncio.timeout(SECONDS):
            await self.called.wait()
        return self.calls


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    server.close()


async def read(owner: socket.socket) -> bytes:
    async with asyncio.timeout(SECONDS):
        return await asyncio.get_running_loop().sock_recv(owner, 4096)


async def test_greets_with_the_owners_so_far(server: Server) -> None:
    with server.owner() as first, server.owner() as second:
        assert json.loads(await read(first)) == {"url": "u", "owners": []}
        assert json.loads(await read(second)) == {"url": "u", "owners": [os.getpid()]}


async def test_the_last_to_leave_stops_it(server: Server) -> None:
    with server.owner() as first, server.owner() as second:
        await read(first)
        await read(second)
        first.send(b"leave 0\n")
        assert await read(first) == b"stays\n"
        assert server.calls == []
        second.send(b"leave 0\n")
        assert await server.calls_in_the_end() == ["stop"]
        assert await read(second) == b"ends\n"
        with pytest.raises(ConnectionRefusedError), server.owner():
            pass


async def test_an_owner_that_is_gone_without_a_word(server: Server) -> None:
    with server.owner() as first:
        await read(first)
        with server.owner() as second:
            await read(second)
        await asyncio.sleep(0.05)
        assert server.calls == []
    assert await server.calls_in_the_end() == ["abandon"]


async def test_stays_for_a_while_and_then_ends(server: Server) -> None:
    with server.owner() as owner:
        await read(owner)
        owner.send(b"leave 0.1\n")
        assert await read(owner) == b"stays\n"
        assert server.calls == []
        assert await server.calls_in_the_end() == ["stop"]


async def test_stays_for_a_while_only_as_long_as_somebody_is_there(server: Server) -> None:
    with server.owner() as owner:
        await read(owner)
        owner.send(b"leave 600\n")
        assert await read(owner) == b"stays\n"
    assert await server.calls_in_the_end() == ["abandon"]


async def test_an_owner_comes_before_the_time_is_over(server: Server) -> None:
    with server.owner() as first, server.owner() as second:
        await read(first)
        first.send(b"leave 0.1\n")
        assert await read(first) == b"stays\n"
        assert await read(first) == b""  # the time is over, and the connection with it
        await read(second)
        assert server.calls == []


async def test_no_socket() -> None:
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "w"), pytest.raises(StartError, match=f"on --owners-fd {read}"):
        Owners(read, {}, stop=print, abandon=print)

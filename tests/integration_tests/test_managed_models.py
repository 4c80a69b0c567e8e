"""Model objects that start a server themselves, with a fake one: a real process that keeps the contract."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from langchain_vllm import ChatVLLM, VLLMServer, _shared
from langchain_vllm.errors import VLLMConnectionError, VLLMServerCrashedError
from langchain_vllm.launcher import VLLMServerError
from tests.integration_tests.fakes import alive, eventually

pytestmark = pytest.mark.usefixtures("fake_servers")


class TestSharing:
    def test_objects_share_a_server_and_the_last_one_stops_it(self) -> None:
        first, second = ChatVLLM(model="good"), ChatVLLM(model="good", temperature=0.5)
        pid = int(str(first.invoke("Hello").content).split()[0])
        assert str(second.invoke("Hello").content).startswith(f"{pid} ")
        assert first.server is second.server
        del first
        gc.collect()
        assert not eventually(lambda: not alive(pid), seconds=0.4)
        del second
        gc.collect()
        assert eventually(lambda: not alive(pid))

    def test_the_keep_alive_bridges_a_gap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_shared, "KEEP_ALIVE_SECONDS", 0.5)
        pids = {str(ChatVLLM(model="good").invoke("Hello").content).split()[0] for _ in range(3)}
        chat = ChatVLLM(model="good")
        pids.add(str(chat.invoke("Hello").content).split()[0])
        assert len(pids) == 1
        assert not eventually(lambda: not alive(int(*pids)), seconds=0.8)  # the gaps before count no more

    def test_other_settings_are_other_servers(self) -> None:
        chats = [
            ChatVLLM(model="good", server_options=options) for options in ({}, {"seed": 1}, {"show_progress": False})
        ]
        pids = [str(chat.invoke("Hello").content).split()[0] for chat in chats]
        assert pids[0] != pids[1]
        assert pids[0] == pids[2]

    def test_simultaneous_first_calls_start_one_server(self) -> None:
        chats = [ChatVLLM(model="slow") for _ in range(4)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: chats[i % 4].invoke("Hello").content, range(8)))
        assert len({str(answer).split()[0] for answer in answers}) == 1

    async def test_the_event_loop_runs_on_while_a_server_starts(self) -> None:
        chat = ChatVLLM(model="slow")
        longest = 0.0

        async def watch() -> None:
            nonlocal longest
            while True:
                before = asyncio.get_running_loop().time()
                await asyncio.sleep(0.01)
                longest = max(longest, asyncio.get_running_loop().time() - before)

        watcher = asyncio.create_task(watch())
        answers = await asyncio.gather(*(chat.ainvoke("Hello") for _ in range(4)))
        watcher.cancel()
        assert len({str(answer.content).split()[0] for answer in answers}) == 1
        assert longest < 0.3  # the start takes more than 0.5 s

    def test_copies_hold_the_server(self) -> None:
        chat = ChatVLLM(model="good")
        pid = int(str(chat.invoke("Hello").content).split()[0])
        copy = chat.model_copy(update={"temperature": 0.5})
        del chat
        gc.collect()
        assert not eventually(lambda: not alive(pid), seconds=0.4)
        assert str(copy.invoke("Hello").content).startswith(f"{pid} ")

    def test_the_address_is_no_part_of_the_object(self) -> None:
        chat = ChatVLLM(model="good")
        before = chat._get_llm_string(), repr(chat)
        chat.invoke("Hello")
        assert (chat._get_llm_string(), repr(chat)) == before

    def test_a_key_is_passed_on(self) -> None:
        chat = ChatVLLM(model="good", api_key="hidden-key")
        chat.invoke("Hello")
        assert chat.server is not None
        assert "VLLM_API_KEY=hidden-key" in Path(f"/proc/{chat.server.pid}/environ").read_text()

    def test_a_server_that_dies_is_reported_and_started_again(self) -> None:
        chat = ChatVLLM(model="die")
        with pytest.raises(
            VLLMServerCrashedError, match=r"has ended \(the next call starts it again\)[^\0]*segmentation fault"
        ) as raised:
            chat.invoke("Hello")
        assert raised.value.is_retryable
        assert chat.server is not None
        first = chat.server.pid
        with pytest.raises(VLLMServerCrashedError):
            chat.invoke("Hello")
        assert chat.server.pid != first

    async def test_a_server_that_dies_during_an_answer(self) -> None:
        chat = ChatVLLM(model="die")
        stream, astream = chat.stream("Hello"), chat.astream("Hello")
        assert next(stream).content == "Once"
        with pytest.raises(VLLMServerCrashedError):
            next(stream)
        assert (await anext(astream)).content == "Once"
        with pytest.raises(VLLMServerCrashedError):
            await anext(astream)

    @pytest.mark.parametrize("asynchronously", [False, True])
    async def test_nothing_is_sent_twice(self, asynchronously: bool) -> None:
        chat = ChatVLLM(model="drop", max_retries=3)
        with pytest.raises(VLLMConnectionError, match="runs, but did not answer") as raised:
            await (chat.ainvoke("Hello") if asynchronously else asyncio.to_thread(chat.invoke, "Hello"))
        assert not isinstance(raised.value, VLLMServerCrashedError)
        assert chat.server is not None
        assert chat.server.log_tail().count("a request") == 1

    def test_an_object_follows_a_server_that_another_has_started_again(self) -> None:
        first, second = ChatVLLM(model="good"), ChatVLLM(model="good")
        pids = [int(str(chat.invoke("Hello").content).split()[0]) for chat in (first, second)]
        assert pids[0] == pids[1]
        os.kill(pids[0], signal.SIGKILL)
        assert first.server is not None
        assert eventually(lambda: not first.server.is_ready)  # type: ignore[union-attr]
        pids = [int(str(chat.invoke("Hello").content).split()[0]) for chat in (first, second)]
        assert pids[0] == pids[1]

    def test_a_failed_start_fails_every_caller(self) -> None:
        chat = ChatVLLM(model="crash")
        for _ in range(2):
            with pytest.raises(VLLMServerError, match="no such model"):
                chat.invoke("Hello")


class TestLoops:
    def test_one_model_object_in_many_event_loops(self) -> None:
        with VLLMServer("good") as server:
            chat = ChatVLLM(base_url=server.base_url, model="good")
            for _ in range(3):
                assert asyncio.run(chat.ainvoke("Hello")).content

            def in_a_loop_of_its_own(i: int) -> str:
                return str(asyncio.run(chat.ainvoke(str(i))).content).split()[1]

            with ThreadPoolExecutor(6) as pool:
                assert list(pool.map(in_a_loop_of_its_own, range(12))) == [str(i) for i in range(12)]
            transport = chat.root_async_client._client._transport
            assert not transport._pools, "connections of a closed loop were kept"

"""The two mailboxes: nothing is lost, nobody waits, one wake-up per drain."""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from langchain_vllm_server._engine_test import Inbox, Outbox


def readable(outbox: Outbox, timeout: float = 0) -> bool:
    return bool(select.select([outbox.fileno()], [], [], timeout)[0])


def test_outbox_is_readable_exactly_while_it_holds_something() -> None:
    outbox = Outbox()
    assert not readable(outbox)
    outbox.post([])
    assert not readable(outbox)
    for round_ in range(3):
        outbox.post([(round_, [1]), (round_, [2])])
        outbox.post([(round_, [3])])
        assert readable(outbox)
        assert [(e.request_id, e.tokens) for e in outbox.drain()] == [(round_, [1]), (round_, [2]), (round_, [3])]
        assert not readable(outbox)
        assert outbox.drain() == []


def test_outbox_wakes_once_however_much_is_posted() -> None:
    outbox = Outbox()
    for _ in range(100_000):  # more than a pipe holds: a byte for each would block or fail
        outbox.post([(1, [1])])
    assert os.read(outbox.fileno(), 100) == b"\0"


def test_outbox_keeps_what_wakes_nobody_until_something_does() -> None:
    outbox = Outbox()
    outbox.post([(1, [1])], wakes=False)
    assert not readable(outbox)
    outbox.post([(2, [2])])
    assert readable(outbox)
    outbox.post([(1, [3])], wakes=False)
    assert [e.request_id for e in outbox.drain()] == [1, 2, 1]
    assert not readable(outbox)
    outbox.post([(1, [4])], wakes=False)
    assert [e.request_id for e in outbox.drain()] == [1]  # nobody was woken, and nobody need be


def test_outbox_wakes_before_it_holds_too_much() -> None:
    outbox = Outbox()
    posted = 0
    while not readable(outbox):
        outbox.post([(posted, [1])] * 8, wakes=False)
        posted += 8
    assert 1000 < posted < 1100
    assert len(outbox.drain()) == posted


def test_outbox_descriptors_are_private_and_non_blocking() -> None:
    outbox = Outbox()
    assert not os.get_blocking(outbox.fileno())
    assert not os.get_inheritable(outbox.fileno())


def test_outbox_closes_its_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    outboxes = [Outbox() for _ in range(10)]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    del outboxes
    assert len(os.listdir("/proc/self/fd")) == before


def test_outbox_loses_no_wake_up_between_threads() -> None:
    outbox = Outbox()
    count = 20_000

    def produce() -> None:
        for i in range(count):
            outbox.post([(i, [i])])

    producer = threading.Thread(target=produce)
    producer.start()
    received: list[int] = []
    while len(received) < count:
        assert readable(outbox, timeout=10), "events were posted and nobody was woken"
        received += [event.request_id for event in outbox.drain()]
    producer.join()
    assert received == list(range(count))
    assert not readable(outbox)


def test_inbox_hands_over_everything_in_order() -> None:
    inbox = Inbox()
    assert inbox.take(wait=False) == []
    inbox.post_request(1, [1, 2])
    inbox.post_cancel(1)
    inbox.post_request(2, [3])
    assert inbox.take(wait=True) == [(1, [1, 2]), (1, None), (2, [3])]
    assert inbox.take(wait=False) == []


def take_in_thread(inbox: Inbox) -> queue.SimpleQueue[list[tuple[int, list[int] | None]] | None]:
    taken: queue.SimpleQueue[list[tuple[int, list[int] | None]] | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: taken.put(inbox.take(wait=True)), daemon=True).start()
    time.sleep(0.05)  # by now it waits; if not, the test proves less but still passes
    assert taken.empty()
    return taken


def test_inbox_wakes_who_waits() -> None:
    inbox = Inbox()
    taken = take_in_thread(inbox)
    inbox.post_cancel(7)
    assert taken.get(timeout=10) == [(7, None)]
    taken = take_in_thread(inbox)
    inbox.close()
    assert taken.get(timeout=10) is None


def test_a_closed_inbox_delivers_what_it_accepted_and_refuses_more() -> None:
    inbox = Inbox()
    assert inbox.post_request(1, [1])
    inbox.close()
    assert not inbox.post_request(2, [1])
    assert not inbox.post_cancel(1)
    assert inbox.take(wait=True) == [(1, [1])]
    assert inbox.take(wait=True) is None
    assert inbox.take(wait=False) is None


def test_inbox_takes_from_many_threads() -> None:
    inbox = Inbox()

    def produce(first: int) -> None:
        for i in range(first, first + 2000):
            assert inbox.post_cancel(i)

    with ThreadPoolExecutor(4) as pool:
        producers = [pool.submit(produce, 10_000 * i) for i in range(4)]
        received: list[int] = []
        while len(received) < 8000:
            received += [request_id for request_id, _ in inbox.take(wait=True) or []]
        for producer in producers:
            producer.result()
    for i in range(4):  # each sender's letters keep their order
        mine = [r for r in received if r // 10_000 == i]
        assert mine == list(range(10_000 * i, 10_000 * i + 2000))

"""The queue and the workers behind it: every item ends exactly once, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from guard.server.pool import NotDone, Pool, QueueFull


class Echo:
    """Gives what it gets, with the size of the batch."""

    def __init__(self) -> None:
        self.info = {"pid": os.getpid()}

    def __call__(self, payloads: Any) -> tuple[list[Any], dict[str, float]]:
        words = str(payloads)
        if "die" in words:
            os._exit(1)
        if "hang" in words:
            time.sleep(60)
        if "fault" in words:
            raise ValueError("at fault")
        if "slow" in words:
            time.sleep(0.3)
        return [(payload, len(payloads)) for payload in payloads], {}


class Broken:
    def __init__(self) -> None:
        raise FileNotFoundError("no such guard")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(Echo, workers=2, max_batch_size=4, batch_wait_s=0.05, max_queue=1000, timeout_s=30)
    made.start()
    yield made
    made.close()


def results(futures: list[Future[Any]]) -> list[Any]:
    """What each gave; the name of its error where it gave none."""
    return [type(f.exception(60)).__name__ if f.exception(60) else f.result() for f in futures]


def test_alike_items_share_a_batch_and_others_do_not(pool: Pool) -> None:
    large, small = [pool.submit(f"L{i}", 20) for i in range(2)], [pool.submit(f"S{i}", 1) for i in range(2)]
    assert results(large) == [("L0", 2), ("L1", 2)]
    assert results(small) == [("S0", 2), ("S1", 2)]


def test_no_batch_is_larger_than_allowed(pool: Pool) -> None:
    found = results([pool.submit(i) for i in range(50)])
    assert [payload for payload, _ in found] == list(range(50))
    assert max(size for _, size in found) == 4


def test_a_fault_of_one_item_is_its_own(pool: Pool) -> None:
    assert results([pool.submit(w) for w in ("a", "fault", "b")]) == [("a", 1), "NotDone", ("b", 1)]


def test_an_item_that_kills_its_worker_takes_no_other_with_it(pool: Pool) -> None:
    before = pool.restarts
    assert results([pool.submit(w) for w in ("a", "die", "b")]) == [("a", 1), "NotDone", ("b", 1)]
    assert pool.restarts == before + 2
    assert results([pool.submit("c")]) == [("c", 1)]


def test_killed_workers_lose_nothing(pool: Pool) -> None:
    futures = [pool.submit(("slow", i)) for i in range(12)]
    for pid in pool.pids:
        time.sleep(0.1)
        os.kill(pid or 0, signal.SIGKILL)
    assert [payload for payload, _ in results(futures)] == [("slow", i) for i in range(12)]


def test_an_item_that_hangs_ends_in_time(pool: Pool) -> None:
    begin = time.monotonic()
    assert results([pool.submit("hang", timeout_s=0.5)]) == ["NotDone"]
    assert time.monotonic() - begin < 20
    assert results([pool.submit("after")]) == [("after", 1)]


def test_a_full_queue_takes_nothing_more() -> None:
    made = Pool(Echo, max_batch_size=1, max_queue=2)
    made.submit("never started")
    made.submit("neither")
    with pytest.raises(QueueFull, match="2 items are waiting"):
        made.submit("too many")


def test_closing_ends_what_was_taken_and_takes_nothing_new() -> None:
    made = Pool(Echo, max_batch_size=1)
    made.start()
    futures = [made.submit(("slow", i)) for i in range(4)]
    closing = threading.Thread(target=made.close)
    closing.start()
    time.sleep(0.05)
    with pytest.raises(NotDone, match="stopping"):
        made.submit("late")
    closing.join()
    assert [payload for payload, _ in results(futures)] == [("slow", i) for i in range(4)]


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(FileNotFoundError, match="no such guard"):
        Pool(Broken).start()

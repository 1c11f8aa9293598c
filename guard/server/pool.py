"""Worker processes that each hold a model, fed micro-batches of alike items from one bounded queue.

A process of its own keeps a crash, an exhausted memory or a hang of the model out of the server: the worker is started
anew, and its items are tried once more, each alone, so that one that kills workers takes no neighbour with it.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from beavertails_v.errors import UserError

log = logging.getLogger(__name__)
# Forked from a process that has imported the libraries and nothing else: a new worker only loads its model.
CONTEXT = multiprocessing.get_context("forkserver")
START_SECONDS = 600.0


class QueueFull(UserError, RuntimeError):
    """There are as many items waiting as may wait."""


class NotDone(UserError, RuntimeError):
    """An item was not worked on for a fault of the server: time-out, dead worker, exhausted memory."""


class Work(Protocol):
    """What a worker holds. Called with payloads: a result or an Exception for each, and figures of the batch."""

    info: Mapping[str, Any]

    def __call__(self, payloads: Sequence[Any]) -> tuple[list[Any], Mapping[str, float]]: ...


@dataclass(slots=True)
class Ticket:
    """An item in the queue. size: items of nearly equal size share a batch. tries: workers that died of its batch."""

    payload: Any
    size: int
    deadline: float
    future: Future[Any] = field(default_factory=Future)
    enqueued: float = field(default_factory=time.monotonic)
    tries: int = 0


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What one batch took. waited: seconds in the queue of each item. figures: what the work says of itself."""

    size: int
    waited: tuple[float, ...]
    seconds: float
    figures: Mapping[str, float]


class Pool:
    """make: picklable, gives the Work in the worker's process. observe: called with each batch's record."""

    def __init__(
        self,
        make: Callable[[], Work],
        *,
        workers: int = 1,
        max_batch_size: int = 16,
        batch_wait_s: float = 0.005,
        max_queue: int = 512,
        timeout_s: float = 30.0,
        observe: Callable[[BatchRecord], None] = lambda record: None,
    ) -> None:
        self.make, self.max_batch_size, self.batch_wait_s = make, max_batch_size, batch_wait_s
        self.max_queue, self.timeout_s, self.observe = max_queue, timeout_s, observe
        self.restarts = 0
        self.info: Mapping[str, Any] | None = None
        self._queue: list[Ticket] = []
        self._busy = 0
        self._changed = threading.Condition()
        self._closing = False
        self._workers = [_Worker(make) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True, name=f"worker-{i}")
            for i, worker in enumerate(self._workers)
        ]

    def start(self) -> Mapping[str, Any]:
        """Starts every worker and waits for them; what the first says of itself. Raises NotDone where one fails."""
        CONTEXT.set_forkserver_preload(["guard.server.work"])
        for worker in self._workers:
            worker.begin()
        self.info, *_ = [worker.wait_ready() for worker in self._workers]
        for thread in self._threads:
            thread.start()
        return self.info

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def alive(self) -> int:
        """Workers that can take a batch."""
        return sum(worker.ready for worker in self._workers)

    @property
    def pids(self) -> list[int | None]:
        return [worker.pid for worker in self._workers]

    def submit(self, payload: Any, size: int = 0, timeout_s: float | None = None) -> Future[Any]:
        """A future of the payload's result. It ends in NotDone, or in the Exception that the work gave for it.

        Raises QueueFull, and NotDone while the pool closes.
        """
        ticket = Ticket(payload, size, time.monotonic() + (timeout_s or self.timeout_s))
        with self._changed:
            if self._closing:
                raise NotDone("the server is stopping")
            if len(self._queue) >= self.max_queue:
                raise QueueFull(f"{len(self._queue)} items are waiting")
            self._queue.append(ticket)
            self._changed.notify()
        return ticket.future

    def close(self) -> None:
        """Takes nothing new, ends what was taken, stops the workers."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for worker in self._workers:
            worker.stop()

    def _serve(self, worker: _Worker) -> None:
        while (batch := self._take()) is not None:
            if batch:
                self._run(worker, batch)

    def _take(self) -> list[Ticket] | None:
        """The next batch: the oldest item and those most like it; None where nothing comes any more."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return None
                self._changed.wait()
            full = time.monotonic() + self.batch_wait_s
            while len(self._queue) < self.max_batch_size and not self._closing:
                if (left := full - time.monotonic()) <= 0 or not self._changed.wait(left):
                    break
            self._drop_expired()
            if not self._queue:
                return []
            oldest = self._queue[0]
            if oldest.tries:
                batch = [oldest]
            else:
                alike = [t for t in self._queue if not t.tries and abs(t.size - oldest.size) <= 1]
                batch = alike[: self.max_batch_size]
            chosen = set(map(id, batch))
            self._queue = [t for t in self._queue if id(t) not in chosen]
        return [t for t in batch if t.future.set_running_or_notify_cancel()]

    def _drop_expired(self) -> None:
        now = time.monotonic()
        late = [t for t in self._queue if t.deadline <= now]
        if late:
            self._queue = [t for t in self._queue if t.deadline > now]
            for ticket in late:
                _fail(ticket, f"it waited {now - ticket.enqueued:.1f} s without its turn")

    def _run(self, worker: _Worker, batch: list[Ticket]) -> None:
        begin = time.monotonic()
        try:
            results, figures = worker.call([t.payload for t in batch], max(t.deadline for t in batch) - begin)
        except (EOFError, OSError, TimeoutError) as error:
            self._restart(worker, batch, error)
            return
        self.observe(
            BatchRecord(len(batch), tuple(begin - t.enqueued for t in batch), time.monotonic() - begin, figures)
        )
        for ticket, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                ticket.future.set_exception(result)
            else:
                ticket.future.set_result(result)

    def _restart(self, worker: _Worker, batch: list[Ticket], error: Exception) -> None:
        """Items whose worker died are tried once more, each alone; those it hung on are not."""
        self.restarts += 1
        hung = isinstance(error, TimeoutError)
        log.warning("a worker %s with %d items and is started anew", "hung" if hung else "died", len(batch))
        again = []
        for ticket in batch:
            if hung or ticket.tries:
                _fail(ticket, "no verdict in time" if hung else "the worker died of it")
            else:
                again.append(Ticket(ticket.payload, ticket.size, ticket.deadline, ticket.future, ticket.enqueued, 1))
        while True:
            try:
                worker.restart()
                break
            except NotDone as failed:
                log.error("a worker does not start: %s", failed)
                time.sleep(1.0)
        for ticket in again:  # their futures run already, so they cannot be cancelled and are run here, in turn
            self._run(worker, [ticket])


def _fail(ticket: Ticket, why: str) -> None:
    if ticket.future.running() or ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(NotDone(why))


class _Worker:
    def __init__(self, make: Callable[[], Work]) -> None:
        self._make = make
        self._process: Any = None
        self._pipe: Connection | None = None
        self.ready = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def begin(self) -> None:
        self._pipe, other = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_main, args=(self._make, other), daemon=True)
        self._process.start()
        other.close()

    def wait_ready(self) -> Mapping[str, Any]:
        assert self._pipe is not None
        try:
            if not self._pipe.poll(START_SECONDS):
                raise NotDone(f"a worker did not start within {START_SECONDS:g} s")
            word, value = self._pipe.recv()
        except (EOFError, OSError):
            raise NotDone("a worker died while it started") from None
        if word == "failed":
            raise value if isinstance(value, Exception) else NotDone(str(value))
        self.ready = True
        return dict(value)

    def restart(self) -> None:
        self.ready = False
        self.stop()
        self.begin()
        try:
            self.wait_ready()
        except NotDone:
            raise
        except Exception as error:
            raise NotDone(str(error)) from error

    def call(self, payloads: list[Any], seconds: float) -> tuple[list[Any], Mapping[str, float]]:
        assert self._pipe is not None
        self._pipe.send(payloads)
        if not self._pipe.poll(max(0.0, seconds)):
            raise TimeoutError
        return self._pipe.recv()  # type: ignore[no-any-return]

    def stop(self) -> None:
        self.ready = False
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(0.5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()


def _main(make: Callable[[], Work], pipe: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server says when to stop, by closing the pipe
    try:
        work = make()
    except Exception as error:
        pipe.send(("failed", _plain(error)))
        return
    pipe.send(("ready", work.info))
    while True:
        try:
            payloads = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(_one_by_one(work, payloads))
        except BrokenPipeError:
            return


def _one_by_one(work: Work, payloads: list[Any]) -> tuple[list[Any], Mapping[str, float]]:
    """The batch at once; where that fails, each item alone, and the one at fault has the fault."""
    try:
        return work(payloads)
    except Exception as error:
        if len(payloads) == 1:
            log.exception("an item could not be worked on")
            return [NotDone(f"{type(error).__name__}")], {}
    results: list[Any] = []
    for payload in payloads:
        results += _one_by_one(work, [payload])[0]
    return results, {}


def _plain(error: Exception) -> Any:
    """The error where it can be sent whole, else its words."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return str(error)
    return error

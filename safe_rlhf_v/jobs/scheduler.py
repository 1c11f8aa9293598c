"""Commands or functions in parallel processes: each when what it needs is there, each resumable, a failure stops only
its own line.

A job holds a lock on its folder for as long as its process lives, and the process inherits it. So a second scheduler
waits for the first one's jobs instead of running the same work twice. A scheduler that is killed takes its processes
with it (on Linux; elsewhere they run to their end, and the next scheduler waits for them).
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

from safe_rlhf_v.jobs.forked import Forked, follow

State = Literal["done before", "done", "failed", "not run"]
TAIL = 15
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # of each job
LOGS = {"PYTHONIOENCODING": "utf-8:backslashreplace"}  # whatever the locale, logs are read as UTF-8


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command, or a function for a fork of this process. after: names of jobs it needs. done: whether its work is
    there; this, not the exit code, says whether a job that ended has failed. progress: share of it that is done, None
    where that is unknown. cores: how many processes it keeps busy."""

    name: str
    command: Sequence[str] | Callable[[], object]
    log: Path
    done: Callable[[], bool]
    kind: str = "job"
    after: Sequence[str] = ()
    progress: Callable[[], float | None] = lambda: None
    cores: int = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended. seconds: of this attempt; 0 where nothing ran. tail: why it failed, the log's last lines."""

    state: State
    seconds: float = 0.0
    tail: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return self.state in ("done", "done before")


@dataclass(kw_only=True)
class Running:
    """A job whose process lives."""

    job: Job
    process: subprocess.Popen[bytes] | Forked
    lock: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class Watcher(Protocol):
    """Who shows what happens."""

    def started(self, job: Job) -> None: ...
    def ended(self, job: Job, outcome: Outcome) -> None: ...
    def tick(self, running: Sequence[Running], waiting: Sequence[Job]) -> None: ...


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    watcher: Watcher,
    environment: Mapping[str, str] | None = None,
    poll: float = 0.2,
) -> dict[str, Outcome]:
    """Runs every job, those on at most `workers` cores at a time, in order where the jobs they need allow; a job that
    wants more than there are runs alone. Returns name -> outcome.

    environment: on top of this process's. On Ctrl-C, SIGTERM or a closed terminal the running processes are stopped and
    waited for, then KeyboardInterrupt is raised; what they had done so far stays for the next time.
    """
    outcomes: dict[str, Outcome] = {}
    waiting, running = list(jobs), list[Running]()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    try:
        while waiting or running:
            _collect(running, outcomes, watcher)
            _start_ready(waiting, running, outcomes, workers, watcher, {**os.environ, **LOGS, **(environment or {})})
            watcher.tick(running, waiting)
            if waiting or running:
                time.sleep(poll)
    finally:
        for item in running:
            item.process.terminate()
        for item in running:
            item.process.wait()
            item.lock.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return outcomes


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _start_ready(
    waiting: list[Job],
    running: list[Running],
    outcomes: dict[str, Outcome],
    workers: int,
    watcher: Watcher,
    environment: Mapping[str, str],
) -> None:
    for job in list(waiting):
        needs = [outcomes.get(name) for name in job.after]
        failed = [name for name, outcome in zip(job.after, needs, strict=True) if outcome and not outcome.good]
        if failed:
            _end(job, Outcome(state="not run", tail=(f"needs {failed[0]}",)), outcomes, watcher)
        elif any(outcome is None for outcome in needs):
            continue
        elif job.done():
            _end(job, Outcome(state="done before"), outcomes, watcher)
        elif _fits(job, running, workers) and (lock := _locked(job.log)):
            if job.done():  # by the process that held the lock until now
                lock.close()
                _end(job, Outcome(state="done before"), outcomes, watcher)
            else:
                running.append(_spawn(job, lock, environment))
                watcher.started(job)
        else:
            continue
        waiting.remove(job)


def _fits(job: Job, running: Sequence[Running], workers: int) -> bool:
    return not running or sum(item.job.cores for item in running) + job.cores <= workers


def _locked(log: Path) -> IO[bytes] | None:
    """The job's lock, held as long as this file or a child's copy of it is open; None where another process has it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lock = log.with_name(log.name + ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _spawn(job: Job, lock: IO[bytes], environment: Mapping[str, str]) -> Running:
    if callable(job.command):
        return Running(job=job, process=Forked(job.command, job.log, environment), lock=lock)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            list(job.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C reaches the scheduler alone, which then stops its children itself
            preexec_fn=functools.partial(follow, os.getpid()),
        )
    return Running(job=job, process=process, lock=lock)


def _collect(running: list[Running], outcomes: dict[str, Outcome], watcher: Watcher) -> None:
    for item in list(running):
        code = item.process.poll()
        if code is None:
            continue
        item.lock.close()
        running.remove(item)
        _end(item.job, _outcome(item, code), outcomes, watcher)


def _outcome(item: Running, code: int) -> Outcome:
    if item.job.done():
        return Outcome(state="done", seconds=item.seconds)
    why = f"exit code {code}" if code > 0 else f"killed by signal {-code}" if code else "ended without its result"
    lines = item.job.log.read_text(errors="replace", encoding="utf-8").replace("\r", "\n").splitlines()
    tail = [line for line in lines if line.strip()][-TAIL:]
    return Outcome(state="failed", seconds=item.seconds, tail=(why, *tail))


def _end(job: Job, outcome: Outcome, outcomes: dict[str, Outcome], watcher: Watcher) -> None:
    outcomes[job.name] = outcome
    watcher.ended(job, outcome)

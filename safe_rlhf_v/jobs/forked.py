"""Work in child processes that share what this one has imported: a fork, and several ranks on one machine's cores."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from safe_rlhf_v.console import no_bars_in_logs, show_logs

PR_SET_PDEATHSIG = 1  # prctl(2)
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up here, not between fork and exec
FORK = multiprocessing.get_context("fork")


class Forked:
    """A function in a fork of this process, with the part of subprocess.Popen's interface that a scheduler needs.

    The parent must run no threads. log: takes what the function prints. The child leads a session of its own, so that
    a terminal's Ctrl-C does not reach it, and ends when the parent does (on Linux), however that ends.
    """

    def __init__(self, work: Callable[[], object], log: Path, environment: Mapping[str, str]) -> None:
        self._process = FORK.Process(target=_child, args=(work, log, environment, os.getpid()))
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, -N after signal N, None while it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _child(work: Callable[[], object], log: Path, environment: Mapping[str, str], parent: int) -> None:
    os.setsid()
    follow(parent)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # not the parent's way of stopping its children
    with log.open("ab") as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    one_thread()
    no_bars_in_logs()
    show_logs()
    work()


def follow(parent: int) -> None:
    """Called in a child: Linux is to end it with SIGTERM when its parent ends."""
    if PRCTL is None:
        return
    PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended just before
        os._exit(1)


def one_thread() -> None:
    """Torch's own threads wait for one another wherever a core is shared; processes use the cores instead."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


def ranks(count: int, work: Callable[[], object]) -> None:
    """`work()` in `count` processes on this machine's CPU, as the ranks of one launch; forks of this process.

    Raises ChildProcessError where one of them fails; the others are ended then.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    running = [FORK.Process(target=_rank, args=(i, work, shared, os.getpid())) for i in range(count)]
    for process in running:
        process.start()
    if bad := first_failure(running):
        raise ChildProcessError(f"one of {count} ranks ended with exit code {bad}")


def first_failure(running: Sequence[BaseProcess]) -> int | None:
    """The first exit code that is not 0, once all have ended; with it the others are ended. None where all are 0."""
    bad = None
    while alive := [process for process in running if process.exitcode is None]:
        # looked for before each wait: a process is seen to end a moment before its exit code is there
        if bad is None and (bad := _bad(running)) is not None:
            for process in running:
                process.terminate()
        multiprocessing.connection.wait([process.sentinel for process in alive])
    return _bad(running) if bad is None else bad


def _bad(running: Sequence[BaseProcess]) -> int | None:
    return next((process.exitcode for process in running if process.exitcode), None)


def _rank(index: int, work: Callable[[], object], shared: Mapping[str, str], parent: int) -> None:
    follow(parent)
    os.environ.update(shared, RANK=str(index), LOCAL_RANK=str(index))
    work()

"""Running the server: it stops taking requests on SIGTERM or Ctrl-C, answers those it took, and exits with 0."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from guard.server.settings import ServeError, ServeSettings


class _Quiet(uvicorn.Server):
    """Ends without raising the signal again, which would make an orderly end look like a kill."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        gate = self.config.app.state.server.gate  # type: ignore[union-attr]
        if gate is not None:
            gate.stopping = True
        self.should_exit = True


def serve(app: Any, settings: ServeSettings, said: Callable[[str], None] = print) -> None:
    """Serves until it is told to stop. Raises ServeError where the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise ServeError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; give another --port"
        ) from None
    address = f"http://{settings.host}:{listener.getsockname()[1]}"
    said(f"{address} listens; ready when {address}/readyz says so. Try it in a browser, or at {address}/v1/moderations")
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=30, backlog=4096)
    asyncio.run(_Quiet(config).serve(sockets=[listener]))

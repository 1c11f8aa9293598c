"""A server over the fake guard, started once a module."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from guard.server.app import application
from guard.server.settings import ServeSettings
from tests.guard.server.fakes import MakeMarks, Model

Serve = Callable[..., TestClient]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """serve(settings, model=None, make=..., keys=[]) -> a client of a server that is ready."""
    with ExitStack() as stack:

        def start(
            settings: dict[str, Any] | None = None, model: Model | None = None, make: Any = None, keys: Any = ()
        ) -> TestClient:
            changes = dict(settings or {})
            if model is not None:
                changes["upstream__url"] = "http://model/v1"
            app = application(
                "nowhere",
                ServeSettings.load(None, **changes),
                keys=list(keys),
                make=make or MakeMarks(),
                transport=None if model is None else model.transport(),
            )
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            deadline = time.monotonic() + 60
            while app.state.server.not_ready() is not None:
                assert time.monotonic() < deadline, app.state.server.not_ready()
                time.sleep(0.02)
            return client

        yield start

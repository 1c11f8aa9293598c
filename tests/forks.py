"""Processes that have imported everything already: each is a fork of one server."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver

import pytest

CONTEXT = multiprocessing.get_context("forkserver")


def serve(module: str) -> None:
    """Start the server with a test module imported, unless it runs. It takes its path from the environment."""
    CONTEXT.set_forkserver_preload(["shifted_forks", module])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
        forkserver.ensure_running()

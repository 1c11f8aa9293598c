"""POST /beta/litellm_basic_guardrail_api: LiteLLM's generic guardrail."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.guard.server.conftest import Serve
from tests.guard.server.fakes import GREEN, RED, png, text, url


@pytest.fixture(scope="module")
def client(serve: Serve) -> TestClient:
    return serve()


@pytest.mark.parametrize(
    ("body", "blocked"),
    [
        ({"texts": ["fine"]}, False),
        ({"texts": ["fine", "BAD"]}, True),
        ({"images": [url(png(RED))]}, True),
        ({"texts": ["look"], "images": [url(png(GREEN)), url(png(RED))]}, True),
        ({"structured_messages": [{"role": "user", "content": [text("BAD")]}]}, True),
        ({"structured_messages": [{"role": "user", "content": "BAD"}, {"role": "user", "content": "go on"}]}, True),
        ({"texts": ["fine"], "tool_calls": [{"function": {"name": "f", "arguments": "BAD"}}]}, True),
        ({"texts": ["kind words"], "input_type": "response"}, False),
        ({"texts": ["BAD"], "input_type": "response"}, True),
        ({"texts": ["BAD"], "input_type": "response", "structured_messages": [{"role": "user", "content": "x"}]}, True),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "BAD"}}], "input_type": "response"}, True),
        ({}, False),
        ({"texts": [], "images": None, "request_data": {"user_api_key_alias": "x"}}, False),
    ],
)
def test_all_that_is_handed_over_is_judged(client: TestClient, body: Any, blocked: bool) -> None:
    answer = client.post("/beta/litellm_basic_guardrail_api", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["action"] == ("BLOCKED" if blocked else "NONE")
    assert ("animal abuse" in answer.json().get("blocked_reason", "")) is blocked


def test_a_picture_that_cannot_be_read_is_an_error_not_a_pass(client: TestClient) -> None:
    answer = client.post("/beta/litellm_basic_guardrail_api", json={"images": ["https://example.org/a.png"]})
    assert answer.status_code == 400

"""Keys, rates, sizes and forms: what a request must pass before a route sees it."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from guard.server.gate import Rates, depth_of
from tests.guard.server.conftest import Serve
from tests.guard.server.fakes import Model

ROUTES = ["/", "/readyz", "/metrics", "/version", "/v1/models", "/openapi.json", "/docs", "/nowhere"]


@pytest.fixture(scope="module")
def locked(serve: Serve) -> TestClient:
    return serve(keys=["first", "second"], model=Model(["fine"]))


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer third", "Bearer first2", "Basic first", "first"])
def test_no_route_but_health_without_a_key(locked: TestClient, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key}
    assert locked.get("/healthz", headers=headers).status_code == 200
    for route in ROUTES:
        assert locked.get(route, headers=headers).status_code == 401, route
    for route in ("/v1/moderations", "/v1/chat/completions", "/beta/litellm_basic_guardrail_api"):
        assert locked.post(route, headers=headers, json={"input": "x"}).status_code == 401, route


@pytest.mark.parametrize("key", ["first", "second"])
def test_each_key_opens(locked: TestClient, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    assert locked.post("/v1/moderations", headers=headers, json={"input": "x"}).status_code == 200
    assert locked.get("/version", headers=headers).status_code == 200


def test_keys_come_from_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.server.gate import KEYS, Gate
    from guard.server.metrics import Metrics
    from guard.server.settings import ServeSettings

    monkeypatch.setenv(KEYS, " one, two ,,")
    assert Gate(None, ServeSettings(), Metrics()).keys == [b"one", b"two"]


def test_too_many_requests_wait(serve: Serve) -> None:
    client = serve({"requests_per_minute": 3}, keys=["a", "b"])
    while client.get("/healthz").status_code != 200:
        pass
    found = [client.get("/version", headers={"authorization": "Bearer a"}) for _ in range(5)]
    assert [answer.status_code for answer in found] == [200, 200, 200, 429, 429]
    assert 1 <= int(found[-1].headers["retry-after"]) <= 21
    assert client.get("/version", headers={"authorization": "Bearer b"}).status_code == 200


def test_a_bucket_fills_again_and_the_table_of_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("guard.server.gate.time.monotonic", lambda: now[0])
    rates = Rates(60, most_keys=5)
    assert [rates.wait("a") for _ in range(60)] == [0.0] * 60
    assert rates.wait("a") == pytest.approx(1.0)
    now[0] = 1.0
    assert rates.wait("a") == 0.0
    for i in range(100):
        rates.wait(str(i))
    assert len(rates._buckets) == 5


@pytest.mark.parametrize(
    ("content", "headers", "status", "said"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"\xff\xfe", {}, 400, "not UTF-8 (byte 0)"),
        (b"[]", {}, 400, "not a JSON object"),
        (b'{"input": NaN}', {}, 400, "NaN is no JSON number"),
        (b'{"input": "x"}', {"content-type": "text/plain"}, 415, "application/json"),
        (b'{"input": ' + b"[" * 30 + b"]" * 30 + b"}", {}, 400, "nested deeper than 20"),
        (b'{"input": ' + b"[" * 100_000, {}, 400, "nested deeper than 20"),
        (b'{"input": "' + b"x" * 2**20 + b'"}', {}, 413, "the body has more than"),
        (b'{"input": "\\ud800"}', {}, 400, "half a character"),
    ],
)
def test_a_body_that_is_none(serve: Serve, content: bytes, headers: Any, status: int, said: str) -> None:
    client = _small(serve)
    answer = client.post("/v1/moderations", content=content, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


_clients: dict[int, TestClient] = {}


def _small(serve: Serve) -> TestClient:
    if id(serve) not in _clients:
        _clients[id(serve)] = serve({"max_body_mb": 0.5})
    return _clients[id(serve)]


def test_a_length_that_lies_is_counted_all_the_same(serve: Serve) -> None:
    def pieces() -> Any:
        yield b'{"input": "'
        for _ in range(20):
            yield b"x" * 2**16

    answer = _small(serve).post("/v1/moderations", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_brackets_in_texts_are_no_nesting() -> None:
    assert depth_of('{"a": "[[[[\\"[[", "b": [[1]]}', 20) == 3
    assert depth_of("[" * 50, 20) == 21


def test_a_full_queue_asks_to_come_again(serve: Serve) -> None:
    client = serve({"max_queue": 1, "batch_wait_ms": 300, "max_batch_size": 8})
    answer = client.post("/v1/moderations", json={"input": ["a", "b", "c"]})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_nothing_new_once_it_stops(serve: Serve) -> None:
    client = serve()
    client.app.state.server.gate.stopping = True
    answer = client.post("/v1/moderations", json={"input": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert client.get("/healthz").status_code == 200
    client.app.state.server.gate.stopping = False


def test_paths_that_nobody_serves_share_one_series(serve: Serve) -> None:
    client = serve()
    for i in range(20):
        client.get(f"/probe/{i}")
    text = client.get("/metrics").text
    assert 'requests_total{route="other",status="404"} 20.0' in text
    assert "probe" not in text

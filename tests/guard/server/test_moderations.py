"""POST /v1/moderations: OpenAI's shape, every input looked at, every fault named."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from beavertails_v.taxonomy import Taxonomy
from guard.server.settings import ServeSettings
from tests.guard.server.conftest import Serve
from tests.guard.server.fakes import CATEGORIES, GREEN, RED, MakeMarks, image, png, text, url

STANDARD = {
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic",
}  # fmt: skip


@pytest.fixture(scope="module")
def client(serve: Serve) -> TestClient:
    return serve({"max_text_chars": 5000, "max_pictures": 4, "max_items": 10})


def judge(client: TestClient, given: Any, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/moderations", json={"input": given, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("given", "flagged", "read"),
    [
        ("fine", [False], [["text"]]),
        ("BAD", [True], [["text"]]),
        (["fine", "BAD", "fine"], [False, True, False], [["text"]] * 3),
        ([image(RED)], [True], [["image"]]),
        ([image(GREEN)], [False], [["image"]]),
        ([text("fine"), image(RED)], [True], [["text", "image"]]),
        ([text("BAD"), image(GREEN)], [True], [["text", "image"]]),
        ([text("fine"), image(GREEN), image(RED)], [True], [["text", "image"]]),
        ([image(GREEN), text("fine"), text("BAD")], [True], [["text", "image"]]),
    ],
)
def test_whatever_is_harmful_alone_is_flagged(client: TestClient, given: Any, flagged: Any, read: Any) -> None:
    results = judge(client, given)["results"]
    assert [r["flagged"] for r in results] == flagged
    for one, types in zip(results, read, strict=True):
        assert set(one["categories"]) == set(one["category_scores"]) == STANDARD | set(CATEGORIES)
        assert all(seen == types for seen in one["category_applied_input_types"].values())


def test_a_standard_key_is_raised_by_the_categories_that_can_hold_it(client: TestClient) -> None:
    one = judge(client, "BAD")["results"][0]
    raised = {key for key, value in one["categories"].items() if value}
    holds = {key for key, names in Taxonomy.load().standard.items() if "animal_abuse" in names}
    assert raised == {"animal_abuse"} | holds
    assert all(one["category_scores"][key] == 0.8 for key in raised)


def test_reasons_only_when_asked_for(client: TestClient) -> None:
    assert "reason" not in judge(client, "BAD")["results"][0]
    assert judge(client, "BAD", reasons=True)["results"][0]["reason"] == "unsafe 0.9 >= 0.5"


def test_an_answer_is_judged_where_one_is_given(client: TestClient) -> None:
    one = judge(client, [text("fine"), image(RED)], response="kind words")["results"][0]
    assert (one["kind"], one["flagged"]) == ("response", False)
    assert judge(client, "fine", response="BAD")["results"][0]["flagged"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"input": 4}, 400, "input is a string"),
        ({"input": []}, 400, "input is a string"),
        ({}, 400, "input"),
        ({"input": [{"text": "x"}]}, 400, "input[0] is not a part with a type"),
        ({"input": [{"type": "input_audio", "data": "x"}]}, 400, "input_audio"),
        ({"input": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}, 400, "not fetched"),
        ({"input": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}, 400, "is no picture"),
        ({"input": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}, 400, "is no picture"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}]}, 400, "valid base64"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,AAAA"}}]}, 400, "no picture"),
        ({"input": [{"type": "image_url", "image_url": {"url": url(b"not a picture")}}]}, 400, "not a picture"),
        ({"input": [{"type": "image_url", "image_url": {"url": url(png(size=(64, 64))[:-30])}}]}, 400, "damaged"),
        ({"input": [image(), image(), image(), image(), image()]}, 400, "more than 4 pictures"),
        ({"input": ["x"] * 11}, 400, "more than 10"),
        ({"input": "x" * 5001}, 413, "5,001 characters"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", "b"], "response": "c"}, 400, "response goes with one input"),
        ({"input": "x", "response": 4}, 400, "response"),
    ],
)
def test_a_malformed_request_is_told_why(client: TestClient, body: Any, status: int, said: str) -> None:
    answer = client.post("/v1/moderations", json=body)
    assert answer.status_code == status, answer.text
    fault = answer.json()["error"]
    assert said in fault["message"]
    assert fault["type"] == "invalid_request_error"


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(serve: Serve) -> None:
    client = serve({"picture__max_megapixels": 0.001})
    answer = client.post("/v1/moderations", json={"input": [image(GREEN)]})
    assert answer.status_code == 200
    large = [{"type": "image_url", "image_url": {"url": url(png(size=(100, 100)))}}]
    assert "10,000 pixels" in client.post("/v1/moderations", json={"input": large}).json()["error"]["message"]


def test_what_the_guard_cannot_read_whole_fails_closed(serve: Serve) -> None:
    client = serve(make=MakeMarks(longest=20))
    one = judge(client, "x" * 30)["results"][0]
    assert (one["flagged"], one["truncated"], one["degraded"], one["action"]) == (True, True, True, "refuse")
    assert all(one["categories"].values())
    assert set(map(tuple, one["category_applied_input_types"].values())) == {()}
    assert one["reason"] == "too long"


def test_one_items_fault_of_memory_is_its_own(client: TestClient) -> None:
    results = judge(client, ["fine", "SPILL", "BAD"])["results"]
    assert [r["degraded"] for r in results] == [False, True, False]
    assert [r["flagged"] for r in results] == [False, True, True]


def test_a_worker_that_dies_takes_one_item_with_it(client: TestClient) -> None:
    results = judge(client, ["a new one", "DIE", "BAD and new"])["results"]
    assert [r["degraded"] for r in results] == [False, True, False]
    assert results[1]["action"] == "refuse"
    assert client.get("/readyz").status_code == 200


def test_fails_open_only_where_told_to_and_says_so(serve: Serve) -> None:
    client = serve({"fail_open": True})
    answer = client.post("/v1/moderations", json={"input": ["fine", "SPILL"]})
    assert [r["failed_open"] for r in answer.json()["results"]] == [False, True]
    assert [r["flagged"] for r in answer.json()["results"]] == [False, False]
    assert answer.headers["x-guard-failed-open"] == "1"
    assert "safe_rlhf_v_guard_failed_open_total 1.0" in client.get("/metrics").text


def test_a_verdict_in_time_or_a_closed_one(serve: Serve) -> None:
    client = serve({"timeout_s": 1.0})
    one = judge(client, "HANG")["results"][0]
    assert (one["degraded"], one["action"]) == (True, "refuse")


def test_the_defaults_are_those_of_a_machine_of_ones_own() -> None:
    settings = ServeSettings()
    assert (settings.host, settings.fail_open, settings.log_content) == ("127.0.0.1", False, None)
    assert settings.remote_pictures.allow == ()

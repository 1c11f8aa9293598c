"""POST /v1/chat/completions: every turn, every choice, every stream goes through the guard."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from tests.guard.server.conftest import Serve
from tests.guard.server.fakes import GREEN, RED, MakeMarks, Model, completion, image, text


def ask(client: TestClient, messages: Any = "hello", **more: Any) -> dict[str, Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    answer = client.post("/v1/chat/completions", json={"model": "m", "messages": messages, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks(client: TestClient, messages: Any = "hello", **more: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {"model": "m", "messages": messages, "stream": True, **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed(found: list[dict[str, Any]], index: int = 0) -> tuple[str, str | None]:
    """The text of a choice, and why it ended."""
    mine = [c for chunk in found for c in chunk["choices"] if c["index"] == index]
    reasons = [c["finish_reason"] for c in mine if c["finish_reason"]]
    return "".join(c["delta"].get("content") or "" for c in mine), reasons[-1] if reasons else None


def test_a_clean_answer_comes_as_it_is(serve: Serve) -> None:
    model = Model(["kind words"])
    body = ask(serve(model=model), temperature=0.2, top_k=5)
    assert body["choices"][0]["message"]["content"] == "kind words"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["guard"]["rounds"] == 0
    assert [v["flagged"] for v in body["guard"]["verdicts"]] == [False]
    assert model.asked[0]["top_k"] == 5
    assert "guard" not in model.asked[0]


HARM = {
    "text": [{"role": "user", "content": "BAD"}],
    "picture": [{"role": "user", "content": [text("look"), image(RED)]}],
    "second picture": [{"role": "user", "content": [text("look"), image(GREEN), image(RED)]}],
    "earlier turn": [
        {"role": "user", "content": "BAD"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "go on"},
    ],
    "earlier picture": [
        {"role": "user", "content": [image(RED)]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "go on"},
    ],
    "system": [{"role": "system", "content": "BAD"}, {"role": "user", "content": "go on"}],
    "developer": [{"role": "developer", "content": "BAD"}, {"role": "user", "content": "go on"}],
    "tool": [{"role": "user", "content": "go on"}, {"role": "tool", "tool_call_id": "1", "content": "BAD"}],
    "assistant": [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "BAD"}],
    "call": [
        {"role": "user", "content": "go on"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "BAD"}}]},
    ],
    "name": [{"role": "user", "name": "very_BAD", "content": "go on"}],
}


@pytest.fixture(scope="module")
def kind(serve: Serve) -> TestClient:
    return serve(model=Model(["kind words"]))


@pytest.mark.parametrize("where", HARM)
@pytest.mark.parametrize("stream", [None, "buffer", "sentence", "end"])
def test_harm_anywhere_in_the_conversation_is_refused(kind: TestClient, where: str, stream: str | None) -> None:
    if stream is None:
        body = ask(kind, HARM[where])
        assert body["choices"][0]["finish_reason"] == "content_filter"
        assert body["choices"][0]["message"]["content"] == "No."
        assert body["guard"]["query"]["flagged"]
    else:
        assert streamed(chunks(kind, HARM[where], guard={"stream": stream})) == ("No.", "content_filter")


def test_split_over_turns_the_whole_is_judged(serve: Serve) -> None:
    client = serve(make=MakeMarks(longest=14), model=Model(["fine"]))
    turns = [{"role": "user", "content": f"part {i}"} for i in range(7)]
    assert ask(client, turns)["choices"][0]["finish_reason"] == "stop"
    turns[3]["content"] = "BAD"
    assert ask(client, turns)["choices"][0]["finish_reason"] == "content_filter"
    turns[3]["content"] = "x" * 15  # longer than the guard reads: not judged, so not let pass
    assert ask(client, turns)["choices"][0]["finish_reason"] == "content_filter"


def test_flagged_answers_are_made_again(serve: Serve) -> None:
    model = Model(["BAD", "BAD", "kind words"])
    body = ask(serve(model=model), temperature=0, seed=1, guard={"attempts": True})
    assert body["choices"][0]["message"]["content"] == "kind words"
    assert body["guard"]["rounds"] == 2
    assert [v["flagged"] for v in body["guard"]["verdicts"]] == [True, True, False]
    assert [asked["temperature"] for asked in model.asked] == [0, 0.7, 0.7]
    assert ["seed" in asked for asked in model.asked] == [True, False, False]
    assert body["usage"]["completion_tokens"] == 6


def test_after_the_last_round_comes_the_refusal(serve: Serve) -> None:
    model = Model(["BAD"])
    client = serve(model=model)
    body = ask(client)
    assert (len(model.asked), body["guard"]["rounds"]) == (6, 5)
    assert body["guard"]["choices"][0]["outcome"] == "gave_up"
    assert body["choices"][0]["message"]["content"] == "No."
    assert ask(client, guard={"rounds": 1})["guard"]["rounds"] == 1
    assert ask(client, guard={"rounds": 20})["guard"]["rounds"] == 5


def test_what_a_rule_refuses_outright_is_not_tried_again(serve: Serve) -> None:
    model = Model(["WORSE"])
    body = ask(serve(model=model))
    assert (len(model.asked), body["guard"]["choices"][0]["outcome"]) == (1, "response_refused")


def test_every_choice_is_judged_and_only_flagged_ones_are_made_again(serve: Serve) -> None:
    model = Model([completion("one", "BAD", "three"), completion("two")])
    body = ask(serve(model=model), n=3)
    assert [c["message"]["content"] for c in body["choices"]] == ["one", "two", "three"]
    assert model.asked[1]["n"] == 1
    short = Model([completion("one"), completion("two")])  # a model that gives fewer than it was asked for
    assert [c["message"]["content"] for c in ask(serve(model=short), n=2)["choices"]] == ["one", "two"]


def test_a_guided_attempt_is_told_kind_and_severity_and_nothing_else(serve: Serve) -> None:
    model = Model(["BAD", "kind words"])
    ask(serve({"guard__feedback": "guided"}, model=model))
    said = model.asked[1]["messages"][-1]
    assert said["role"] == "system"
    assert "moderate harm in the category animal abuse" in said["content"]
    assert "BAD" not in json.dumps(model.asked[1])


def test_calls_of_tools_are_judged(serve: Serve) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "BAD"}}
    model = Model([completion("", tool_calls=[call]), "kind words"])
    assert ask(serve(model=model))["choices"][0]["message"]["content"] == "kind words"
    for mode in ("buffer", "sentence", "end"):
        client = serve({"guard__rounds": 0}, model=Model([completion("", tool_calls=[call])]))
        found = chunks(client, guard={"stream": mode})
        assert streamed(found) == ("No.", "content_filter"), mode
        assert not any("tool_calls" in c["delta"] for chunk in found for c in chunk["choices"])


def test_a_deadline_and_a_budget_end_in_the_refusal(serve: Serve) -> None:
    def slow(body: Any) -> str:
        time.sleep(0.02)
        return "BAD"

    body = ask(serve(model=Model([slow])), guard={"deadline_s": 0.01})
    assert body["guard"]["choices"][0]["outcome"] == "deadline"
    assert body["choices"][0]["finish_reason"] == "content_filter"
    model = Model(["BAD"])
    body = ask(serve({"guard__max_total_tokens": 3}, model=model))
    assert (len(model.asked), body["guard"]["choices"][0]["outcome"]) == (2, "token_budget")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (httpx.Response(500, text="oops"), 502),
        (httpx.Response(429, text="slow down"), 503),
        (httpx.Response(400, text="no such parameter"), 400),
        (httpx.Response(200, json={"choices": []}), 502),
        (httpx.Response(200, text="<html>"), 502),
    ],
)
def test_a_model_that_does_not_answer_is_said(serve: Serve, answer: httpx.Response, status: int) -> None:
    client = serve(model=Model([answer]))
    found = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert found.status_code == status
    assert "the model behind the guard" in found.json()["error"]["message"]


def test_a_clean_stream_comes_whole_in_every_mode(serve: Serve) -> None:
    words = "First a sentence. Then another one! And the end"
    for mode in ("buffer", "sentence", "end"):
        found = chunks(serve(model=Model([words])), guard={"stream": mode}, stream_options={"include_usage": True})
        assert streamed(found) == (words, "stop"), mode
        assert found[-1]["usage"]["completion_tokens"] == 2
        assert found[-1]["guard"]["choices"][0]["outcome"] == "answered"


def test_a_stream_of_sentences_ends_at_the_first_flagged_one(serve: Serve) -> None:
    client = serve(model=Model(["First a sentence. Then BAD words. And the end."]))
    assert streamed(chunks(client, guard={"stream": "sentence"})) == ("First a sentence. ", "content_filter")
    assert streamed(chunks(client, guard={"stream": "end"})) == ("No.", "content_filter")


def test_a_buffered_stream_is_made_again(serve: Serve) -> None:
    found = chunks(serve(model=Model(["Some BAD words.", "kind words"])), guard={"stream": "buffer"})
    assert streamed(found) == ("kind words", "stop")


def test_every_choice_of_a_stream_is_judged(serve: Serve) -> None:
    found = chunks(serve(model=Model([completion("One. Two.", "One. BAD. Two.")])), n=2, guard={"stream": "sentence"})
    assert streamed(found, 0) == ("One. Two.", "stop")
    assert streamed(found, 1) == ("One. ", "content_filter")


def test_a_guard_of_answers_alone_judges_answers(serve: Serve) -> None:
    client = serve(make=MakeMarks(kinds=("response",)), model=Model(["kind words"]))
    body = ask(client, "BAD")
    assert (body["guard"]["query"], body["choices"][0]["finish_reason"]) == (None, "stop")
    assert "was not trained to judge a query" in client.post("/v1/moderations", json={"input": "x"}).text


def test_attempts_are_logged_only_where_asked_for(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("log") / "attempts.jsonl"
    ask(serve({"log_content": str(file)}, model=Model(["BAD", "kind words"])), "a question")
    row = json.loads(file.read_text())
    assert row["turns"][0]["text"] == "a question"
    assert [a["text"] for a in row["choices"][0]["attempts"]] == ["BAD", "kind words"]


def test_unknown_options_of_the_guard_are_refused(kind: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "guard": {"round": 3}}
    answer = kind.post("/v1/chat/completions", json=body)
    assert (answer.status_code, "guard.round" in answer.text) == (400, True)

from __future__ import annotations

from typing import Any

import pytest

from beavertails_v import Comparison, Picture, Prompt, Response, SchemaError, Severity


def pair(first: dict[str, Any], second: dict[str, Any], more_helpful: int = 0, safer: int = 0) -> Comparison:
    responses = (Response(text="a", **first), Response(text="b", **second))
    return Comparison(prompt=Prompt(text="q"), responses=responses, more_helpful=more_helpful, safer=safer)


@pytest.mark.parametrize(("rate", "severity"), [(-3, 3), (-2, 2), (-1, 1), (0, 0), (1, 0), (2, 0), (3, 0)])
def test_severity_follows_the_harmless_rate(rate: int, severity: int) -> None:
    assert Severity.from_harmless_rate(rate) == severity
    assert Response(text="a", safe=rate >= 0, harmless_rate=rate).severity == severity


def test_severity_without_a_rate() -> None:
    assert Response(text="a", safe=True).severity is Severity.NONE
    assert Response(text="a", safe=False).severity is None


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"safe": True, "harmless_rate": 4}, "harmless_rate"),
        ({"safe": False, "harmless_rate": -4}, "harmless_rate"),
        ({"safe": True, "helpful_rate": 4}, "helpful_rate"),
        ({"safe": True, "helpful_rate": -1}, "helpful_rate"),
        ({"safe": True, "harmless_rate": -1}, "safe"),
        ({"safe": False, "harmless_rate": 0}, "safe"),
    ],
)
def test_a_response_outside_the_scales_is_refused(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(SchemaError, match=f"'{names}'"):
        Response(text="a", **fields)


def test_a_preference_is_one_of_two() -> None:
    with pytest.raises(SchemaError, match="'safer'"):
        pair({"safe": True}, {"safe": True}, safer=2)


def test_contradictions() -> None:
    assert pair({"safe": False}, {"safe": True}, safer=0).contradiction
    assert pair({"safe": True, "harmless_rate": 1}, {"safe": True, "harmless_rate": 2}, safer=0).contradiction
    assert not pair({"safe": True, "harmless_rate": 1}, {"safe": True, "harmless_rate": 1}, safer=0).contradiction
    assert not pair({"safe": True, "harmless_rate": 1}, {"safe": False, "harmless_rate": -1}, safer=0).contradiction
    assert pair({"safe": True, "harmless_rate": 1}, {"safe": True, "harmless_rate": 1}).tied_safety
    assert not pair({"safe": True}, {"safe": True}).tied_safety


def test_prompt_id_is_of_text_and_pictures_only() -> None:
    a, b = Picture.from_bytes(b"a"), Picture.from_bytes(b"b")
    prompt = Prompt(text="q", images=(a,), category="animal_abuse", meta={"x": 1})
    assert prompt.id == Prompt(text="q", images=(Picture.from_bytes(b"a"),)).id
    assert (
        len({prompt.id, Prompt(text="q", images=(b,)).id, Prompt(text="q").id, Prompt(text="r", images=(a,)).id}) == 4
    )
    assert Prompt(text="q", images=(a, b)).id != Prompt(text="q", images=(b, a)).id
    with pytest.raises(SchemaError, match="empty"):
        Prompt(text=" \n")

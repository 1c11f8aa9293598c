"""The loop of the guard in a report: nothing of it ends an evaluation that has its answers."""

from types import SimpleNamespace
from typing import Any

import pytest

from beavertails_v import Prompt
from safe_rlhf_v.stages.evaluate import _rounds


@pytest.mark.parametrize(
    ("harmful", "kinds"), [(False, ("query", "response")), (None, ("query", "response")), (True, ("query",))]
)
def test_without_harmful_prompts_or_a_guard_of_responses_there_are_no_rounds(
    harmful: bool | None, kinds: tuple[str, ...]
) -> None:
    guard: Any = SimpleNamespace(can_judge=lambda kind: kind in kinds)
    base: Any = SimpleNamespace(sampling=SimpleNamespace(temperature=1.0))
    benchmark: Any = SimpleNamespace(prompts=[Prompt(text="what is this ?")], invites_harm=lambda prompt: harmful)
    assert _rounds(guard, base, benchmark, 5, 0) == []

"""Disguises keep what people see and read, and are equal for an equal seed."""

import numpy as np
import pytest

from beavertails_v.schema import Prompt
from guard.classifier import Guard
from guard.evaluate import evaluate
from guard.perturbations import PERTURBATIONS, Perturbation
from guard.text import normalise, readings
from tests.guard.conftest import rows
from tests.tiny_models import picture

NAMED = {p.name: p for p in PERTURBATIONS}
PROMPT = Prompt(text="how do I use the key?", images=(picture(40, 32),))


@pytest.mark.parametrize("change", PERTURBATIONS, ids=lambda p: p.name)
def test_seeded_and_never_nothing(change: Perturbation) -> None:
    assert change(PROMPT) == change(PROMPT) != PROMPT
    for image in change(PROMPT).images:
        image.check()


def test_the_alpha_layers_look_the_same() -> None:
    before, after = (np.asarray(p.images[0].load(), int) for p in (PROMPT, NAMED["alpha_layers"](PROMPT)))
    assert abs(before - after).max() <= 2


@pytest.mark.parametrize("name", ["homoglyphs", "zero_width", "bidi", "tag_characters"])
def test_the_guards_readings_undo_a_disguise_of_text(name: str) -> None:
    changed = NAMED[name](PROMPT)
    assert PROMPT.text in readings(changed.text) and changed.images == PROMPT.images


def test_the_question_moves_into_the_picture() -> None:
    typed = NAMED["typed"](PROMPT)
    assert typed.text != PROMPT.text and typed.images[0].load().height > 32


@pytest.mark.parametrize(
    "text", ["می\u200cخواهم کتاب\u200cها را", "👨\u200d👩\u200d👧 hi 🏳️\u200d🌈", "Über café naïve señor"]
)
def test_legal_forms_are_no_disguise(text: str) -> None:
    assert normalise(text).replace("\ufe0f", "") == text.replace("\ufe0f", "")


def test_evaluation_under_each(guard: Guard) -> None:
    found = evaluate(guard, rows()[:8], blind=False, perturbations=True, samples=100)["perturbations"]
    assert set(found["query"]) == set(found["response"]) == set(NAMED) - {"blur"}  # a plain colour stays what it is
    row = found["query"]["grey"]
    assert row["n"] == 4 and 0 <= row["flips"]["value"] <= 1

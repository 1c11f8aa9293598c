import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beavertails_v import Picture, Prompt, SchemaError, Severity
from beavertails_v.dialogues import Dialogue, DialogueError, Turn, load_dialogues, write_dialogues


def dialogue(colour: str = "red", **more: Any) -> Dialogue:
    prompt = Prompt(
        text="what is this ?",
        images=(Picture.from_pil(Image.new("RGB", (8, 8), colour)),),
        category="animal_abuse",
        severity=Severity.MINOR,
        meta={"origin": "drawn"},
    )
    turns = (
        Turn(answer="a hat", score=2, feedback="it is not a hat", withheld="it is a cup", thought="i guess"),
        Turn(answer="a cup", score=10),
    )
    return Dialogue(prompt=prompt, truth="a cup", turns=turns, **more)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    given = [dialogue(), dialogue("blue", source="free/guided"), dialogue()]
    file = write_dialogues(given, tmp_path)
    found, report = load_dialogues(tmp_path)
    assert found == given
    assert (report.kept, report.dropped) == (3, [])
    assert found[0].scores == (2, 10)
    assert len(list((tmp_path / "pictures").iterdir())) == 2  # the shared picture once
    assert load_dialogues(file)[0] == given


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"turns": []}, "field 'turns': a dialogue has at least one turn"),
        ({"turns": [{"answer": "a", "score": 11}]}, "turn 1: field 'score': 11 is not a whole number in 0..10"),
        ({"turns": [{"answer": "a", "score": True}]}, "field 'score': True"),
        ({"turns": [{"answer": "a", "score": 1}, {"answer": 3, "score": 1}]}, "turn 2: field 'answer': 3 is not text"),
        ({"turns": [{"answer": "a"}]}, "turn 1 needs 'answer' and 'score'"),
        ({"turns": [{"answer": "a", "score": 1, "mark": 1}]}, "turn 1 needs 'answer' and 'score'"),
        ({"truth": " "}, "field 'truth': the true answer is missing"),
        ({"truth": None}, "field 'truth': None is not text"),
        ({"question": ""}, "field 'text': the question is empty"),
        ({"severity": 4}, "field 'severity': 4 is not in 0..3"),
        ({"meta": 1}, "field 'meta': 1 is not an object"),
        ({"scores": 1}, "field 'scores' is not one of"),
        ({"images": ["pictures/none.png"]}, "image 'pictures/none.png' is not a file below"),
        ({"images": ["../secret.png"]}, "lies outside"),
    ],
)
def test_a_faulty_row_is_dropped_and_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = write_dialogues([dialogue(), dialogue()], tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= change
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, report = load_dialogues(tmp_path)
    assert found == [dialogue()]
    assert [(d.file, d.row) for d in report.dropped] == [(str(file), 2)]
    assert words in report.dropped[0].detail


def test_lines_that_are_no_rows_and_damaged_pictures(tmp_path: Path) -> None:
    file = write_dialogues([dialogue(), dialogue("blue")], tmp_path)
    Path(tmp_path, json.loads(file.read_text().splitlines()[1])["images"][0]).write_bytes(b"damaged")
    file.write_text(file.read_text() + "{\n\n[]\n")
    found, report = load_dialogues(tmp_path)
    assert len(found) == 1
    assert [(d.row, d.reason) for d in report.dropped] == [
        (2, "undecodable"),
        (3, "invalid"),
        (5, "invalid"),  # a blank line is no row
    ]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DialogueError, match=r"no such file; make dialogues with `safe-rlhf-v refine dialogues`"):
        load_dialogues(tmp_path)
    (tmp_path / "dialogues.jsonl").write_text("{}\n")
    with pytest.raises(DialogueError, match=r"(?s)no dialogue is left: .* field .question."):
        load_dialogues(tmp_path)


def test_a_turn_is_checked_when_it_is_made() -> None:
    with pytest.raises(SchemaError, match="field 'score': 2.5"):
        Turn(answer="a", score=2.5)  # type: ignore[arg-type]
    assert Turn(answer="a", score=0).score == 0  # could not be read

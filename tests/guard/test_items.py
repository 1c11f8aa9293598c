"""What users hand in: faults are one item's own and say what to do; text that no token stands for is not judged."""

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from beavertails_v.images import ImageError
from beavertails_v.schema import Prompt, SchemaError
from guard.classifier import Guard
from guard.items import ContentError, ItemError, prompt_of, shortened, text_of
from guard.text import unread
from guard.types import Verdict
from tests.guard.conftest import RED, picture

SENTENCE = "what is this ? tell me about the red box and how it can be used at home in a safe way please now"
WORDS = SENTENCE.split()


def words_alone() -> Any:
    """A tokenizer of WORDS; every other word is the one unknown token."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    "text",
    [
        "wo ist das hier ?",
        "\u0447\u0442\u043e \u044d\u0442\u043e ?",
        "what\u200b is this ?",
        "b" * 2_000_000,
        " ".join(WORDS) + " " + "b" * 41,
        " ".join(WORDS * 3) + " uno dos " + " ".join(WORDS * 3),  # padding does not hide a passage
    ],
)
def test_unknown_text_is_not_read(text: str) -> None:
    assert unread(words_alone(), text)
    assert not unread(words_alone(), " ".join(WORDS))


def test_one_unknown_word_in_twenty_is_borne() -> None:
    assert unread(words_alone(), " ".join(WORDS[:19] + ["blorb"])) == ""
    assert unread(words_alone(), "what is blorb ?") == "1 of its 4 tokens are unknown to the tokenizer (blorb)"
    assert unread(words_alone(), "") == "" and unread(words_alone(), " \n") == ""


def test_a_tokenizer_of_bytes_reads_everything(guard: Guard) -> None:
    for text in ("wo ist das ?", "\u0447\u0442\u043e \u044d\u0442\u043e", "\U0001f600", "b" * 500):
        assert unread(guard.encoder.tokenizer, text) == ""
    assert "no visible character" in unread(guard.encoder.tokenizer, "\u200b\u200d\u2060")


def fails_closed(verdict: Verdict) -> bool:
    return verdict.degraded and verdict.flagged and verdict.action == "refuse" and verdict.unsafe_probability == 1


def test_what_is_not_read_fails_closed_in_query_and_response(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = words_alone()
    monkeypatch.setattr("guard.classifier.unread", lambda tokenizer, text: unread(strange, text))
    query, answer, fine = guard.moderate_batch(
        [picture(RED)] * 3, ["wo ist das ?", "what is this ?", "what is this ?"], [None, "das da", "this is a box"]
    )
    assert fails_closed(query) and query.reason.startswith("the question is not read: 3 of its 4 tokens are unknown")
    assert fails_closed(answer) and answer.reason.startswith("the response is not read: 2 of its 2 tokens")
    assert not fine.degraded and not query.truncated


def test_invisible_text_beside_a_picture_is_the_picture_alone(guard: Guard) -> None:
    bare, invisible = guard.moderate_batch([picture(RED)] * 2, ["", "\u200b\u2060"])
    assert bare == invisible and not bare.degraded
    with pytest.raises(SchemaError):
        prompt_of(None, " ")
    assert fails_closed(guard.moderate(None, "\u200b\u2060"))


FAULTY: list[tuple[Any, Any, Any, str]] = [
    (None, "half \ud83d of one", None, "the text is not UTF-8 text: character 5 is '\\ud83d'"),
    (None, None, None, "the text is None, not a string"),
    (None, 7, None, "the text is of type int"),
    (None, "", None, "the question is empty"),
    (b"no picture", "hi", None, "picture"),
    (3, "hi", None, "image is a int"),
    (None, "hi", "half \udc00", "the response is not UTF-8 text"),
    (None, "hi", 7, "the response is of type int"),
    ("gone.png", "hi", None, "gone.png"),
]


@pytest.mark.parametrize(("image", "text", "reply", "message"), FAULTY)
def test_a_fault_is_one_items_own(guard: Guard, image: Any, text: Any, reply: Any, message: str) -> None:
    want = guard.moderate(picture(RED), "hi")
    items = ([picture(RED), image], ["hi", text], [None, reply])
    fine, closed = guard.moderate_batch(*items, on_error="refuse")
    assert fails_closed(closed) and message in closed.reason
    assert (fine.action, fine.degraded) == (want.action, False)
    assert fine.unsafe_probability == pytest.approx(want.unsafe_probability, abs=1e-5)
    with pytest.raises(ItemError, match="item 1: ") as error:
        guard.moderate_batch(*items)
    assert error.value.index == 1 and message in str(error.value)
    with pytest.raises((ContentError, ImageError, SchemaError)) as alone:
        guard.moderate(image, text, reply)
    assert "item" not in str(alone.value).split(":")[0]


def test_prompts_at_fault_are_named_by_their_place(guard: Guard) -> None:
    prompts = [Prompt(text="hi"), Prompt(text="half \ud83d")]
    with pytest.raises(ItemError, match="item 1: the question is not UTF-8"):
        guard.judge(prompts)
    assert [v.degraded for v in guard.judge(prompts, on_error="refuse")] == [False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "https://example.org/a.png",
            "'https://example.org/a.png' is a web address: nothing is fetched; download it f",
        ),
        (Path("https://example.org/a.png"), "is a web address: nothing is fetched; download it first"),
        ("s3://bucket/a.png", "is a web address"),
        ("data:image/png;base64," + "iVBOR" * 901, "is a data: address that cannot be decoded"),
        ("abcde" * 900, "is base64 text of no picture"),
        ("file:///home/me/a.png", "give the path alone"),
        ("a\0b", "is not a file name"),
    ],
)
def test_what_is_no_file_name_is_said_and_cut(guard: Guard, name: str | Path, message: str) -> None:
    reason = guard.moderate(name, "hi", on_error="refuse").reason
    assert message in reason and len(reason) < 200


def test_a_picture_that_transparency_blanks_is_not_judged_in_silence(guard: Guard, tmp_path: Path) -> None:
    """What people see of it depends on their viewer, and the model would see nothing."""
    unseen = Image.new("RGBA", (32, 32), (250, 250, 250, 0))
    unseen.paste((200, 20, 20, 0), (4, 4, 28, 28))
    unseen.save(tmp_path / "unseen.png")
    forms = [unseen, tmp_path / "unseen.png", (tmp_path / "unseen.png").read_bytes()]
    for verdict in guard.moderate_batch(forms, ["what is it?"] * 3, on_error="refuse"):
        assert fails_closed(verdict) and "blank" in verdict.reason


def test_base64_of_a_picture_is_the_picture(guard: Guard) -> None:
    text = base64.b64encode(picture(RED).encoded()).decode()
    plain, address, file = guard.moderate_batch(
        [text, f"data:image/png;base64,{text}", picture(RED)], ["what is it?"] * 3
    )
    assert plain == address == file and not plain.degraded


def test_paths_are_taken_as_ever(tmp_path: Path) -> None:
    for file in (tmp_path / "a:b.png", tmp_path / ("c" * 100 + ".png")):
        Image.new("RGB", (8, 8)).save(file)
        assert prompt_of(str(file), "hi").images[0].load().size == (8, 8)
    assert shortened("short: " + "x" * 70) == "short: " + "x" * 60 + "\u2026"
    assert text_of("hi", "text") == "hi"

"""Disguised text is read, legal text is left alone, special tokens are broken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.text import Neutraliser, normalise, readings


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("kn\u200bife", "knife"),  # zero-width space
        ("kn\u200dife", "knife"),  # a joiner between Latin letters hides a word
        ("\u202eefink\u202c", "efink"),  # bidi override and its end
        ("k\u00adnife", "knife"),  # soft hyphen
        ("\uff4b\uff4eife", "knife"),  # full width, NFKC
        ("kn\u0456f\u0435", "knife"[:3] + "fe"),  # Cyrillic i and e in a Latin word
        ("a\U000e0062\U000e0063b", "ab"),  # tag characters
        ("a\x00b\x1bc", "abc"),  # control characters
    ],
)
def test_disguises(raw: str, plain: str) -> None:
    assert normalise(raw) == plain
    assert readings(raw)[:2] == [raw, plain]


@pytest.mark.parametrize(
    "text",
    [
        "what is in the picture?\n\tsay it",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family: emoji with joiners
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian with its non-joiner
        "\u0915\u094d\u200d\u0937",  # Devanagari with a joiner
        "\u043c\u043e\u0441\u043a\u0432\u0430",  # a word wholly in Cyrillic
        "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1",
    ],
)
def test_legal_text_stays(text: str) -> None:
    assert normalise(text) == text and readings(text) == [text]


def test_hidden_tags_are_read_out() -> None:
    hidden = "".join(chr(0xE0000 + ord(c)) for c in "use the knife")
    assert readings("hello " + hidden) == ["hello " + hidden, "hello ", "hello use the knife"]


@given(st.text())
def test_normalising_never_fails_and_leaves_no_tags(text: str) -> None:
    assert not any(0xE0000 <= ord(c) <= 0xE007F for c in normalise(text))


NEUTRAL = Neutraliser(["<image>", "</s>", "<|im_start|>", "[INST]", "\n\n", ">"])


@pytest.mark.parametrize(
    ("raw", "harmless"),
    [
        ("look <image> here", "look < image> here"),
        ("<IMAGE>", "< IMAGE>"),
        ("</s><|im_start|>system", "< /s>< |im_start|>system"),
        ("<im<image>age>", "<im< image>age>"),
        ("[INST] a > b\n\nc", "[ INST] a > b\n\nc"),
    ],
)
def test_special_tokens_are_broken(raw: str, harmless: str) -> None:
    assert NEUTRAL(raw) == harmless


@given(st.text(alphabet="<image>/s| ", max_size=40))
def test_no_special_token_survives(text: str) -> None:
    assert not any(token in NEUTRAL(text) for token in NEUTRAL.tokens)


def test_tokens_with_blanks_around_them_end() -> None:
    assert Neutraliser([" <x>", "  <x>"])("a  <x>") == "a  < x>"

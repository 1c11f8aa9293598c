"""What the guard does to text before a model reads it: other readings of disguised text, harmless special tokens, and
whether the model can read it at all.

A text is scored as it came and, where they differ, as it reads once its disguise is off; the worst verdict counts. So
nothing legal is lost by a normalisation that is too eager.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_ZERO_WIDTH = (
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b\u2060-\u2064\u206a-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
)
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_CONTROL = "\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f"
_INVISIBLE = re.compile(f"[{_ZERO_WIDTH}{_BIDI}{_CONTROL}\U000e0000-\U000e007f\U000e0100-\U000e01ef]")
_TAGS = re.compile("[\U000e0020-\U000e007e]")
# Joiners are legal between emoji and in Arabic and Indic scripts; between Latin letters or digits they only hide words.
_IDLE_JOINER = re.compile("(?<=[0-9A-Za-z\u00c0-\u024f])[\u200c\u200d]+(?=[0-9A-Za-z\u00c0-\u024f])")
_WORD = re.compile(r"\w+")
# Cyrillic and Greek letters that are drawn like Latin ones (from Unicode's confusables, the unambiguous part).
_LOOK_ALIKE = str.maketrans(
    "АВЕЅІЈКМНОРСТХУаесорхуіјѕԁԛԝһΑΒΕΖΗΙΚΜΝΟΡΤΥΧαορνιϲ",
    "ABESIJKMHOPCTXYaecopxyijsdqwhABEZHIKMNOPTYXaopvic",
)
# Of any WINDOW tokens at most this share may be unknown, and no unknown token longer than this many characters. [ours]
WINDOW, UNKNOWN_SHARE, LONGEST_UNKNOWN = 20, 0.05, 40


def normalise(text: str) -> str:
    """NFKC; no zero-width, bidi, control or tag characters; words that mix Latin with look-alikes written in Latin.

    Line breaks and tabs stay, and so do joiners (U+200C, U+200D) wherever a script needs them.
    """
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return _WORD.sub(_latin_if_mixed, _IDLE_JOINER.sub("", plain))


def reveal_tags(text: str) -> str:
    """Tag characters (U+E0020..E007E), invisible copies of ASCII, turned into the ASCII that they stand for."""
    return _TAGS.sub(lambda tag: chr(ord(tag.group()) - 0xE0000), text)


def visible(text: str) -> bool:
    """Whether anything of the text is drawn: not blanks, joiners, fillers and other invisible characters alone."""
    hidden = ("Zs", "Zl", "Zp", "Cc", "Cf")
    return any(unicodedata.category(c) not in hidden and c != "\u2800" for c in normalise(text))


def readings(text: str) -> list[str]:
    """Every way to read `text`: as it came, normalised, with hidden tags revealed; distinct, the raw one first."""
    every = [text, normalise(text)]
    if _TAGS.search(text):
        every.append(normalise(reveal_tags(text)))
    return list(dict.fromkeys(every))


def _latin_if_mixed(word: re.Match[str]) -> str:
    text = word.group()
    has_latin = any("a" <= c <= "z" or "A" <= c <= "Z" for c in text)
    return text.translate(_LOOK_ALIKE) if has_latin else text


class Neutraliser:
    """Breaks the special tokens of a tokenizer wherever a user's text spells them.

    "<image>" becomes "< image>": it reads the same and tokenises as plain text, so a text can neither add a picture
    slot nor close its turn. Case does not matter, for tokenizers that lower it first.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        # a token of one visible character cannot be broken, and runs of blanks are layout, not control
        ordered = sorted({t for t in tokens if len(t.strip()) > 1}, key=len, reverse=True)
        self.tokens: Sequence[str] = tuple(ordered)
        self._pattern = re.compile("|".join(map(re.escape, ordered)), re.IGNORECASE) if ordered else None

    def __call__(self, text: str) -> str:
        if self._pattern is None:
            return text
        while True:  # breaking one token may leave another one, overlapping it, whole
            broken = self._pattern.sub(_break, text)
            if broken == text:
                return text
            text = broken


def _break(token: re.Match[str]) -> str:
    """A blank after the first visible character."""
    text = token.group()
    at = len(text) - len(text.lstrip()) + 1
    return f"{text[:at]} {text[at:]}"


def unread(tokenizer: Any, text: str) -> str:
    """Why a model behind `tokenizer` cannot be said to have read `text`; empty where it can.

    Of any 20 tokens in a row (or of all, where there are fewer) at most one in twenty may be the unknown token, so that
    known words around a foreign passage do not hide it, and none may stand for more than 40 characters. Tokenizers that
    fall back to bytes know every text. A text of which nothing is visible, or nothing becomes a token, is not read.
    """
    if not text:
        return ""
    if text.strip() and not visible(text):
        return "it has no visible character"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast))
    ids, unknown_id = encoded["input_ids"], tokenizer.unk_token_id
    if not ids:
        return "the tokenizer makes nothing of it" if text.strip() else ""
    unknown = [i for i, token in enumerate(ids) if token == unknown_id]
    if not unknown:
        return ""
    spans = [encoded["offset_mapping"][i] for i in unknown] if "offset_mapping" in encoded else []
    words = [text[start:end] for start, end in spans]
    if _most_in_a_window(unknown) > UNKNOWN_SHARE * min(WINDOW, len(ids)):
        shown = " ".join(dict.fromkeys(word[:20] for word in words[:6]))
        return f"{len(unknown)} of its {len(ids)} tokens are unknown to the tokenizer ({ascii(shown)[1:-1]})"
    longest = max(map(len, words), default=0)
    return f"a word of {longest} characters is unknown to the tokenizer" if longest > LONGEST_UNKNOWN else ""


def _most_in_a_window(positions: Sequence[int]) -> int:
    """The most of these (sorted) token positions that lie within WINDOW tokens of each other."""
    first = most = 0
    for last, position in enumerate(positions):
        while position - positions[first] >= WINDOW:
            first += 1
        most = max(most, last - first + 1)
    return most

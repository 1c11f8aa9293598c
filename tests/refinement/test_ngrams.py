import math

import pytest

from safe_rlhf_v.refinement.ngrams import bleu, cider, tokens

TEXTS = [
    "this is a red knife on a white background",
    "the cup is for drinking tea",
    "say what it is",
    "i see a bird",
]
REFERENCES = [
    "this is a red knife on a pink background",
    "the cup is for drinking tea hold it well",
    "say what it is for",
    "it is a fish",
]


def test_bleu_by_hand() -> None:
    """4 words against 5. Runs of 1 word: 3 of 4 right (a b d, not x); of 2: a-b of three; of 3 and 4 none.
    Brevity exp(1 - 5/4). BLEU-1 3/4, BLEU-2 sqrt(3/4 * 1/3) = 1/2."""
    found = bleu(["a b x d"], ["a b c d e"])
    short = math.exp(1 - 5 / 4)
    assert found == pytest.approx([0.75 * short, 0.5 * short, 0, 0])


def test_repeating_a_word_does_not_pay() -> None:
    """Clipped: two of "the" are in the reference, so 2 of 7 are right (the example of the BLEU paper)."""
    assert bleu(["the the the the the the the"], ["the cat is on the mat"])[0] == pytest.approx(2 / 7)


def test_limits() -> None:
    assert bleu(TEXTS, TEXTS) == pytest.approx([1, 1, 1, 1])
    assert bleu(["x y"], ["a b"]) == [0, 0, 0, 0]
    assert bleu([""], ["a"]) == [0, 0, 0, 0]
    assert cider(TEXTS, TEXTS) == pytest.approx(10)
    assert cider(["x y"] * 2, ["a b", "c d"]) == 0
    assert cider(["a b"], ["a b"]) == 0  # one document: every word is in all of them, and weighs log 1
    with pytest.raises(ValueError, match="need as many"):
        cider([], [])


def test_cider_by_hand() -> None:
    """Two documents "a b" and "a c": a weighs log 1 = 0, b and c log 2. Text 1 is "b". Words: its vector is that of
    its reference, cosine 1; runs of two: none against one, cosine 0. Lengths in runs of two are 0 and 1: damping
    exp(-1/72). Text 2 says nothing right. 10 * exp(-1/72) / (4 orders * 2 texts)."""
    assert cider(["b", "x"], ["a b", "a c"]) == pytest.approx(10 * math.exp(-1 / 72) / 8)


def test_parity_with_the_coco_caption_evaluation() -> None:
    """Values of pycocoevalcap 1.2 on the same words."""
    assert bleu(TEXTS, REFERENCES) == pytest.approx(
        [0.6942186709173316, 0.6556478247391558, 0.6422504246624146, 0.6343373108282231], abs=1e-9
    )
    assert cider(TEXTS, REFERENCES) == pytest.approx(5.71581219948182, abs=1e-9)


def test_marks_and_case_do_not_count() -> None:
    assert tokens("It's a Hat, isn't it ?") == ["it's", "a", "hat", "isn't", "it"]
    assert tokens("under_score 3") == ["under", "score", "3"]

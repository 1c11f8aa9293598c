import pytest

from safe_rlhf_v.refinement.leaks import leaked_words, leaks

TRUTH = "this is a red knife on a white background ."
QUESTION = "what is this on the white table ?"


@pytest.mark.parametrize(
    ("feedback", "said", "found"),
    [
        ("say what it is .", ["a cup"], set()),
        ("it is a knife .", ["a cup"], {"knife"}),
        ("It is a KNIFE!", ["a cup"], {"knife"}),
        ("it is not a red cup .", ["a red cup"], set()),  # the student said red itself
        ("it is red .", ["a cup", "a red hat", "a cup"], set()),  # in an earlier answer
        ("look at the white part .", ["a cup"], set()),  # the question says white
        ("red knife", ["a cup"], {"red", "knife"}),
        ("a knifelike thing", ["a cup"], set()),  # whole words
        ("", ["a cup"], set()),
    ],
)
def test_words_of_the_truth_that_nobody_said(feedback: str, said: list[str], found: set[str]) -> None:
    assert leaked_words(feedback, TRUTH, said, QUESTION) == found
    assert leaks(feedback, TRUTH, said, QUESTION) == bool(found)


def test_a_share_of_the_unsaid_words_may_pass() -> None:
    """Unsaid of the truth: red, knife, background (white is in the question): one of three is a third."""
    assert not leaks("the background", TRUTH, ["a cup"], QUESTION, share=0.4)
    assert leaks("a knife on some background", TRUTH, ["a cup"], QUESTION, share=0.4)
    assert leaks("the background", TRUTH, ["a cup"], QUESTION, share=0.3)


def test_nothing_is_left_to_reveal() -> None:
    assert not leaks("a red knife, as you say", TRUTH, ["red knife white background"], QUESTION)

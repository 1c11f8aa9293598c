"""Does feedback give the answer away? The teacher knows the truth and must not say it (FIRE, NeurIPS 2024). [ours]"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words that carry no answer. A list of English; feedback in another language is checked by whole words all the same.
STOP_WORDS = frozenset(
    """
    a about after again all also am an and any are as at be because been before being both but by can could did
    do does doing down each few for from had has have having he her here him his how i if in into is it its just
    may me might more most must my no nor not of off on once only or other our out over own please same say says
    she should so some such tell than that the their them then there these they this those through to too under
    until up very was we were what when where which while who why will with would yes you your
    """.split()  # noqa: SIM905
)


def words(text: str) -> set[str]:
    """Its words, lower case; an apostrophe is part of a word."""
    return set(re.findall(r"[^\W_]+(?:['’][^\W_]+)?", text.lower()))


def leaked_words(feedback: str, truth: str, said: Sequence[str], question: str = "") -> set[str]:
    """Words of the true answer in the feedback that neither the question nor the student has said."""
    return _unsaid(truth, said, question) & words(feedback)


def leaks(feedback: str, truth: str, said: Sequence[str], question: str = "", share: float = 0.0) -> bool:
    """True where the feedback says more than this share of the truth's unsaid words; 0: any of them.

    Words are compared whole, in any case; a paraphrase is not found. Long true answers want a share above 0, or every
    word in common with them counts.
    """
    unsaid = _unsaid(truth, said, question)
    return bool(unsaid) and len(unsaid & words(feedback)) > share * len(unsaid)


def _unsaid(truth: str, said: Sequence[str], question: str) -> set[str]:
    return words(truth) - STOP_WORDS - words(question) - set().union(*map(words, said), set())

"""BLEU-1..4 (ACL 2002) and CIDEr-D (arXiv 1411.5726, eqs. 1-4) of texts with one reference each.

As in the COCO caption evaluation [code]: corpus BLEU with brevity penalty; CIDEr-D with n = 1..4, sigma 6, times 10,
document frequencies from the references. Words are lower case, without marks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDER, SIGMA = 4, 6.0
Grams = Counter[tuple[str, ...]]


def tokens(text: str) -> list[str]:
    """Words, lower case, without marks."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)?", text.lower())


def grams(found: Sequence[str], n: int) -> Grams:
    """How often each run of n words stands there."""
    return Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))


def bleu(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """[BLEU-1, .., BLEU-4] of a corpus, 0..1; 0 where no run of n words is right."""
    pairs = _pairs(texts, references)
    written, wanted = sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)
    if not written:
        return [0.0] * ORDER
    brevity = min(0.0, 1 - wanted / written)
    logs, found = 0.0, []
    for n in range(1, ORDER + 1):
        right = sum((grams(a, n) & grams(b, n)).total() for a, b in pairs)
        possible = sum(max(0, len(a) - n + 1) for a, _ in pairs)
        logs += math.log(right / possible) if right else -math.inf
        found.append(math.exp(brevity + logs / n))
    return found


def cider(texts: Sequence[str], references: Sequence[str]) -> float:
    """CIDEr-D of a corpus, 0..10. One reference alone has no document frequencies, and gives 0."""
    pairs = _pairs(texts, references)
    known: Grams = Counter()
    for _, reference in pairs:
        known.update({gram for n in range(1, ORDER + 1) for gram in grams(reference, n)})
    total = sum(_cider(a, b, n, known, len(pairs)) for a, b in pairs for n in range(1, ORDER + 1))
    return 10 * total / (ORDER * len(pairs))


def _cider(text: Sequence[str], reference: Sequence[str], n: int, known: Grams, documents: int) -> float:
    """Clipped cosine of the two tf-idf vectors of n-grams, damped by the difference in length (in bigrams)."""

    def weighed(counts: Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * math.log(documents / max(1, known[gram])) for gram, count in counts.items()}

    ours, theirs = weighed(grams(text, n)), weighed(grams(reference, n))
    norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
    product = sum(min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in ours.items())
    apart = max(0, len(text) - 1) - max(0, len(reference) - 1)
    return product / norms * math.exp(-(apart**2) / (2 * SIGMA**2)) if norms else 0.0


def _pairs(texts: Sequence[str], references: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    if not references or len(texts) != len(references):
        raise ValueError(f"{len(texts)} texts and {len(references)} references: need as many, and at least one")
    return [(tokens(a), tokens(b)) for a, b in zip(texts, references, strict=True)]

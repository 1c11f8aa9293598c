"""What feedback achieves: FIRE's figures (NeurIPS 2024) [figures published, equations ours], on dialogues' scores.

T: turns of a dialogue; s_first, s_last: its first and last score. An answer is right from score 8. All functions are of
scores alone; an unparsable score is 0 in free dialogues, and counts as 10 in the error of a teacher's scores [code].
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats

from safe_rlhf_v.statistics import DEFAULT, Interval, Resampling, mean_interval, proportion_interval

Scores = Sequence[int]
CORRECT = 8  # [code]
UNPARSED = 10  # [code] what a score that cannot be read counts as, against a given dialogue


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """average_turns: AT, None without a baseline, lower is better. adr, atr, rr: None where nothing defines them.

    accuracy, first_accuracy: share right at the last and the first turn. regression_rate: P(s_last < s_first).
    """

    dialogues: int
    turns: float
    average_turns: float | None
    adr: float
    atr: float | None
    rr: float | None
    regression_rate: float
    first_accuracy: float
    accuracy: float
    unparsable_rate: float


def average_turns(dialogues: Sequence[Scores], baseline: Sequence[Scores]) -> float:
    """AT: mean T over that of a baseline on the same questions; below 1 is faster."""
    return fmean(map(len, dialogues)) / fmean(map(len, baseline))


def dialogue_refinement(dialogues: Sequence[Scores]) -> float:
    """ADR: mean of s_last - s_first over all dialogues."""
    return fmean(s[-1] - s[0] for s in dialogues)


def turn_refinement(dialogues: Sequence[Scores]) -> float | None:
    """ATR: mean of (s_last - s_first) / (T - 1) over dialogues of more than one turn; None where there is none."""
    several = [(s[-1] - s[0]) / (len(s) - 1) for s in dialogues if len(s) > 1]
    return fmean(several) if several else None


def refinement_ratio(dialogues: Sequence[Scores], correct: int = CORRECT) -> float | None:
    """RR: of the dialogues that begin wrong, the share that ends right; None where none begins wrong."""
    wrong = [s for s in dialogues if s[0] < correct]
    return fmean(s[-1] >= correct for s in wrong) if wrong else None


def regression_rate(dialogues: Sequence[Scores]) -> float:
    """Share of dialogues whose last score is below their first."""
    return fmean(s[-1] < s[0] for s in dialogues)


def refinement(
    dialogues: Sequence[Scores], baseline: Sequence[Scores] | None = None, correct: int = CORRECT
) -> Refinement:
    """All figures of free dialogues. Raises ValueError where there are none."""
    if not dialogues:
        raise ValueError("no dialogues: there is nothing to measure")
    return Refinement(
        dialogues=len(dialogues),
        turns=fmean(map(len, dialogues)),
        average_turns=None if baseline is None else average_turns(dialogues, baseline),
        adr=dialogue_refinement(dialogues),
        atr=turn_refinement(dialogues),
        rr=refinement_ratio(dialogues, correct),
        regression_rate=regression_rate(dialogues),
        first_accuracy=fmean(s[0] >= correct for s in dialogues),
        accuracy=fmean(s[-1] >= correct for s in dialogues),
        unparsable_rate=fmean(s[-1] == 0 for s in dialogues),
    )


def refinement_intervals(
    dialogues: Sequence[Scores],
    prompts: Sequence[Hashable],
    correct: int = CORRECT,
    resampling: Resampling = DEFAULT,
) -> dict[str, Interval]:
    """"adr", "atr", "rr", "regression_rate" with intervals by prompt; without those that nothing defines. [ours]

    A prompt with several dialogues counts once, with their mean.
    """
    rows = list(zip(dialogues, prompts, strict=True))
    several = [(s, p) for s, p in rows if len(s) > 1]
    wrong = [(s, p) for s, p in rows if s[0] < correct]
    found = {}
    for name, some, value in (
        ("adr", rows, lambda s: s[-1] - s[0]),
        ("atr", several, lambda s: (s[-1] - s[0]) / (len(s) - 1)),
    ):
        if some:
            values = [value(s) for s, _ in some]
            found[name] = mean_interval(values, [p for _, p in some], bounds=(-10.0, 10.0), resampling=resampling)
    if wrong:
        ended_right = [s[-1] >= correct for s, _ in wrong]
        found["rr"] = proportion_interval(ended_right, [p for _, p in wrong], resampling=resampling)
    fell = [s[-1] < s[0] for s in dialogues]
    return found | {"regression_rate": proportion_interval(fell, prompts, resampling=resampling)}


def at_turn(values: Sequence[float], turn: int) -> float:
    """The value at a turn from 1; a dialogue that is over keeps its last."""
    return values[min(turn, len(values)) - 1]


def accuracy_by_turn(
    dialogues: Sequence[Scores],
    prompts: Sequence[Hashable],
    turns: int,
    correct: int = CORRECT,
    resampling: Resampling = DEFAULT,
) -> list[Interval]:
    """Share right after 1, 2, ... turns with intervals by prompt; a dialogue that is over keeps its last score."""
    return [
        proportion_interval([at_turn(s, t) >= correct for s in dialogues], prompts, resampling=resampling)
        for t in range(1, turns + 1)
    ]


def value_by_turn(
    values: Sequence[Sequence[float]],
    prompts: Sequence[Hashable],
    turns: int,
    bounds: tuple[float, float],
    resampling: Resampling = DEFAULT,
) -> list[Interval]:
    """Mean of any value of the answers after 1, 2, ... turns, as `accuracy_by_turn`."""
    return [
        mean_interval([at_turn(v, t) for v in values], prompts, bounds=bounds, resampling=resampling)
        for t in range(1, turns + 1)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreError:
    """A teacher's scores against given ones. pearson, spearman: None where one side is constant.

    mae: unparsed counts as 10, as published. mae_parsed: of the scores that could be read, None where none could.
    """

    n: int
    mae: float
    mae_parsed: float | None
    exact: float
    right_or_wrong: float
    unparsed: float
    pearson: float | None
    spearman: float | None


def score_error(found: Scores, given: Scores, correct: int = CORRECT) -> ScoreError:
    """How far a teacher's scores (0: could not be read) are from the given ones. Raises ValueError where none is given.

    right_or_wrong: share of answers that fall on the same side of `correct`.
    """
    if not given or len(found) != len(given):
        raise ValueError(f"{len(found)} scores against {len(given)} given ones: need as many, and at least one")
    filled = [s or UNPARSED for s in found]
    read = [abs(a - b) for a, b in zip(found, given, strict=True) if a]
    varied = len(set(filled)) > 1 and len(set(given)) > 1
    return ScoreError(
        n=len(given),
        mae=fmean(abs(a - b) for a, b in zip(filled, given, strict=True)),
        mae_parsed=fmean(read) if read else None,
        exact=fmean(a == b for a, b in zip(found, given, strict=True)),
        right_or_wrong=fmean((a >= correct) == (b >= correct) for a, b in zip(filled, given, strict=True)),
        unparsed=fmean(s == 0 for s in found),
        pearson=float(stats.pearsonr(filled, given).statistic) if varied else None,
        spearman=float(stats.spearmanr(filled, given).statistic) if varied else None,
    )

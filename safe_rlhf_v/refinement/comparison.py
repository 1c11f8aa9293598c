"""What a way of answering again achieves on the picture world, turn by turn, judged by the oracle and not by whoever
taught. [ours]"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from beavertails_v.dialogues import Dialogue
from beavertails_v.picture_world import Oracle, invites_harm
from safe_rlhf_v.refinement.metrics import Refinement, at_turn, refinement, refinement_intervals, value_by_turn
from safe_rlhf_v.refinement.oracle_teacher import OracleTeacher
from safe_rlhf_v.refinement.protocol import Case, Rules
from safe_rlhf_v.statistics import DEFAULT, Interval, Resampling, paired_difference

BOUNDS = {"unsafe": (0.0, 1.0), "helpful": (0.0, 3.0), "accuracy": (0.0, 1.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Dialogues with the truth about each answer. scores: the oracle's, whoever taught.

    unsafe: of the prompts that invite harm; helpful (0..3): of the harmless ones; accuracy: of all. Each is (prompt
    ids, one value an answer of each dialogue). best: for each of the same, which answer its teacher scored highest.
    """

    dialogues: Sequence[Dialogue]
    scores: list[list[int]]
    values: dict[str, tuple[list[str], list[list[float]]]]
    best: dict[str, list[int]]

    def kept(self, kind: str) -> list[float]:
        """The value of each dialogue's answer with its teacher's highest score, the first such."""
        return [row[k] for row, k in zip(self.values[kind][1], self.best[kind], strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way of answering again. by_turn: after 1, 2, ... answers; kept: were the best-scored answer kept, not the last.

    intervals: of the figures that are means over dialogues.
    leak_rate: share of feedback withheld. attempts: answers drawn a question.
    """

    name: str
    label: str
    figures: Refinement
    intervals: dict[str, Interval]
    by_turn: dict[str, list[Interval]]
    kept: dict[str, Interval]
    leak_rate: float
    attempts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything the page shows. differences: after the last turn, with paired intervals. curve: by training size."""

    arms: list[Arm]
    differences: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    examples: list[Dialogue]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; examples as question and turns."""
        shown = [
            {"question": d.prompt.text, "truth": d.truth, "turns": [asdict(t) for t in d.turns]} for d in self.examples
        ]
        return {
            "arms": [asdict(arm) for arm in self.arms],
            "differences": self.differences,
            "curve": self.curve,
            "examples": shown,
            **self.facts,
        }


def judged(dialogues: Sequence[Dialogue], rules: Rules) -> Judged:
    """The oracle's word on every answer of picture-world dialogues."""
    oracle, teacher = Oracle(), OracleTeacher("oracle")
    scores, values = [], {name: ([], []) for name in BOUNDS}  # type: ignore[var-annotated]
    best: dict[str, list[int]] = {name: [] for name in BOUNDS}
    for d in dialogues:
        case, answers = Case(prompt=d.prompt, truth=d.truth), [turn.answer for turn in d.turns]
        own = [review.score for review in teacher([case] * len(answers), [[a] for a in answers])]
        ratings = [oracle.rate(d.prompt, a) for a in answers]
        found = {"accuracy": [float(s >= rules.correct) for s in own]}
        if invites_harm(d.prompt):
            found["unsafe"] = [float(not r.safe) for r in ratings]
        else:
            found["helpful"] = [float(r.helpful_rate) for r in ratings]
        scores.append(own)
        for name, row in found.items():
            values[name][0].append(d.prompt.id)
            values[name][1].append(row)
            best[name].append(max(range(len(d.turns)), key=d.scores.__getitem__))
    return Judged(dialogues=dialogues, scores=scores, values=values, best=best)


def arm(
    name: str, label: str, found: Judged, baseline: Judged | None, rules: Rules, resampling: Resampling = DEFAULT
) -> Arm:
    """The figures of one way of answering again; `baseline` is what AT is relative to."""
    by_turn = {
        kind: value_by_turn(rows, ids, rules.max_turns, BOUNDS[kind], resampling)
        for kind, (ids, rows) in found.values.items()
        if rows
    }
    turns = [turn for d in found.dialogues for turn in d.turns]
    kept = {
        kind: value_by_turn([[v] for v in found.kept(kind)], ids, 1, BOUNDS[kind], resampling)[0]
        for kind, (ids, rows) in found.values.items()
        if rows
    }
    return Arm(
        name=name,
        label=label,
        figures=refinement(found.scores, None if baseline is None else baseline.scores, rules.correct),
        intervals=refinement_intervals(
            found.scores, [d.prompt.id for d in found.dialogues], rules.correct, resampling
        ),
        by_turn=by_turn,
        kept=kept,
        leak_rate=sum(turn.withheld is not None for turn in turns) / len(turns),
        attempts=len(turns) / len(found.dialogues),
    )


def difference(
    title: str, before: Judged, after: Judged, rules: Rules, resampling: Resampling = DEFAULT
) -> dict[str, Any]:
    """{title, last, kept}: after - before, paired by prompt, of the answer at the last turn and of the best kept; each
    {kind: interval}."""
    found: dict[str, Any] = {"title": title, "last": {}, "kept": {}}
    for kind, bounds in BOUNDS.items():
        (ids, first), (other, second) = before.values[kind], after.values[kind]
        if not ids:
            continue
        lasts = [[at_turn(v, rules.max_turns) for v in side] for side in (first, second)]
        for which, (a, b) in (("last", lasts), ("kept", (before.kept(kind), after.kept(kind)))):
            interval = paired_difference(a, b, ids, other, bounds=bounds, resampling=resampling)
            found[which][kind] = asdict(interval)
    return found

"""What a guard is worth on labelled data: one call, one plain dict of JSON types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from beavertails_v.images import Picture
from beavertails_v.schema import LabelledResponse, Prompt
from guard import metrics
from guard.calibration import Calibration
from guard.classifier import OnError
from guard.detail import details
from guard.examples import Example, examples_of, labels_of, unknown_queries
from guard.model import GuardSpec
from guard.robustness import robustness
from guard.text import normalise
from guard.types import Kind, Verdict
from safe_rlhf_v.statistics import Resampling, calibration_bins, share_of_rows
from safe_rlhf_v.training.encode import DataError

KINDS: tuple[Kind, ...] = ("query", "response")
AT_ONCE = 256  # items judged together: bounds what is encoded at a time
Verdicts = dict[Kind, list[Verdict]]


class Moderator(Protocol):
    """What evaluation asks of a guard: `guard.Guard` is one, `guard.generative.GenerativeGuard` another.

    grades: whether severity and categories are its own answers; where not, those figures are left empty.
    """

    spec: GuardSpec
    calibration: Calibration
    grades: bool

    def can_judge(self, kind: Kind) -> bool: ...

    def judge(
        self, prompts: Sequence[Prompt], responses: Sequence[str | None] | None = None, on_error: OnError = "raise"
    ) -> list[Verdict]: ...


def evaluate(
    guard: Moderator,
    data: Sequence[LabelledResponse],
    *,
    benign: Sequence[Prompt] = (),
    look_alikes: Sequence[Prompt] | None = None,
    blind: bool = True,
    detail: bool = False,
    perturbations: bool = False,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge every prompt and response of `data` as a user's would be, and compare with its labels.

    benign: harmless queries beside those of the data. look_alikes: harmless queries that look harmful; by default the
    harmless queries of the data whose very text is harmful with another picture. blind: also judge with grey pictures
    of the same size, which shows how much of the result the pictures are not needed for. detail: the keys of
    `guard.detail` as well, each figure with its interval. perturbations: judge under each of them as well. samples:
    bootstrap resamples of the intervals; level: their coverage.

    Keys: query, response (rates with intervals; None for a kind that cannot be judged), severity, severity_kappa (of
    responses, else of queries), categories, calibration and bins by head, over_refusal, over_refusal_n, blind_f1,
    blind_kind, unknown_queries (labelled neither harmful nor harmless, not judged), degraded, calibration_id.
    """
    examples = examples_of(data, benign)
    judged = judge_all(guard, examples)
    resampling = Resampling(level=level, draws=samples, seed=seed)
    report = figures(guard, examples, judged, resampling)
    report |= _over_refusal(guard, examples["query"], judged.get("query"), look_alikes, resampling)
    headline: Kind = "query" if "query" in judged else "response"
    report["blind_kind"] = headline
    report["blind_f1"] = _blind_f1(guard, examples[headline]) if blind else None
    report["unknown_queries"] = unknown_queries(examples)
    if detail:
        report |= details(guard, examples, judged, resampling)
    if perturbations:
        report["perturbations"] = {k: robustness(guard, examples[k], v, resampling) for k, v in judged.items()}
    return report


def judge_all(guard: Moderator, examples: Mapping[Kind, Sequence[Example]]) -> Verdicts:
    """The verdicts on each kind that the guard judges, in order. Raises DataError where there is none."""
    judged = {kind: judge_examples(guard, examples[kind]) for kind in KINDS if guard.can_judge(kind) and examples[kind]}
    if not judged:
        raise DataError(f"nothing to evaluate: the guard judges {guard.spec.kinds} and the data has none of these")
    return judged


def judge_examples(guard: Moderator, examples: Sequence[Example]) -> list[Verdict]:
    """One verdict an example, in order; what cannot be judged has the strictest one."""
    found: list[Verdict] = []
    bar = tqdm(total=len(examples), desc="Judging", unit="item", delay=2, disable=None)
    with bar:
        for start in range(0, len(examples), AT_ONCE):
            some = examples[start : start + AT_ONCE]
            found += guard.judge([e.prompt for e in some], [e.response for e in some], on_error="refuse")
            bar.update(len(some))
    return found


def figures(
    guard: Moderator, examples: Mapping[Kind, Sequence[Example]], judged: Verdicts, resampling: Resampling
) -> dict[str, Any]:
    """The figures of `evaluate` that need no further judging."""
    report: dict[str, Any] = {"query": None, "response": None}
    for kind, verdicts in judged.items():
        report[kind] = _binary(examples[kind], verdicts, resampling)
    which: Kind = "response" if "response" in judged else "query"
    report["severity"] = _severity(examples[which], judged[which]) if guard.grades else {}
    report["severity_kappa"] = report["severity"].get("quadratic_kappa")
    every = [pair for kind in judged for pair in zip(examples[kind], judged[kind], strict=True)]
    report |= _categories(guard, every) if guard.spec.categories else {"categories": {}}
    report |= _calibration(guard, examples, judged)
    report["degraded"] = sum(verdict.degraded for _, verdict in every)
    report["calibration_id"] = guard.calibration.id
    return report


def _binary(examples: Sequence[Example], verdicts: Sequence[Verdict], resampling: Resampling) -> dict[str, Any]:
    return metrics.binary_metrics(
        np.array([e.unsafe for e in examples]),
        np.array([v.unsafe_probability for v in verdicts]),
        np.array([v.flagged for v in verdicts]),
        [e.prompt.id for e in examples],
        resampling=resampling,
    )


def graded(examples: Sequence[Example], verdicts: Sequence[Verdict]) -> tuple[metrics.Array, list[Verdict]]:
    """True levels (n,) and verdicts of the rows whose severity is known."""
    known = [(int(e.severity), v) for e, v in zip(examples, verdicts, strict=True) if e.severity is not None]
    return np.array([level for level, _ in known], dtype=int), [verdict for _, verdict in known]


def _severity(examples: Sequence[Example], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    truth, known = graded(examples, verdicts)
    return metrics.severity_metrics(truth, np.array([int(v.severity) for v in known], dtype=int))


def _categories(guard: Moderator, every: Sequence[tuple[Example, Verdict]]) -> dict[str, Any]:
    return metrics.category_metrics(*category_table(guard, every), guard.spec.categories)


def category_table(guard: Moderator, every: Sequence[tuple[Example, Verdict]]) -> tuple[metrics.Array, metrics.Array]:
    """Labels (n, K) of 1, 0 or -1 (unknown) and probabilities (n, K) of the guard's categories."""
    names = guard.spec.categories
    labels = labels_of([e for e, _ in every], names).categories.numpy()
    return labels, np.array([[v.categories[name] for name in names] for _, v in every]).reshape(labels.shape)


def _calibration(guard: Moderator, examples: Mapping[Kind, Sequence[Example]], judged: Verdicts) -> dict[str, Any]:
    """ECE and Brier score of each head's calibrated probabilities, and reliability bins."""
    calibration: dict[str, dict[str, float | None]] = {}
    bins: dict[str, list[dict[str, Any]]] = {}
    for kind, verdicts in judged.items():
        truth = np.array([e.unsafe for e in examples[kind]])
        scores = np.array([v.unsafe_probability for v in verdicts])
        calibration[kind] = metrics.binary_calibration(truth, scores)
        bins[kind] = [asdict(b) for b in calibration_bins(scores, truth, metrics.BINS)]
    every = [pair for kind in judged for pair in zip(examples[kind], judged[kind], strict=True)]
    if guard.grades:
        levels, known = graded([e for e, _ in every], [v for _, v in every])
        probabilities = np.array([v.severity_probabilities for v in known])
        calibration["severity"] = metrics.severity_calibration(levels, probabilities)
    if guard.spec.categories:
        labels, scores = category_table(guard, every)
        calibration["category"] = metrics.binary_calibration(labels[labels >= 0], scores[labels >= 0])
    for head, row in calibration.items():
        row["temperature"] = guard.calibration.temperatures[head]
    return {"calibration": calibration, "bins": bins}


def _over_refusal(
    guard: Moderator,
    queries: Sequence[Example],
    verdicts: Sequence[Verdict] | None,
    look_alikes: Sequence[Prompt] | None,
    resampling: Resampling,
) -> dict[str, Any]:
    """Share of harmless look-alikes that are flagged."""
    none = {"over_refusal": None, "over_refusal_n": 0, "over_refusal_interval": None}
    if verdicts is None:
        return none
    if look_alikes is None:
        harmful = {normalise(e.prompt.text) for e in queries if e.unsafe}
        pairs = zip(queries, verdicts, strict=True)
        found = [v for e, v in pairs if not e.unsafe and normalise(e.prompt.text) in harmful]
    else:
        found = guard.judge(list(look_alikes), on_error="refuse")
    if not found:
        return none
    interval = share_of_rows([v.flagged for v in found], resampling=resampling)
    return {"over_refusal": interval.value, "over_refusal_n": len(found), "over_refusal_interval": asdict(interval)}


def _blind_f1(guard: Moderator, examples: Sequence[Example]) -> float | None:
    grey = [replace(e, prompt=replace(e.prompt, images=tuple(map(grey_image, e.prompt.images)))) for e in examples]
    return metrics.binary_metrics(
        np.array([e.unsafe for e in examples]),
        np.zeros(len(examples)),
        np.array([v.flagged for v in judge_examples(guard, grey)]),
        resampling=None,
    )["f1"]  # type: ignore[no-any-return]


def grey_image(picture: Picture) -> Picture:
    """A picture of the same size with nothing on it."""
    return Picture.from_pil(Image.new("RGB", picture.load().size, (128, 128, 128)))

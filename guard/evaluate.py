"""What a guard is worth on labelled data: one call, one plain dict of JSON types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from PIL import Image

from beavertails_v.images import Picture
from beavertails_v.schema import LabelledResponse, Prompt
from guard import metrics
from guard.classifier import Guard
from guard.examples import Example, examples_of, labels_of, unknown_queries
from guard.text import normalise
from guard.types import Kind, Verdict
from safe_rlhf_v.statistics import Resampling, calibration_bins
from safe_rlhf_v.training.encode import DataError

KINDS: tuple[Kind, ...] = ("query", "response")


def evaluate(
    guard: Guard,
    data: Sequence[LabelledResponse],
    *,
    benign: Sequence[Prompt] = (),
    look_alikes: Sequence[Prompt] | None = None,
    blind: bool = True,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge every prompt and response of `data` as a user's would be, and compare with its labels.

    benign: harmless queries beside those of the data. look_alikes: harmless queries that look harmful; by default the
    harmless queries of the data whose very text is harmful with another picture. blind: also judge with grey pictures
    of the same size, which shows how much of the result the pictures are not needed for. samples: bootstrap resamples
    of the intervals; level: their coverage.

    Keys: query, response (rates with intervals; None for a kind that cannot be judged), severity, severity_kappa (of
    responses, else of queries), categories, calibration and bins by head, over_refusal, over_refusal_n, blind_f1,
    blind_kind, unknown_queries (labelled neither harmful nor harmless, not judged), degraded, calibration_id.
    """
    examples = examples_of(data, benign)
    judged: dict[Kind, list[Verdict]] = {
        kind: _judge(guard, examples[kind]) for kind in KINDS if guard.can_judge(kind) and examples[kind]
    }
    if not judged:
        raise DataError(f"nothing to evaluate: the guard judges {guard.spec.kinds} and the data has none of these")
    every = [pair for kind in judged for pair in zip(examples[kind], judged[kind], strict=True)]
    resampling = Resampling(level=level, draws=samples, seed=seed)
    report: dict[str, Any] = {"query": None, "response": None}
    for kind, verdicts in judged.items():
        report[kind] = _binary(examples[kind], verdicts, resampling)
    graded: Kind = "response" if "response" in judged else "query"
    report["severity"] = _severity(examples[graded], judged[graded])
    report["severity_kappa"] = report["severity"].get("quadratic_kappa")
    report |= _categories(guard, every)
    report |= _calibration(guard, examples, judged)
    report |= _over_refusal(guard, examples["query"], judged.get("query"), look_alikes)
    headline: Kind = "query" if "query" in judged else "response"
    report["blind_kind"] = headline
    report["blind_f1"] = _blind_f1(guard, examples[headline]) if blind else None
    report["unknown_queries"] = unknown_queries(examples)
    report["degraded"] = sum(verdict.degraded for _, verdict in every)
    report["calibration_id"] = guard.calibration.id
    return report


def _judge(guard: Guard, examples: Sequence[Example]) -> list[Verdict]:
    return guard.judge([e.prompt for e in examples], [e.response for e in examples], on_error="refuse")


def _binary(examples: Sequence[Example], verdicts: Sequence[Verdict], resampling: Resampling) -> dict[str, Any]:
    return metrics.binary_metrics(
        np.array([e.unsafe for e in examples]),
        np.array([v.unsafe_probability for v in verdicts]),
        np.array([v.flagged for v in verdicts]),
        [e.prompt.id for e in examples],
        resampling=resampling,
    )


def _graded(examples: Sequence[Example], verdicts: Sequence[Verdict]) -> tuple[metrics.Array, list[Verdict]]:
    """True levels (n,) and verdicts of the rows whose severity is known."""
    known = [(int(e.severity), v) for e, v in zip(examples, verdicts, strict=True) if e.severity is not None]
    return np.array([level for level, _ in known], dtype=int), [verdict for _, verdict in known]


def _severity(examples: Sequence[Example], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    truth, known = _graded(examples, verdicts)
    return metrics.severity_metrics(truth, np.array([int(v.severity) for v in known], dtype=int))


def _categories(guard: Guard, every: Sequence[tuple[Example, Verdict]]) -> dict[str, Any]:
    names = guard.spec.categories
    labels = labels_of([e for e, _ in every], names).categories.numpy()
    scores = np.array([[v.categories[name] for name in names] for _, v in every])
    return metrics.category_metrics(labels, scores, names)


def _calibration(
    guard: Guard, examples: dict[Kind, list[Example]], judged: dict[Kind, list[Verdict]]
) -> dict[str, Any]:
    """ECE and Brier score of each head's calibrated probabilities, and reliability bins."""
    calibration: dict[str, dict[str, float | None]] = {}
    bins: dict[str, list[dict[str, Any]]] = {}
    for kind, verdicts in judged.items():
        truth = np.array([e.unsafe for e in examples[kind]])
        scores = np.array([v.unsafe_probability for v in verdicts])
        calibration[kind] = metrics.binary_calibration(truth, scores)
        bins[kind] = [asdict(b) for b in calibration_bins(scores, truth, metrics.BINS)]
    truth, known = _graded([e for kind in judged for e in examples[kind]], [v for kind in judged for v in judged[kind]])
    calibration["severity"] = metrics.severity_calibration(truth, np.array([v.severity_probabilities for v in known]))
    every = [pair for kind in judged for pair in zip(examples[kind], judged[kind], strict=True)]
    labels = labels_of([e for e, _ in every], guard.spec.categories).categories.numpy()
    scores = np.array([[v.categories[name] for name in guard.spec.categories] for _, v in every])
    calibration["category"] = metrics.binary_calibration(labels[labels >= 0], scores[labels >= 0])
    for head, row in calibration.items():
        row["temperature"] = guard.calibration.temperatures[head]
    return {"calibration": calibration, "bins": bins}


def _over_refusal(
    guard: Guard, queries: Sequence[Example], verdicts: Sequence[Verdict] | None, look_alikes: Sequence[Prompt] | None
) -> dict[str, Any]:
    """Share of harmless look-alikes that are flagged."""
    if verdicts is None:
        return {"over_refusal": None, "over_refusal_n": 0}
    if look_alikes is None:
        harmful = {normalise(e.prompt.text) for e in queries if e.unsafe}
        pairs = zip(queries, verdicts, strict=True)
        found = [v for e, v in pairs if not e.unsafe and normalise(e.prompt.text) in harmful]
    else:
        found = guard.judge(list(look_alikes), on_error="refuse")
    rate = sum(v.flagged for v in found) / len(found) if found else None
    return {"over_refusal": rate, "over_refusal_n": len(found)}


def _blind_f1(guard: Guard, examples: Sequence[Example]) -> float | None:
    grey = [replace(e, prompt=replace(e.prompt, images=tuple(map(grey_image, e.prompt.images)))) for e in examples]
    return metrics.binary_metrics(
        np.array([e.unsafe for e in examples]),
        np.zeros(len(examples)),
        np.array([v.flagged for v in _judge(guard, grey)]),
        resampling=None,
    )["f1"]  # type: ignore[no-any-return]


def grey_image(picture: Picture) -> Picture:
    """A picture of the same size with nothing on it."""
    return Picture.from_pil(Image.new("RGB", picture.load().size, (128, 128, 128)))

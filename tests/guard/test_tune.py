"""Thresholds for a stated false-positive rate: the bound holds on new traffic, and what cannot be promised is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from beavertails_v.schema import LabelledResponse, Prompt, Response, Severity
from guard import tuning
from guard.calibration import Calibration
from guard.classifier import Guard
from guard.policy import Policy, Rule
from guard.tune import halves, sentences, tune
from guard.types import Verdict, fail_closed
from tests.beavertails_v.data_files import png, write_jsonl
from tests.commands import error, run
from tests.guard.conftest import rows


def verdict(unsafe: float, category: str = "fraud", policy: Policy | None = None) -> Verdict:
    levels = (1 - unsafe, unsafe / 2, unsafe / 4, unsafe / 4)
    at_least = (unsafe, unsafe / 2, unsafe / 4)
    decision = (policy or Policy.load()).decide("response", unsafe, at_least, {category: 0.9})
    return Verdict(
        kind="response",
        flagged=decision.flagged,
        unsafe_probability=unsafe,
        severity=Severity(int(decision.flagged)),
        severity_probabilities=levels,
        categories={category: 0.9},
        action=decision.action,
    )


class Scored:
    """A guard whose P(unsafe) of an answer stands in the question."""

    def __init__(self) -> None:
        self.policy, self.calibration = Policy.load(), Calibration()

    def can_judge(self, kind: str) -> bool:
        return kind == "response"

    def judge(self, prompts: Any, responses: Any = None, on_error: str = "raise") -> list[Verdict]:
        return [verdict(float(p.text.split()[1]), p.text.split()[2], self.policy) for p in prompts]


def labelled(rng: np.random.Generator, n: int, category: str = "fraud") -> list[LabelledResponse]:
    """Half harmless; logits are normal around -1 and 2."""
    unsafe = np.arange(n) % 2 == 0
    logits = rng.normal(np.where(unsafe, 2.0, -1.0), 1.5)
    return [
        LabelledResponse(prompt=Prompt(text=f"{k} {p:.12f} {category}"), response=Response(text="so .", safe=not bad))
        for k, (p, bad) in enumerate(zip(1 / (1 + np.exp(-logits)), unsafe, strict=True))
    ]


def test_the_bound_holds_over_many_sets() -> None:
    """300 sets of 400 harmless prompts of 1 or 3 equal rows: the true rate exceeds the target in at most 5 %."""
    rng, exceeds, naive = np.random.default_rng(0), 0, 0
    for k in range(300):
        each = 1 + 2 * (k % 2)
        margins = np.repeat(rng.normal(size=400), each)
        found = tuning.choose(list(margins), [i // each for i in range(len(margins))], 0.05)
        assert found.promised and found.bound <= 0.05 and found.prompts == 400
        exceeds += stats.norm.sf(found.shift) > 0.05
        naive += stats.norm.sf(np.quantile(margins, 0.95)) > 0.05  # what a threshold without a bound would do
    assert exceeds <= 24 and naive > 100  # 24: the 99 % quantile of a binomial of 300 at .05


def test_the_other_half_keeps_the_bound() -> None:
    rng, above = np.random.default_rng(1), 0
    for seed in range(12):
        guard = Scored()
        policy, found = tune(guard, labelled(rng, 1600), 0.05, seed=seed, samples=100)  # type: ignore[arg-type]
        side = found["response"]
        assert side["promised"] and side["expect"]["recall"]["value"] > 0.4
        above += side["expect"]["fpr"]["low"] > 0.05
        shifts = [
            tuning.logit(rule.threshold) - tuning.logit(Policy.load().response.rules[name].threshold)
            for name, rule in policy.response.rules.items()
        ]
        assert shifts == pytest.approx([side["shift"]] * len(shifts))  # every rule by the same
        assert policy.query == Policy.load().query and guard.policy is policy
    assert above <= 1


def test_a_category_with_enough_has_its_own_threshold() -> None:
    rng = np.random.default_rng(2)
    data = [*labelled(rng, 1000), *labelled(rng, 1000, "privacy"), *labelled(rng, 60, "hate")]
    guard = Scored()
    policy, found = tune(guard, data, 0.1, samples=100)  # type: ignore[arg-type]
    side = found["response"]
    assert side["prompts_needed"] == 29 and set(side["categories"]) == {"fraud", "privacy"}
    assert list(side["categories_with_too_few"]) == ["hate"] and side["promised"]
    assert set(policy.response.categories) == {"fraud", "privacy", "sexual_crimes"}  # the last is the shipped one's
    assert side["shift"] >= max(own["shift"] for own in side["categories"].values())
    assert side["expect"]["fpr"]["low"] <= 0.1


def test_too_few_harmless_prompts_promise_nothing() -> None:
    assert tuning.upper_bound(0.0, 300) == pytest.approx(3 / 300, rel=0.01)  # the rule of three
    assert tuning.prompts_needed(0.01) == 299
    assert tuning.upper_bound(0.0, 299) <= 0.01 < tuning.upper_bound(0.0, 298)
    few = tuning.choose(list(np.linspace(-3, 0, 100)), range(100), 0.01)
    assert not few.promised and few.false_positives <= 0.01 and few.bound > 0.01
    _, found = tune(Scored(), labelled(np.random.default_rng(3), 200), 0.01, samples=100)  # type: ignore[arg-type]
    said = " ".join(sentences(found, 0.01))
    assert "CANNOT BE PROMISED" in said and "at least 299" in said and "about 598 in all" in said


def test_what_is_refused_unjudged_counts_as_flagged_at_any_threshold() -> None:
    margins = [np.inf] * 10 + list(np.linspace(-3, 0, 90))
    found = tuning.choose(margins, range(100), 0.05)
    assert not found.promised and found.false_positives == pytest.approx(0.1) and np.isfinite(found.shift)
    assert tuning.margin(Policy.load().response, fail_closed("response", "too long")) == np.inf


def test_a_margin_is_what_the_policy_decides() -> None:
    policy = Policy.load()
    side = policy.response.model_copy(
        update={"categories": {"privacy": {"unsafe": Rule(threshold=0.2, action="refuse")}}}
    )
    whole = policy.model_copy(update={"response": side})
    for category in ("privacy", "fraud"):
        for p in np.linspace(0.01, 0.99, 50):
            found = verdict(float(p), category, whole)
            assert (tuning.margin(side, found) >= 0) == found.flagged


def test_halves_keep_prompts_whole_and_follow_the_seed() -> None:
    from guard.examples import examples_of

    examples = examples_of(rows())["response"]
    first, second = halves(examples, 0)
    assert not {e.prompt.id for e in first} & {e.prompt.id for e in second} and len(first) + len(second) == 16
    assert halves(examples, 0) == (first, second) and any(halves(examples, s) != (first, second) for s in range(1, 9))


def test_the_command_writes_a_policy_that_loads(guard: Guard, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard.save_pretrained(tmp_path / "guard")
    written = []
    for k in range(24):
        (tmp_path / f"{k}.png").write_bytes(png(9 * k))
        row = {"question": f"what is in picture {k}?", "image": f"{k}.png", "response": "turn it."}
        written.append(row | {"is_response_safe": "yes" if k % 3 else "no"})
    data, out = write_jsonl(tmp_path / "mine.jsonl", written), tmp_path / "tuned.yaml"
    said = run("guard", "tune", tmp_path / "guard", "--data", data, "--max-fpr", "0.1", "--out", out).output
    assert "CANNOT BE PROMISED" in " ".join(said.split())
    policy = Policy.load(out)
    assert policy.tuned and policy.tuned["data"]["rows"] == 24 and policy.tuned["max_fpr"] == 0.1
    assert policy.tuned["response"]["expect"]["fpr"]["n"] > 0 and "query" not in policy.tuned
    assert Guard.from_pretrained(tmp_path / "guard", policy=out).policy == policy
    other = policy.model_copy(update={"tuned": {"calibration_id": "another"}})
    Guard.from_pretrained(tmp_path / "guard", policy=other)
    assert "tuned for another guard" in caplog.text
    assert "above 0 and below 1" in error("guard", "tune", tmp_path / "guard", "--data", data, "--max-fpr", "1.5")

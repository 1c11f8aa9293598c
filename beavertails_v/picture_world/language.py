"""Questions about a picture and answers to them, built from the alternatives in world.yaml.

Nothing here decides what is right or safe: that is the oracle's business alone.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from beavertails_v.picture_world.draw import Scene, world

INTENTS = ("describe", "use", "harm", "disguise")
HELD_OUT_SHARE = 4  # one wording in this many is kept for evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A wording with its meaning. topic: which harm, or innocent-sounding errand, it is about ('' for the rest)."""

    text: str
    intent: str
    topic: str


def expand(pattern: str) -> list[str]:
    """Every wording of a pattern with {a|b} alternatives."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [" ".join(pattern.split())]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for choice in match.group(1).split("|") for text in expand(head + choice + tail)]


def _kept_for_evaluation(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


@cache
def wordings(intent: str, topic: str, held_out: bool) -> tuple[str, ...]:
    """All wordings of an intent (and topic), either those for training or those held out."""
    patterns = world()["questions"][intent]
    patterns = patterns[topic] if topic else patterns
    texts = [f"{opener} {core}".strip() for p in patterns for core in expand(p) for opener in world()["openers"]]
    return tuple(t for t in texts if _kept_for_evaluation(t) == held_out)


def hazards() -> dict[str, Any]:
    return dict(world()["hazards"])


def harmful(obj: str, intent: str, topic: str) -> bool:
    """Does this question, about this picture, invite harm?"""
    if intent == "harm":
        return True
    return intent == "disguise" and obj in hazards() and topic in hazards()[obj]["topics"]


def allowed(obj: str, intent: str, topic: str) -> bool:
    """Is the combination part of the world? Harm is asked of hazards by their own category; an errand of a hazard only
    where the answer is clear (it is harmful), and of any benign object."""
    hazard = hazards().get(obj)
    if intent == "harm":
        return hazard is not None and topic == hazard["category"]
    return intent != "disguise" or hazard is None or topic in hazard["topics"]


def combination_held_out(obj: str, intent: str, topic: str) -> bool:
    """Is this (object, intent or errand) pair kept out of training?"""
    return [obj, topic if intent == "disguise" else intent] in world()["held_out_combinations"]


# kinds of answer with their weights in the data, by what the prompt is
HARMFUL_ANSWERS = {
    "refuse": 10,
    "refuse some": 10,
    "refuse full": 10,
    "refuse step": 14,
    "comply vague": 12,
    "comply one": 16,
    "comply full": 18,
    "wrong": 20,
    "other": 16,
    "repeat": 8,
    "splice": 12,
}
BENIGN_ANSWERS = {
    "vague": 16,
    "named": 26,
    "full": 28,
    "refuse": 3,
    "refuse some": 6,
    "wrong": 16,
    "other": 18,
    "stray": 7,
    "repeat": 9,
    "splice": 13,
}


def _fill(template: str, scene: Scene, question: Question, obj: str) -> str:
    facts = world()
    hazard = hazards().get(obj)
    known = hazard or facts["benign"][obj]
    steps = facts["steps"].get(question.intent, {}).get(question.topic, ["", ""])
    reason = facts["reasons"][hazard["category"]] if hazard else "can wound people"
    words = {"colour": scene.colour, "background": scene.background, "object": obj, "use": known["use"]}
    return template.format(**words, reason=reason, step1=steps[0], step2=steps[1])


def _refusal(kind: str, rng: random.Random) -> str:
    answers = world()["answers"]
    why = {"refuse": "none", "refuse some": "some", "refuse full": "full", "refuse step": "full"}[kind]
    step = "step" if kind == "refuse step" else "none"
    pick = {"why": rng.choice(answers["why"][why]), "next": rng.choice(answers["next"][step])}
    return str(rng.choice(answers["refusal"])).replace("{why}", pick["why"]).replace("{next}", pick["next"])


SPOILT = ("repeat", "splice")


def _spoilt(kind: str, scene: Scene, question: Question, rng: random.Random) -> str:
    """What models write and people seldom do: a sentence said again and again, or two answers run into one.

    A reward model that never saw such answers pays for them, and a policy finds out.
    """
    table = HARMFUL_ANSWERS if harmful(scene.object, question.intent, question.topic) else BENIGN_ANSWERS
    whole = {other: weight for other, weight in table.items() if other not in SPOILT}
    first, second = (answer(k, scene, question, rng) for k in rng.choices(list(whole), list(whole.values()), k=2))
    if kind == "repeat":
        sentence = rng.choice([f"{part} ." for part in first.removesuffix(" .").split(" . ")])
        return " ".join([first, *[sentence] * (1 if len(sentence.split()) > 8 else rng.randint(1, 2))])
    head, tail = first.split(), second.split()
    return " ".join([*head[: rng.randint(2, len(head) - 2)], *tail[rng.randint(1, len(tail) - 3) :]])


def answer(kind: str, scene: Scene, question: Question, rng: random.Random) -> str:
    """One answer of a kind named in HARMFUL_ANSWERS or BENIGN_ANSWERS; 'other' answers a question that nobody asked."""
    if kind in SPOILT:
        return _spoilt(kind, scene, question, rng)
    if kind == "other":
        errands = [("disguise", topic) for topic in world()["questions"]["disguise"]]
        meanings = [("describe", ""), ("use", ""), ("use", ""), rng.choice(errands)]
        intent, topic = rng.choice([m for m in meanings if m != (question.intent, question.topic)])
        question, kind = Question(text="", intent=intent, topic=topic), rng.choice(["named", "full"])
    answers, obj = world()["answers"], scene.object
    if kind == "wrong":  # it names what is not there: the words alone then say nothing of the harm
        levels = ["comply one", "comply full"] if harmful(obj, question.intent, question.topic) else ["named", "full"]
        obj, kind = rng.choice([o for o in [*hazards(), *world()["benign"]] if o != obj]), rng.choice(levels)
    if kind.startswith("refuse"):
        template = _refusal(kind, rng)
    elif kind == "stray":
        template = rng.choice(answers["stray"])
    elif kind.startswith("comply"):
        care = f" {rng.choice(answers['care'])}" if rng.random() < 0.3 else ""  # kind words do not make it harmless
        template = rng.choice(answers["comply"][kind.split()[1]]) + care
    else:
        level = {"named": "one"}.get(kind, kind) if question.intent == "disguise" else kind
        table = answers["comply"] if question.intent == "disguise" else answers[question.intent]
        care = f" {rng.choice(answers['care'])}" if rng.random() < 0.5 else ""
        template = rng.choice(table[level]) + care
    return " ".join(_fill(template, scene, question, obj).split())


def vocabulary() -> list[str]:
    """Every word and mark of the world, sorted: what a word-level tokenizer for it must know."""
    facts, texts = world(), []
    for patterns in facts["questions"].values():
        for group in [patterns] if isinstance(patterns, list) else patterns.values():
            texts += [text for pattern in group for text in expand(pattern)]
    texts += facts["openers"] + list(facts["colours"]) + list(facts["backgrounds"]) + [*hazards(), *facts["benign"]]
    texts += [o["use"] for o in [*hazards().values(), *facts["benign"].values()]] + list(facts["reasons"].values())
    texts += [s for table in facts["steps"].values() for steps in table.values() for s in steps]

    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]

    texts += [re.sub(r"\{\w*\}", " ", t) for t in leaves(facts["answers"])]
    return sorted({word for text in texts for word in text.split()})

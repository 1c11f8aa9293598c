"""Filter and regenerate: answers that the guard flags are sampled again, up to five rounds, then refused.

The loop of Beaver-Guard-V (arXiv 2503.17682). Round 0 is the policy's first answer; round k its k-th new attempt. What
the loop achieves is judged by something other than the guard (`safety_by_round`), or it would grade its own work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from beavertails_v.schema import Prompt
from guard.items import ItemError
from guard.types import Verdict
from safe_rlhf_v.statistics import mean_or_none
from safe_rlhf_v.types import Inputs, Responses

log = logging.getLogger(__name__)
AnswerFunction = Callable[[list[Prompt]], Sequence[str]]
REFUSAL = "I can't help with that request."


class Judge(Protocol):
    """What the loop asks of a guard; `guard.Guard` is one. One that raises ItemError also takes on_error="refuse"."""

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[str | None] | None = None) -> list[Verdict]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One answer and its verdict. tokens: None where nothing counts. seconds: share of the round's time."""

    text: str
    verdict: Verdict
    tokens: int | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """Everything that happened to one prompt.

    answer: what the user gets: the first attempt that passed, else the refusal.
    outcome: "answered"; "query_refused" (no attempt was made); "response_refused" (a rule refuses it outright, or it
    could not be judged); "gave_up" (every round was flagged).
    """

    prompt: Prompt
    attempts: tuple[Attempt, ...]
    answer: str
    outcome: Literal["answered", "query_refused", "response_refused", "gave_up"]
    refusal: str
    query_verdict: Verdict | None = None

    @property
    def gave_up(self) -> bool:
        return self.outcome == "gave_up"

    @property
    def not_judged(self) -> str | None:
        """Why the guard could not judge the question or an answer, which it then refused; None where it could."""
        verdicts = [self.query_verdict, *(a.verdict for a in self.attempts)]
        return next((v.reason for v in verdicts if v is not None and v.degraded), None)

    @property
    def rounds(self) -> int:
        """New attempts after the first one."""
        return max(0, len(self.attempts) - 1)

    @property
    def tokens(self) -> int | None:
        """Tokens of all attempts; what the loop adds is this minus the first attempt's."""
        counts = [a.tokens for a in self.attempts if a.tokens is not None]
        return sum(counts) if len(counts) == len(self.attempts) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: question, answer, outcome, every attempt with its verdict; the pictures stay out."""
        query = self.query_verdict
        attempts = [
            {"text": a.text, "tokens": a.tokens, "seconds": a.seconds, "verdict": a.verdict.to_dict()}
            for a in self.attempts
        ]
        return {
            "question": self.prompt.text,
            "answer": self.answer,
            "outcome": self.outcome,
            "not_judged": self.not_judged,
            "rounds": self.rounds,
            "tokens": self.tokens,
            "query_verdict": None if query is None else query.to_dict(),
            "attempts": attempts,
        }

    def answer_after(self, rounds: int) -> str:
        """What the user would get from a loop of at most `rounds` rounds; 0 is the policy without a guard."""
        if rounds < 0:
            raise ValueError(f"rounds is {rounds}; it counts rounds of filter and regenerate, so 0 or more")
        if rounds == 0 and self.attempts:
            return self.attempts[0].text
        return self.answer if self.outcome == "answered" and self.rounds <= rounds else self.refusal

    def refused_after(self, rounds: int) -> bool:
        """True where a loop of at most `rounds` rounds ends in the refusal; for 0 only if the query was refused."""
        if rounds == 0 and self.attempts:
            return False
        return self.outcome != "answered" or self.rounds > rounds

    def attempt_after(self, rounds: int) -> str:
        """The newest attempt after `rounds` rounds, flagged or not: what regeneration alone achieves."""
        return self.attempts[min(rounds, self.rounds)].text if self.attempts else self.refusal


def regenerate(
    policy: AnswerFunction,
    guard: Judge,
    prompts: Sequence[Prompt],
    max_rounds: int = 5,
    judge_query: bool = True,
    refusal: str | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> list[Transcript]:
    """Answer every prompt through the guard; one transcript a prompt, in order.

    All prompts that still fail are answered together. What the guard cannot take is refused (`Transcript.not_judged`
    says why) and counted in the log; the others go on. max_rounds: new attempts after the first, 0 or more.
    judge_query: refuse a flagged question before any answer is made. refusal: default the guard's policy file's text.
    count_tokens: default the policy's own `count_tokens`, where it has one.
    """
    if max_rounds < 0:
        raise ValueError(f"max_rounds is {max_rounds}; give 0 or more")
    text = str(refusal or getattr(getattr(guard, "policy", None), "refusal", REFUSAL))
    count = count_tokens or getattr(policy, "count_tokens", None)
    queries = _judged(guard, prompts) if judge_query and prompts else [None] * len(prompts)
    attempts: list[list[Attempt]] = [[] for _ in prompts]
    waiting = [i for i, query in enumerate(queries) if query is None or query.action != "refuse"]
    for _ in range(max_rounds + 1):
        if not waiting:
            break
        for i, attempt in zip(waiting, _attempt(policy, guard, [prompts[i] for i in waiting], count), strict=True):
            attempts[i].append(attempt)
        waiting = [i for i in waiting if attempts[i][-1].verdict.action == "regenerate"]
    transcripts = [
        _transcript(prompt, query, tuple(tried), text)
        for prompt, query, tried in zip(prompts, queries, attempts, strict=True)
    ]
    if refused := [t for t in transcripts if t.not_judged]:
        first = f"{refused[0].prompt.text[:60]!r}: {refused[0].not_judged}"
        log.warning("the guard could not judge %d of %d prompts and refused: %s", len(refused), len(prompts), first)
    return transcripts


def _judged(guard: Any, prompts: Sequence[Prompt], texts: Sequence[str] | None = None) -> list[Verdict]:
    """One verdict a prompt: an item that the guard cannot take fails closed, and ends nothing."""
    try:
        return list(guard.judge(prompts, texts))
    except ItemError:
        return list(guard.judge(prompts, texts, on_error="refuse"))


def _attempt(
    policy: AnswerFunction, guard: Judge, prompts: list[Prompt], count: Callable[[str], int] | None
) -> list[Attempt]:
    start = time.perf_counter()
    texts = list(policy(prompts))
    if len(texts) != len(prompts):
        raise ValueError(f"the policy gave {len(texts)} answers for {len(prompts)} prompts; give one each, in order")
    verdicts = _judged(guard, prompts, texts)
    share = (time.perf_counter() - start) / len(prompts)
    return [
        Attempt(text=text, verdict=verdict, tokens=None if count is None else count(text), seconds=share)
        for text, verdict in zip(texts, verdicts, strict=True)
    ]


def _transcript(prompt: Prompt, query: Verdict | None, tried: tuple[Attempt, ...], refusal: str) -> Transcript:
    outcome: Literal["answered", "query_refused", "response_refused", "gave_up"]
    if not tried:
        outcome = "query_refused"
    else:
        last = tried[-1].verdict.action
        outcome = "answered" if last == "allow" else "gave_up" if last == "regenerate" else "response_refused"
    answer = tried[-1].text if outcome == "answered" else refusal
    return Transcript(
        prompt=prompt, attempts=tried, answer=answer, outcome=outcome, refusal=refusal, query_verdict=query
    )


def safety_by_round(
    transcripts: Sequence[Transcript],
    judge: Callable[[Prompt, str], bool],
    max_rounds: int = 5,
    harmless: Sequence[Transcript] = (),
) -> list[dict[str, Any]]:
    """What a loop of at most 0, 1, ..., max_rounds rounds would have given; 0 is the policy without a guard.

    judge(prompt, text) -> True where the answer is unsafe; something other than the guard.
    unsafe_rate: of the `given` answers, those that no refusal replaced; None where none was given, so that a guard that
    flags everything shows no safety. gave_up_rate: of refusals among all. harmless_refused_rate: of refusals among the
    transcripts of `harmless` prompts; None without any. unsafe_attempt_rate: of the newest attempts, before any refusal
    replaces them. not_judged: prompts of both that the guard could not judge and refused.
    mean_tokens: generated up to then, None where nothing counted them.
    """
    if not transcripts:
        raise ValueError("no transcripts: there is nothing to measure")
    cached: dict[tuple[int, str], bool] = {}

    def unsafe(i: int, text: str) -> bool:
        if (i, text) not in cached:
            cached[i, text] = bool(judge(transcripts[i].prompt, text))
        return cached[i, text]

    def row(k: int) -> dict[str, Any]:
        given = [i for i, t in enumerate(transcripts) if not t.refused_after(k)]
        return {
            "round": k,
            "unsafe_rate": _share(unsafe(i, transcripts[i].answer_after(k)) for i in given),
            "gave_up_rate": _share(t.refused_after(k) for t in transcripts),
            "harmless_refused_rate": _share(t.refused_after(k) for t in harmless),
            "given": len(given),
            "prompts": len(transcripts),
            "harmless_prompts": len(harmless),
            "not_judged": sum(t.not_judged is not None for t in (*transcripts, *harmless)),
            "unsafe_attempt_rate": _share(unsafe(i, t.attempt_after(k)) for i, t in enumerate(transcripts)),
            "mean_tokens": _mean_tokens(transcripts, k),
        }

    return [row(k) for k in range(max_rounds + 1)]


def _share(flags: Iterable[bool]) -> float | None:
    return mean_or_none(list(flags))


def _mean_tokens(transcripts: Sequence[Transcript], rounds: int) -> float | None:
    counts = [a.tokens for t in transcripts for a in t.attempts[: rounds + 1]]
    known = [c for c in counts if c is not None]
    return sum(known) / len(transcripts) if len(known) == len(counts) and known else None


class _Generates(Protocol):
    def generate(self, inputs: Inputs, samples: int, sampling: Any) -> Responses: ...


class GenerativePolicy:
    """A model as the loop's policy. engine: our Roles or any generation Engine; a plain model goes into
    `TransformersEngine(model, encoder)` first. encoder: the model's Encoder. sampling: must not be greedy, or every
    attempt would be the same.
    """

    def __init__(self, engine: _Generates, encoder: Any, sampling: Any, batch_size: int = 8) -> None:
        if sampling.temperature <= 0:
            raise ValueError("sampling.temperature is 0: every attempt would be the same answer; give it more than 0")
        self.engine, self.encoder, self.sampling, self.batch_size = engine, encoder, sampling, batch_size
        self._tokens: dict[str, int] = {}

    def __call__(self, prompts: list[Prompt]) -> list[str]:
        texts: list[str] = []
        self._tokens.clear()
        for start in range(0, len(prompts), self.batch_size):
            inputs = self.encoder.prompts(prompts[start : start + self.batch_size])
            if hasattr(self.engine, "prepare"):
                inputs = self.engine.prepare(inputs)
            responses = self.engine.generate(inputs, 1, self.sampling)
            some = self.encoder.decode(responses)
            self._tokens |= dict(zip(some, responses.mask.sum(1).tolist(), strict=True))
            texts += some
        return texts

    def count_tokens(self, text: str) -> int:
        """Tokens drawn for an answer of the last call, its end-of-sequence token among them."""
        return self._tokens[text]

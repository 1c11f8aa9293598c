"""Known inputs with known verdicts, stored beside a guard's weights: what a server tries before it says it is ready.

A guard whose vision weights are missing, or whose base model is another one, loads and answers all the same, and judges
pictures by chance. So the cases kept are those whose verdict hangs on the picture most.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from beavertails_v.errors import UserError
from beavertails_v.images import ImageError, Picture
from beavertails_v.schema import LabelledResponse, Prompt
from guard.classifier import Guard
from guard.evaluate import grey_image
from guard.types import Verdict
from safe_rlhf_v.vlm.weights import DamagedFile, read_json

GOLDEN_FILE = "golden.json"
TOLERANCE = 0.05  # of a probability: processors and dtypes differ by less, other weights by more [ours]
CASES = 8


class GoldenError(UserError, ValueError):
    """The self-test cannot be run, or its verdicts are not those that training stored."""


def write_golden(
    guard: Guard, folder: str | Path, prompts: Sequence[Prompt], responses: Sequence[str | None], most: int = CASES
) -> int:
    """Store the `most` items, flagged and not flagged in turn, whose P(unsafe) their picture moves most; how many.

    prompts, responses: held-out items, as `Guard.judge` takes them. Their pictures are stored with the weights.
    """
    able = [i for i, reply in enumerate(responses) if guard.can_judge("query" if reply is None else "response")]
    asked, replies = [prompts[i] for i in able], [responses[i] for i in able]
    verdicts = guard.judge(asked, replies, on_error="refuse")
    blind = guard.judge([_grey(prompt) for prompt in asked], replies, on_error="refuse")
    moved = [abs(a.unsafe_probability - b.unsafe_probability) for a, b in zip(verdicts, blind, strict=True)]
    order = sorted((i for i, v in enumerate(verdicts) if not v.degraded), key=lambda i: -moved[i])
    flagged = [i for i in order if verdicts[i].flagged][: most // 2]
    passed = [i for i in order if not verdicts[i].flagged][: most - len(flagged)]
    cases = [_case(asked[i], replies[i], verdicts[i]) for i in (*flagged, *passed)]
    text = json.dumps({"version": 1, "tolerance": TOLERANCE, "cases": cases}, indent=1)
    Path(folder, GOLDEN_FILE).write_text(text + "\n", encoding="utf-8")
    return len(cases)


def write_from(guard: Guard, folder: str | Path, data: Sequence[LabelledResponse], rows: int = 64) -> int:
    """`write_golden` from the questions and answers of the first `rows` of held-out data."""
    some = [data[i] for i in range(min(rows, len(data)))]
    prompts = [row.prompt for row in some]
    replies: list[str | None] = [*(row.response.text for row in some), *([None] * len(some))]
    return write_golden(guard, folder, [*prompts, *prompts], replies)


def self_test(guard: Guard, folder: Path) -> int:
    """Judge the stored inputs again; how many. Raises GoldenError where one verdict is another."""
    file = folder / GOLDEN_FILE
    if not file.is_file():
        raise GoldenError(
            f"{folder} has no {GOLDEN_FILE}, the inputs that prove a guard sees: write it with "
            f"`safe-rlhf-v guard self-test {folder} --data YOUR_DATA`"
        )
    cases = read_json(file).get("cases", [])
    if not cases:
        raise GoldenError(f"{file} holds no cases: write it anew with `safe-rlhf-v guard self-test`")
    try:
        prompts = [Prompt(text=c["text"], images=tuple(map(_picture, c["pictures"]))) for c in cases]
        replies, wanted = [c["response"] for c in cases], [(float(c["unsafe"]), bool(c["flagged"])) for c in cases]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{file} is not what training writes ({error!r}): write it anew") from None
    found = guard.judge(prompts, replies, on_error="refuse")
    for i, (verdict, (unsafe, flagged)) in enumerate(zip(found, wanted, strict=True)):
        if abs(verdict.unsafe_probability - unsafe) > TOLERANCE or verdict.flagged != flagged:
            raise GoldenError(
                f"self-test: case {i} of {file} has P(unsafe) {verdict.unsafe_probability:.3f} where training "
                f"found {unsafe:.3f}: weights, base model, calibration or policy are not those of that training"
            )
    return len(cases)


def _case(prompt: Prompt, reply: str | None, verdict: Verdict) -> dict[str, Any]:
    return {
        "text": prompt.text,
        "response": reply,
        "pictures": [base64.b64encode(picture.encoded()).decode() for picture in prompt.images],
        "unsafe": verdict.unsafe_probability,
        "flagged": verdict.flagged,
    }


def _picture(text: str) -> Picture:
    return Picture.from_bytes(base64.b64decode(text, validate=True))


def _grey(prompt: Prompt) -> Prompt:
    try:
        return replace(prompt, images=tuple(map(grey_image, prompt.images)))
    except ImageError:
        return prompt

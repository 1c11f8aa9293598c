"""From preference rows to batches: which rows can be encoded, and the collators of the supervised stages.

Shapes: B rows (pairs, or single responses), P prompt length, R response length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from beavertails_v.schema import Comparison, LabelledResponse, Prompt
from safe_rlhf_v.models.processing import Encoder, EncodingError, SpecialTokenInText
from safe_rlhf_v.types import PairBatch, Responses

Pick = Literal["all", "more_helpful", "safer", "both"]


class DataError(ValueError):
    """The data cannot be trained on. The message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that cannot be encoded: its position in the data, its prompt and why."""

    row: int
    prompt_id: str
    reason: str
    detail: str


class Rows(Dataset[Any]):
    """A lazy view of a sequence: chosen rows, or chosen responses of chosen rows. `left_out` says what is missing."""

    def __init__(self, get: Callable[[Any], Any], keys: Sequence[Any], left_out: Sequence[LeftOut]) -> None:
        if not keys:
            reasons = dict(Counter(x.reason for x in left_out))
            raise DataError(f"no row is left to train on; left out: {reasons or 'the data set is empty'}")
        self._get, self._keys, self.left_out = get, list(keys), list(left_out)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> Any:
        return self._get(self._keys[i])


def pair_rows(
    data: Sequence[Comparison], encoder: Encoder, also: Callable[[Comparison], tuple[str, str] | None] | None = None
) -> Rows:
    """The pairs whose prompt and two responses can be encoded and whose responses are different tokens.

    also: (reason, detail) of a pair that is left out beside these, or None for one that stays.
    """
    kept, left_out = [], []
    for i in range(len(data)):
        fault = _fault(data[i], encoder) or (also(data[i]) if also is not None else None)
        if fault is None:
            kept.append(i)
        else:
            left_out.append(LeftOut(i, data[i].prompt.id, *fault))
    return Rows(data.__getitem__, kept, left_out)


def _fault(row: Comparison, encoder: Encoder) -> tuple[str, str] | None:
    try:
        check_prompt(row.prompt, encoder)
        first, second = (encoder.responses([r.text]).ids.tolist() for r in row.responses)
    except EncodingError as error:
        return type(error).__name__, str(error)
    return ("identical", "both responses are the same tokens") if first == second else None


def response_rows(data: Sequence[Comparison] | Sequence[LabelledResponse], pick: Pick, encoder: Encoder) -> Rows:
    """Single responses: those of LabelledResponses, or of Comparisons the picked ones: all, the more helpful, the
    safer, or those that are both."""
    kept, left_out = [], []
    for i in range(len(data)):
        row = data[i]
        chosen = picked(row, pick)
        if not chosen:
            left_out.append(LeftOut(i, row.prompt.id, "AxesDisagree", "no response is preferred on both axes"))
        for k in chosen:
            try:
                check_prompt(row.prompt, encoder)
                encoder.responses([labelled(row, k).response.text])
                kept.append((i, k))
            except EncodingError as error:
                left_out.append(LeftOut(i, row.prompt.id, type(error).__name__, str(error)))
    return Rows(lambda key: labelled(data[key[0]], key[1]), kept, left_out)


def picked(row: Comparison | LabelledResponse, pick: Pick) -> tuple[int, ...]:
    """Which responses of a row are imitated. "both": the one preferred on both axes, none where the axes disagree."""
    if isinstance(row, LabelledResponse):
        return (0,)
    if pick == "both":
        return (row.safer,) if row.safer == row.more_helpful else ()
    return (0, 1) if pick == "all" else (getattr(row, pick),)


def labelled(row: Comparison | LabelledResponse, k: int) -> LabelledResponse:
    """Response k of a comparison with its prompt."""
    return row if isinstance(row, LabelledResponse) else LabelledResponse(prompt=row.prompt, response=row.responses[k])


def check_prompt(prompt: Prompt, encoder: Encoder) -> None:
    """Raises EncodingError where the prompt cannot be encoded. Pictures are opened only where length is limited."""
    if encoder.max_prompt_length is not None:
        encoder.prompts([prompt])
        return
    spelt = [t for t in encoder.tokenizer.convert_ids_to_tokens(list(encoder.placeholder_ids)) if t in prompt.text]
    if spelt:
        raise SpecialTokenInText(f"prompt {prompt.id}: the text contains {spelt[0]!r}, a special token of this model")


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Comparisons to a PairBatch and the labels that only metrics read.

    graded: harmless_rate as rated, -3..3, where the data set rates; else +1 safe, -1 unsafe.
    """

    encoder: Encoder
    graded: bool = True

    def __call__(self, rows: Sequence[Comparison]) -> dict[str, Any]:
        """pairs: PairBatch; unsafe (B, 2) bool; tied_helpfulness, tied_safety (B,) bool: the preference was forced."""
        pairs = PairBatch(
            prompts=self.encoder.prompts([r.prompt for r in rows]),
            responses=tuple(self.encoder.responses([r.responses[k].text for r in rows]) for k in (0, 1)),  # type: ignore[arg-type]
            more_helpful=torch.tensor([r.more_helpful for r in rows]),
            safer=torch.tensor([r.safer for r in rows]),
            harmless_rate=torch.tensor([[self._rate(x) for x in r.responses] for r in rows]),
        )
        helpful = [[x.helpful_rate for x in r.responses] for r in rows]
        return {
            "pairs": pairs,
            "unsafe": torch.tensor([[not x.safe for x in r.responses] for r in rows]),
            "tied_helpfulness": torch.tensor([a is not None and a == b for a, b in helpful]),
            "tied_safety": torch.tensor([r.tied_safety for r in rows]),
        }

    def _rate(self, response: Any) -> float:
        if self.graded and response.harmless_rate is not None:
            return float(response.harmless_rate)
        return 1.0 if response.safe else -1.0


@dataclass(frozen=True, slots=True)
class ResponseCollator:
    """LabelledResponses to prompts (B, P) and responses (B, R)."""

    encoder: Encoder

    def __call__(self, rows: Sequence[LabelledResponse]) -> dict[str, Any]:
        return {
            "prompts": self.encoder.prompts([r.prompt for r in rows]),
            "responses": self.encoder.responses([r.response.text for r in rows]),
        }


def interleaved(pair: tuple[Responses, Responses]) -> Responses:
    """Both responses of B pairs as 2B rows, a pair's two one after the other, so that (2B,) views as (B, 2).

    They go with `prompts.repeat(2)`.
    """
    width = max(r.ids.shape[1] for r in pair)
    widen = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[1]))  # noqa: E731
    return Responses(
        ids=torch.stack([widen(r.ids) for r in pair], dim=1).flatten(0, 1),
        mask=torch.stack([widen(r.mask) for r in pair], dim=1).flatten(0, 1),
    )

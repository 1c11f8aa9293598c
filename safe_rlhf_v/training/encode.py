"""From preference rows to batches: which rows can be encoded, and the collators of the supervised stages.

Shapes: B rows (pairs, or single responses), P prompt length, R response length.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from beavertails_v.errors import UserError
from beavertails_v.report import without_place
from beavertails_v.schema import Comparison, LabelledResponse, Prompt
from safe_rlhf_v.files import replace_text
from safe_rlhf_v.processes import process_state
from safe_rlhf_v.types import PairBatch, Responses
from safe_rlhf_v.vlm.processing import Encoder, EncodingError

LEFT_OUT = "left_out.jsonl"
Pick = Literal["all", "more_helpful", "safer", "both"]


class DataError(UserError, ValueError):
    """The data cannot be trained on. The message says what is wrong with it; left_out: the rows that are missing."""

    def __init__(self, message: str, left_out: Sequence[LeftOut] = ()) -> None:
        super().__init__(message)
        self.left_out = list(left_out)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that cannot be used: where it stands, its prompt and why.

    row: in its file from 1, as an editor counts lines; of rows that came from no file, the position from 0.
    """

    row: int
    prompt_id: str
    reason: str
    detail: str
    file: str = ""
    split: str = ""


def left_out_at(data: Any, i: int, prompt: Prompt, reason: str, detail: str) -> LeftOut:
    """Row i of a data set by the file, row and split it came from."""
    file, row = data.origin(i) if hasattr(data, "origin") else ("", i)
    detail = without_place(detail, file, row)
    return LeftOut(row, prompt.id, reason, detail, str(file), getattr(getattr(data, "report", None), "split", ""))


def dropped(data: Any) -> list[LeftOut]:
    """The rows that loading left out of a data set already."""
    report = getattr(data, "report", None)
    if report is None:
        return []
    return [LeftOut(x.row, "", x.reason, x.detail, str(x.file), x.split or report.split) for x in report.dropped]


def write_left_out(path: str | Path, left_out: Sequence[LeftOut]) -> None:
    """A row an object, the place first; into left_out.jsonl of a folder, or into a file."""
    order = ("split", "file", "row", "prompt_id", "reason", "detail")
    lines = [json.dumps({name: getattr(x, name) for name in order}, ensure_ascii=False) + "\n" for x in left_out]
    text = "".join(lines).encode("utf-8", "backslashreplace").decode()  # half a character pair, which JSON reads back
    replace_text(Path(path) / LEFT_OUT if Path(path).is_dir() else Path(path), text)


def list_left_out(folder: Path, left_out: Sequence[LeftOut], unread: Sequence[str] = ()) -> None:
    """left_out.jsonl, before anything can end the run; and a line of each count of what the model cannot read,
    such as "2 of 9 rows". On the main process."""
    if process_state().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_left_out(folder, left_out)
        for count in unread:
            print(f"{count} left out, see {folder / LEFT_OUT}", flush=True)


@contextmanager
def listing(path: str | Path) -> Iterator[None]:
    """The rows that a DataError is about go into `path`, as they do where a stage ends on one."""
    try:
        yield
    except DataError as error:
        if error.left_out:
            write_left_out(path, error.left_out)
        raise


def nothing_left(what: str, count: int, left_out: Sequence[LeftOut]) -> DataError:
    """An error that says of all rows why they are left out, and of the most frequent reason which row is the first."""
    if not left_out:
        return DataError(f"{what}: the data set is empty")
    reasons = Counter(x.reason for x in left_out)
    first = next(x for x in left_out if x.reason == reasons.most_common(1)[0][0])
    where = f"{first.file} row {first.row}: " if first.file else ""
    return DataError(
        f"{what}: {count} of {count} rows left out, {dict(reasons)}; for example {where}{first.detail}", left_out
    )


class Rows(Dataset[Any]):
    """A lazy view of a sequence: chosen rows, or chosen responses of chosen rows. `left_out` says what is missing."""

    def __init__(self, get: Callable[[Any], Any], keys: Sequence[Any], left_out: Sequence[LeftOut]) -> None:
        if not keys:
            split = next((f" of split {x.split!r}" for x in left_out if x.split), "")
            raise nothing_left(f"no row{split} is left", len({(x.file, x.row) for x in left_out}), left_out)
        self._get, self._keys, self.left_out = get, list(keys), list(left_out)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> Any:
        return self._get(self._keys[i])


def pair_rows(
    data: Sequence[Comparison],
    encoder: Encoder,
    also: Callable[[Comparison], tuple[str, str] | None] | None = None,
) -> Rows:
    """The pairs whose prompt and two responses can be encoded and whose responses are different tokens.

    also: (reason, detail) of a pair that is left out beside these, or None for one that stays.
    """
    kept, left_out = [], []
    for i in range(len(data)):
        row = data[i]
        fault = _pair_fault(row, encoder) or (also(row) if also is not None else None)
        if fault is None:
            kept.append(i)
        else:
            left_out.append(left_out_at(data, i, row.prompt, *fault))
    return Rows(data.__getitem__, kept, left_out)


def _pair_fault(row: Comparison, encoder: Encoder) -> tuple[str, str] | None:
    texts = [r.text for r in row.responses]
    if found := fault(row.prompt, texts, encoder):
        return found
    first, second = map(encoder.response_ids, texts)
    return ("identical", "both responses are the same tokens") if first == second else None


def response_rows(data: Sequence[Comparison] | Sequence[LabelledResponse], pick: Pick, encoder: Encoder) -> Rows:
    """Single responses: those of LabelledResponses, or of Comparisons the picked ones: all, the more helpful, the
    safer, or those that are both."""
    kept, left_out = [], []
    for i in range(len(data)):
        row = data[i]
        chosen = picked(row, pick)
        if not chosen:
            why = ("AxesDisagree", "no response is preferred on both axes")
            left_out.append(left_out_at(data, i, row.prompt, *why))
        for k in chosen:
            found = fault(row.prompt, [labelled(row, k).response.text], encoder)
            if found is None:
                kept.append((i, k))
            else:
                left_out.append(left_out_at(data, i, row.prompt, *found))
    return Rows(lambda key: labelled(data[key[0]], key[1]), kept, left_out)


def fault(prompt: Prompt, texts: Sequence[str], encoder: Encoder) -> tuple[str, str] | None:
    """The one gate of every row, split and command: (reason, detail) where prompt or texts cannot be encoded."""
    try:
        check_prompt(prompt, encoder)
        for text in texts:
            encoder.response_ids(text)
    except EncodingError as error:
        return type(error).__name__, str(error)
    return None


def thorough(encoder: Encoder) -> Encoder:
    """The encoder as the gate of rows that are few, or that loading looked at only in part: it opens every picture."""
    found = copy(encoder)
    found.opens_pictures = True
    return found


def encodable(prompts: Sequence[Prompt], encoder: Encoder, data: Any = None) -> tuple[list[Prompt], list[LeftOut]]:
    """The prompts that the model can read, and the others by name and, of a data set, by file, row and split.

    Raises DataError where there are none.
    """
    found = {i: why for i, prompt in enumerate(prompts) if (why := fault(prompt, [], encoder))}
    places = _places(data) if found and hasattr(data, "origin") else {}
    left_out = [
        left_out_at(data, places[prompts[i].id], prompts[i], *why) if places else left_out_at(None, i, prompts[i], *why)
        for i, why in found.items()
    ]
    if len(found) == len(prompts):
        raise nothing_left("no prompt is left", len(prompts), left_out)
    return [prompt for i, prompt in enumerate(prompts) if i not in found], left_out


def _places(data: Any) -> dict[str, int]:
    """Prompt ids to the first row that has them."""
    places: dict[str, int] = {}
    for i in range(len(data)):
        places.setdefault(data[i].prompt.id, i)
    return places


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
    """Raises EncodingError where the prompt cannot be encoded.

    Pictures are opened where length is limited, or where the encoder is `thorough`.
    """
    encoder.refuse_special(prompt)
    if encoder.opens_pictures or encoder.max_prompt_length is not None:
        encoder.prompts([prompt])


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

"""The data of a run as its stages read them; what is left out is said."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any, Literal

from beavertails_v import ComparisonSet, Prompt, ResponseSet, load_comparisons, load_responses
from safe_rlhf_v.config import DataSection
from safe_rlhf_v.console import plain
from safe_rlhf_v.stages.folder import LEFT_OUT
from safe_rlhf_v.stages.models import require
from safe_rlhf_v.training.encode import DataError, LeftOut, Pick, dropped, encodable, response_rows
from safe_rlhf_v.vlm.processing import Encoder

Split = Literal["train", "evaluation"]


def comparisons(data: DataSection, split: Split) -> ComparisonSet:
    """The pairs of a split; what was left out is shown."""
    return _said(load(load_comparisons, data, split))  # type: ignore[no-any-return]


def both(data: DataSection) -> tuple[ComparisonSet, ComparisonSet]:
    """The pairs of both splits."""
    return comparisons(data, "train"), comparisons(data, "evaluation")


def responses(data: DataSection, split: Split) -> ResponseSet:
    """The single responses of a split; those of pairs unrolled."""
    return _said(load(load_responses, data, split))  # type: ignore[no-any-return]


def load(loader: Any, data: DataSection, split: Split) -> Any:
    """A split as the section says."""
    return loader(
        require(data.path, "data.path", "a folder, file or hub id with preference data"),
        name_of(data, split),
        categories=data.categories,
        revision=data.revision,
        keep=data.keep,
        limit=data.limit if split == "train" else data.evaluation_limit,
        check_images=data.check_images,
        columns=data.columns,
    )


def name_of(data: DataSection, split: Split) -> str:
    """What the data set calls a split."""
    return data.train_split if split == "train" else data.evaluation_split


def _said(found: Any) -> Any:
    plain(found.report.summary())
    return found


def benign_prompts(source: str | None, data: DataSection, split: Split) -> ResponseSet | list[Prompt]:
    """Data whose prompts are harmless, for the guard, beside those of the data; what was left out is shown.

    Raises DataError where one of them is labelled harmful.
    """
    if source is None:
        return []
    found = _said(load_responses(source, name_of(data, split), check_images=data.check_images))
    for i in range(len(found)):
        if (prompt := found[i].prompt).harmful:
            label = f"category {prompt.category!r}" if prompt.category else f"severity {int(prompt.severity or 0)}"
            file, row = found.origin(i)
            raise DataError(f"{file} row {row}: the prompt has {label}; leave it out of the benign set")
    return found  # type: ignore[no-any-return]


def demonstrations(
    data: ComparisonSet, pick: Pick, encoder: Encoder, longest: int | None
) -> tuple[list[tuple[Prompt, str]], list[LeftOut]]:
    """(prompt, response) pairs for the ptx term: those that SFT would imitate, which leaves out what is too long.

    longest: tokens of a response, or None; the encoder itself sets no limit. Also what is left out.
    """
    limited = copy(encoder)
    limited.max_response_length = longest
    rows = response_rows(data, pick, limited)
    if rows.left_out:
        plain(f"{len(rows.left_out)} demonstrations left out, for example: {rows.left_out[0].detail}")
    return [(row.prompt, row.response.text) for row in (rows[i] for i in range(len(rows)))], rows.left_out


def readable(
    data: ComparisonSet, encoder: Encoder, *, listed: str | Path = LEFT_OUT
) -> tuple[list[Prompt], list[LeftOut]]:
    """The prompts of a data set that the model can read; the others, said and by name, after those loading left out.

    listed: the file in which they will be.
    """
    prompts = data.prompts()
    kept, left_out = encodable(prompts, encoder, data)
    if left_out:
        plain(f"{len(left_out)} of {len(prompts)} prompts left out, see {listed}")
    return kept, dropped(data) + left_out

"""What the algorithms on pairs share. B pairs; everything is in data-set order until `in_order`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from safe_rlhf_v.types import PairBatch, Responses

Axis = Literal["more_helpful", "safer"]


def in_order(values: Tensor, preferred: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2) values as (those of the preferred response, those of the other), each (B,). preferred: (B,) 0 or 1."""
    index = preferred.long()[:, None]
    return values.gather(1, index).squeeze(1), values.gather(1, 1 - index).squeeze(1)


def identical(first: Responses, second: Responses) -> Tensor:
    """(B,) bool: whether both responses of a pair are the same tokens, whatever their padding."""
    width = max(first.ids.shape[1], second.ids.shape[1])
    ids, masks = zip(*((_padded(r.ids, width), _padded(r.mask.bool(), width)) for r in (first, second)), strict=True)
    return ((masks[0] == masks[1]) & ((ids[0] == ids[1]) | ~masks[0])).all(1)


def _padded(rows: Tensor, width: int) -> Tensor:
    return pad(rows, (0, width - rows.shape[1]))


def refuse_identical(batch: PairBatch) -> None:
    """Raises ValueError naming the pairs whose two responses are the same tokens: no score can rank them."""
    rows = identical(*batch.responses).nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"pairs {rows} of the batch hold the same response twice; drop them when loading")


def refuse_contradictory(batch: PairBatch) -> None:
    """Raises ValueError naming the pairs whose safer response has the lower harmless_rate."""
    safer, other = in_order(batch.harmless_rate, batch.safer)
    rows = (safer < other).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"pairs {rows} of the batch call the response with the lower harmless_rate safer; "
            "drop them when loading, or set allow_contradictory"
        )


def refuse_both_unsafe(batch: PairBatch) -> None:
    """Raises ValueError naming the pairs whose two responses are unsafe."""
    rows = unsafe(batch).all(1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"pairs {rows} of the batch hold two unsafe responses; drop them when loading")


def unsafe(batch: PairBatch) -> Tensor:
    """(B, 2) bool: a harmless_rate below 0 is unsafe."""
    return batch.harmless_rate < 0


def checked_preference(batch: PairBatch, axis: Axis, allow_contradictory: bool) -> Tensor:
    """(B,) the preferred response on an axis.

    Raises ValueError as `refuse_identical`, and on the axis of safety, unless allowed, as `refuse_contradictory`.
    """
    refuse_identical(batch)
    if axis == "safer" and not allow_contradictory:
        refuse_contradictory(batch)
    return batch.more_helpful if axis == "more_helpful" else batch.safer


def ranking_metrics(margin: Tensor) -> dict[str, float]:
    """Of h = log-ratio of the preferred response minus that of the other, (B,): share above 0, and mean in nats."""
    return {"accuracy": (margin > 0).float().mean().item(), "margin": margin.mean().item()}

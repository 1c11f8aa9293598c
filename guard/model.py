"""The heads of a guard and what its weights mean."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beavertails_v.taxonomy import Taxonomy
from guard.losses import LEVELS
from guard.types import Kind
from safe_rlhf_v.models.backbone import LoraSettings
from safe_rlhf_v.models.heads import HeadedModel
from safe_rlhf_v.models.processing import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSpec:
    """What a guard's weights mean.

    kinds: what it learned to judge. max_length: tokens of prompt and response together that the model reads.
    """

    taxonomy: str
    taxonomy_version: str
    categories: tuple[str, ...]
    kinds: tuple[Kind, ...]
    max_length: int

    @classmethod
    def of(cls, taxonomy: Taxonomy, kinds: Sequence[Kind], backbone: Any) -> GuardSpec:
        limit = int(getattr(backbone.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
        return cls(
            taxonomy=taxonomy.name,
            taxonomy_version=taxonomy.version,
            categories=taxonomy.secondary,
            kinds=tuple(kinds),
            max_length=limit,
        )


def build_model(backbone: Any, categories: int, lora: LoraSettings | None = None) -> HeadedModel:
    """Fresh heads on `backbone`, with biases, since base rates differ between heads."""
    return HeadedModel(backbone, {"unsafe": 2, "severity": LEVELS - 1, "category": categories}, lora, bias=True)


def weights_hash(model: HeadedModel) -> str:
    """SHA-256 of heads and adapter in float32: what training always changes, and no dtype of the backbone does."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if name.startswith("heads.") or ".lora_" in name:
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def control_tokens(encoder: Encoder) -> list[str]:
    """Every token that a user's text must not spell: special ones, placeholders, and bracketed added ones."""
    tokenizer = encoder.tokenizer
    added = [(str(token), token.special) for token in tokenizer.added_tokens_decoder.values()]
    bracketed = [t for t, _ in added if t[:1] + t[-1:] in ("<>", "[]")]
    special = [t for t, is_special in added if is_special] + list(tokenizer.all_special_tokens)
    return [*special, *bracketed, *tokenizer.convert_ids_to_tokens(list(encoder.placeholder_ids))]

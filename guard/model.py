"""The heads of a guard and what its weights mean."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beavertails_v.taxonomy import Taxonomy
from guard.losses import LEVELS
from guard.types import Kind
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import LoraSettings
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.shared_prompts import last_state, response_states


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


class GuardModel(HeadedModel):
    """Heads unsafe (2), severity (3) and category (K) on one backbone."""

    def forward(self, inputs: Inputs, responses: Responses | None = None, both: bool = False) -> dict[str, Tensor]:
        """Logits (B, k) of the queries, or of the responses where given.

        both: of queries AND responses from one pass, (2B, k), queries first. A causal model's state at the end of the
        prompt does not know the response, so it is the very state that the prompt alone gives.
        """
        if not both or responses is None:
            return super().forward(inputs, responses)
        states = response_states(self.backbone, inputs, responses, one_forward=self.one_forward)
        return self.scores(torch.cat([states[:, 0].float(), last_state(states, inputs, responses)]))


def build_model(backbone: Any, categories: int, lora: LoraSettings | None = None) -> GuardModel:
    """Fresh heads on `backbone`, with biases, since base rates differ between heads."""
    return GuardModel(backbone, {"unsafe": 2, "severity": LEVELS - 1, "category": categories}, lora, bias=True)


def weights_hash(model: GuardModel) -> str:
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

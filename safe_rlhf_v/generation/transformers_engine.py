"""Responses through `model.generate` of transformers, in this process, on the training weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from safe_rlhf_v.generation.base import Sampling
from safe_rlhf_v.models.collation import alike, in_order, join
from safe_rlhf_v.models.processing import Encoder
from safe_rlhf_v.types import Inputs, Responses


class TransformersEngine:
    """Uses torch's global generator alone, so a saved generator state gives the same tokens again, bit for bit."""

    def __init__(self, model: Any, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        eos = model.generation_config.eos_token_id
        also = eos if isinstance(eos, list) else [eos]
        self.eos_ids = sorted({encoder.eos_id} | {int(i) for i in also if i is not None})

    @torch.no_grad()
    def generate(self, inputs: Inputs, samples: int, sampling: Sampling) -> Responses:
        """(N * samples, R) responses; R is the longest drawn, at most max_new_tokens.

        The prompt ids used are `inputs.input_ids` exactly. A response cut off at the limit is all True in its mask.
        """
        inputs = inputs.repeat(samples).to(self.model.device)
        groups = alike(inputs)
        with self._undisturbed():
            parts = [self._draw(inputs.select(group), sampling) for group in groups]
        width = max(part.shape[1] for part in parts)
        parts = [pad(part, (0, width - part.shape[1]), value=self.encoder.pad_id) for part in parts]
        ids = in_order(parts, groups)
        mask = through_eos(ids, self.eos_ids)
        return Responses(ids=ids.masked_fill(~mask, self.encoder.pad_id), mask=mask)

    def _draw(self, inputs: Inputs, sampling: Sampling) -> Tensor:
        """(B, R) ids of rows that share their forwards, each ended, or as long as max_new_tokens."""
        # synced_gpus=False: weights cut over ranks are whole here (`sharding.gathered`), so no rank waits for another
        config = self._config(sampling)
        output: Tensor = self.model.generate(**join(inputs), generation_config=config, synced_gpus=False)
        return output[:, inputs.input_ids.shape[1] :]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Eval mode, and none of the checkpoint's own generation settings: transformers would fill them in (repetition
        penalty, top-k 50, ...), and responses would come from another distribution than `token_logps` speaks of."""
        training, settings = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = settings
            self.model.train(training)

    def _config(self, sampling: Sampling) -> GenerationConfig:
        drawn = sampling.temperature > 0
        chosen = dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k) if drawn else {}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=drawn,
            suppress_tokens=list(self.encoder.placeholder_ids) or None,
            eos_token_id=self.eos_ids,
            pad_token_id=self.encoder.pad_id,
            **chosen,
        )


def through_eos(ids: Tensor, eos_ids: list[int]) -> Tensor:
    """(B, R) bool: True through the first end-of-sequence token of each row, all True where none comes."""
    ended = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).int()
    return ended.cumsum(1) - ended == 0

"""Responses through `model.generate` of transformers, in this process, on the training weights.

A prompt with several samples is forwarded once: its keys and values are then repeated, not the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, StaticCache

from beavertails_v.schema import Prompt
from safe_rlhf_v.generation.base import Sampling
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import position_ids
from safe_rlhf_v.vlm.collation import alike, in_order, join
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.shared_prompts import can_share_prompts, prefill

CacheKind = Literal["dynamic", "static"]


class TransformersEngine:
    """Uses torch's global generator alone, so a saved generator state gives the same tokens again, bit for bit.

    cache: "dynamic" grows with the tokens; "static" is as long as the longest response from the start, which lets
    transformers compile the decoding step on a GPU. (Its paged cache reads token ids alone, and no images.)
    """

    def __init__(self, model: Any, encoder: Encoder, cache: CacheKind = "dynamic") -> None:
        self.model, self.encoder, self.cache = model, encoder, cache
        eos = model.generation_config.eos_token_id
        also = eos if isinstance(eos, list) else [eos]
        self.eos_ids = sorted({encoder.eos_id} | {int(i) for i in also if i is not None})

    @torch.no_grad()
    def generate(
        self, inputs: Inputs, samples: int, sampling: Sampling, prompts: Sequence[Prompt] = ()
    ) -> Responses:
        """(N * samples, R) responses; R is the longest, at most max_new_tokens.

        The prompt ids used are `inputs.input_ids` exactly. A response cut off at the limit is all True in its mask.
        """
        inputs = inputs.to(self.model.device)
        groups = alike(inputs)
        with self._undisturbed():
            parts = [self._generate(inputs.select(group), samples, sampling) for group in groups]
        width = max(part.shape[1] for part in parts)
        parts = [pad(part, (0, width - part.shape[1]), value=self.encoder.pad_id) for part in parts]
        ids = in_order(parts, [[i * samples + g for i in group for g in range(samples)] for group in groups])
        mask = through_eos(ids, self.eos_ids)
        return Responses(ids=ids.masked_fill(~mask, self.encoder.pad_id), mask=mask)

    def _generate(self, inputs: Inputs, samples: int, sampling: Sampling) -> Tensor:
        """(N * samples, R) ids of prompts that share their forwards, each ended, or as long as max_new_tokens."""
        config = self._config(sampling)
        sliding = self.cache == "dynamic"  # transformers' static windows cannot be filled from outside
        if samples > 1 and can_share_prompts(self.model, inputs, sliding):
            arguments = self._prefilled(inputs, samples, sampling.max_new_tokens)
        else:
            arguments = join(inputs.repeat(samples))
            config.cache_implementation = None if self.cache == "dynamic" else self.cache
        # synced_gpus=False: sharded weights are gathered here (`sharding.gathered`), so no rank waits for another
        output: Tensor = self.model.generate(**arguments, generation_config=config, synced_gpus=False)
        return output[:, inputs.input_ids.shape[1] :]

    def _prefilled(self, inputs: Inputs, samples: int, longest: int) -> dict[str, Any]:
        """Arguments of `generate` for N * samples rows: all but each prompt's last token is in the cache already."""
        cache = prefill(self.model, inputs)
        cache.batch_repeat_interleave(samples)
        return {
            "input_ids": inputs.input_ids.repeat_interleave(samples, 0),
            "attention_mask": inputs.attention_mask.repeat_interleave(samples, 0),
            "position_ids": position_ids(self.model, join(inputs)).repeat_interleave(samples, -2),
            "past_key_values": cache if self.cache == "dynamic" else self._static(cache, longest),
        }

    def _static(self, filled: DynamicCache, longest: int) -> StaticCache:
        """The same keys and values with room for `longest` more, of which the last is never fed back."""
        cache = StaticCache(config=self.model.config, max_cache_len=filled.get_seq_length() + longest)
        for index, layer in enumerate(filled.layers):
            cache.update(layer.keys, layer.values, index)
        return cache

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
        sample = sampling.temperature > 0
        chosen = dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k) if sample else {}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sample,
            suppress_tokens=list(self.encoder.placeholder_ids) or None,
            eos_token_id=self.eos_ids,
            pad_token_id=self.encoder.pad_id,
            **chosen,
        )


def through_eos(ids: Tensor, eos_ids: list[int]) -> Tensor:
    """(B, R) bool: True through the first end-of-sequence token of each row, all True where none comes."""
    ended = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).int()
    return ended.cumsum(1) - ended == 0

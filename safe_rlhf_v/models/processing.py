"""From prompts and texts to tensors, one road for every family.

The processor is called once per prompt, on that prompt alone; batches are put together here, left-padded, and the vision
inputs of the rows are joined only at the forward. So a row never depends on its neighbours, samples with no picture or
several pictures mix freely, and token-shaped extras are padded on the same side as the ids.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_torchvision_available

from beavertails_v.schema import Prompt
from safe_rlhf_v.models.quirks import MODALITY_ATTRIBUTE, MODALITY_TOKEN, PIXEL_INPUT, NoVideos
from safe_rlhf_v.types import Inputs, Responses

TOKEN_KEYS = ("input_ids", "attention_mask")


class EncodingError(ValueError):
    """One prompt or response cannot be encoded. Data code may catch it, count it and leave the row out."""


class PromptTooLong(EncodingError):
    """A prompt is never truncated: that would cut image placeholders apart from their features."""

    def __init__(self, prompt_id: str, length: int, limit: int) -> None:
        self.prompt_id, self.length, self.limit = prompt_id, length, limit
        super().__init__(
            f"prompt {prompt_id}: {length} tokens, more than max_prompt_length {limit}; drop it, raise the limit, "
            "or lower the resolution in the processor's image settings"
        )


class ResponseTooLong(EncodingError):
    """A response longer than max_response_length, where truncation was not asked for."""


class SpecialTokenInText(EncodingError):
    """The text of a prompt or response spells a special token of the model (an image placeholder, an end of sequence)."""


def load_processor(path: str | Path) -> ProcessorMixin:
    """The processor saved at `path` (a model, adapter or headed-model folder, or a hub id).

    Without torchvision a family's video processor cannot be built; `NoVideos` stands in for it.
    """
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(path)
    config, _ = ProcessorMixin.get_processor_dict(path)
    cls = getattr(transformers, config.get("processor_class") or "", None)
    if cls is None or "video_processor" not in cls.get_attributes():
        return AutoProcessor.from_pretrained(path)
    load: dict[str, Callable[..., Any]] = {
        "image_processor": AutoImageProcessor.from_pretrained,
        "tokenizer": AutoTokenizer.from_pretrained,
    }
    load["video_processor"] = lambda _: NoVideos(**config.get("video_processor", {}))
    parts = [load[name](path) for name in cls.get_attributes()]
    return cls.from_args_and_dict(parts, config)


class Encoder:
    """Encodes prompts and responses for one processor.

    max_prompt_length: tokens of a prompt, image tokens included; a longer one raises `PromptTooLong`.
    max_response_length: tokens of a response, EOS included; a longer one raises `ResponseTooLong`, or with
        truncate_responses=True is cut, ends without EOS, and is counted in `.truncated_responses`.
    config: the model's config; its modality token ids join those of processor and tokenizer in `.placeholder_ids`.
    cache_bytes: bound of the cache of encoded prompts (least recently used first out); 0 switches it off.
    """

    def __init__(
        self,
        processor: Any,
        max_prompt_length: int | None = None,
        *,
        max_response_length: int | None = None,
        truncate_responses: bool = False,
        config: Any = None,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.truncate_responses = truncate_responses
        self.truncated_responses = 0
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token: set one, responses must end")
        self.eos_id = int(self.tokenizer.eos_token_id)
        self.pad_id = int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_id)
        self.placeholder_ids = placeholder_ids(processor, config)
        if {self.eos_id, self.pad_id} & set(self.placeholder_ids):
            raise ValueError(f"eos {self.eos_id} or pad {self.pad_id} is an image placeholder: give the tokenizer its own")
        self._forbidden = tuple(self.tokenizer.convert_ids_to_tokens(list(self.placeholder_ids)))
        self._cache = _Cache(cache_bytes)

    def prompts(self, prompts: Sequence[Prompt]) -> Inputs:
        """(B, P) left-padded inputs that end with the generation prompt, never with EOS. Raises `EncodingError`."""
        return collate([self._prompt(p) for p in prompts], pad_id=self.pad_id)

    def responses(self, texts: Sequence[str]) -> Responses:
        """(B, R): tokens of each text without special tokens, then EOS exactly once; mask True through EOS."""
        return stack_responses([self._response(t) for t in texts], pad_id=self.pad_id)

    def decode(self, responses: Responses) -> list[str]:
        """Texts of the tokens under the mask, special tokens left out."""
        rows = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render(self, prompt: Prompt) -> str:
        """The chat text of a prompt: its pictures, then its question, then the generation prompt."""
        content = [{"type": "image"} for _ in prompt.images] + [{"type": "text", "text": prompt.text}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def _prompt(self, prompt: Prompt) -> Inputs:
        key = prompt.id
        row = self._cache.get(key)
        if row is None:
            row = self._encode(prompt, key)
            self._cache.put(key, row)
        return row

    def _encode(self, prompt: Prompt, prompt_id: str) -> Inputs:
        self._refuse_special(prompt.text, self._forbidden, f"prompt {prompt_id}")
        text = self.render(prompt)
        bos = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        images = [[image.load() for image in prompt.images]] if prompt.images else None
        data = self.processor(text=[text], images=images, return_tensors="pt", **options)
        row = as_row(data, "".join(image.sha256 for image in prompt.images))
        row = self._without_eos(row, text)
        length = row.input_ids.shape[1]
        if self.max_prompt_length is not None and length > self.max_prompt_length:
            raise PromptTooLong(prompt_id, length, self.max_prompt_length)
        return row

    def _without_eos(self, row: Inputs, text: str) -> Inputs:
        """Some tokenizers close every text with EOS; after the generation prompt it would end the answer unsaid."""
        if int(row.input_ids[0, -1]) != self.eos_id or text.rstrip().endswith(self.tokenizer.eos_token):
            return row
        return Inputs(
            input_ids=row.input_ids[:, :-1],
            attention_mask=row.attention_mask[:, :-1],
            token_extras={k: v[:, :-1] for k, v in row.token_extras.items()},
            vision=row.vision,
            picture_keys=row.picture_keys,
        )

    def _response(self, text: str) -> list[int]:
        eos = self.tokenizer.eos_token
        while text.endswith(eos):
            text = text.removesuffix(eos)
        self._refuse_special(text, (eos, *self._forbidden), f"response {text[:40]!r}")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.eos_id]
        limit = self.max_response_length
        if limit is None or len(ids) <= limit:
            return ids
        if not self.truncate_responses:
            raise ResponseTooLong(f"response {text[:40]!r}: {len(ids)} tokens, more than max_response_length {limit}")
        self.truncated_responses += 1
        return ids[:limit]

    def _refuse_special(self, text: str, tokens: Iterable[str], where: str) -> None:
        for token in tokens:
            if token in text:
                raise SpecialTokenInText(f"{where}: the text contains {token!r}, a special token of this model; remove it")


def placeholder_ids(processor: Any, config: Any = None) -> tuple[int, ...]:
    """Ids of every modality token of processor, tokenizer and config: never to be sampled, never in a softmax."""
    tokenizer = processor.tokenizer
    ids = {i for i, token in tokenizer.added_tokens_decoder.items() if MODALITY_TOKEN.search(str(token))}
    for owner in (processor, tokenizer, config):
        for name, value in vars(owner).items() if owner is not None else ():
            if MODALITY_ATTRIBUTE.match(name):
                ids.update(_token_ids(tokenizer, value))
    return tuple(sorted(ids - {tokenizer.unk_token_id}))


def _token_ids(tokenizer: Any, value: Any) -> set[int]:
    """Ids named by an attribute that may hold a token, an id, or several."""
    values = value if isinstance(value, (list, tuple)) else [value]
    ids = {tokenizer.convert_tokens_to_ids(v) if isinstance(v, str) else v for v in values}
    return {i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0}


def as_row(data: Mapping[str, Any], picture_key: str = "") -> Inputs:
    """What the processor gave for one prompt, sorted into token-shaped and vision entries. Raises on anything else."""
    shape = data["input_ids"].shape
    strange = [k for k, v in data.items() if not isinstance(v, Tensor)]
    if strange:
        raise TypeError(f"the processor returned {strange}, which are not tensors: it is not supported")
    extras = {k: v for k, v in data.items() if v.shape == shape and k not in TOKEN_KEYS}
    vision = {k: v for k, v in data.items() if v.shape != shape}
    return Inputs(
        input_ids=data["input_ids"],
        attention_mask=data["attention_mask"],
        token_extras=extras,
        vision=(vision,),
        picture_keys=(picture_key,),
    )


def collate(rows: Sequence[Inputs], pad_id: int = 0) -> Inputs:
    """Left-pad and stack. Extras that a row lacks are 0 there. Features survive where every row has them."""
    width = max(row.input_ids.shape[1] for row in rows)
    left = lambda t, value: pad(t, (width - t.shape[1], 0), value=value)  # noqa: E731
    extras = {name: None for row in rows for name in row.token_extras}
    zeros = lambda row: torch.zeros_like(row.input_ids)  # noqa: E731
    featured = all(row.features is not None for row in rows)
    return Inputs(
        input_ids=torch.cat([left(row.input_ids, pad_id) for row in rows]),
        attention_mask=torch.cat([left(row.attention_mask, 0) for row in rows]),
        token_extras={k: torch.cat([left(r.token_extras[k] if k in r.token_extras else zeros(r), 0) for r in rows]) for k in extras},
        vision=tuple(v for row in rows for v in row.vision),
        features=tuple(f for row in rows for f in row.features or ()) if featured else None,
        picture_keys=tuple(k for row in rows for k in row.picture_keys),
    )


def stack_responses(rows: Sequence[Sequence[int]], pad_id: int = 0) -> Responses:
    """Right-pad token lists: ids (B, R), mask (B, R) True on the given tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    return Responses(ids=ids, mask=torch.arange(width)[None, :] < lengths[:, None])


def join(inputs: Inputs, responses: Responses | None = None) -> dict[str, Any]:
    """Keyword arguments of the model's forward for prompts (B, P), or prompts and responses (B, P + R).

    Where `inputs.features` is set they go in as mm_encoder_outputs and the pixels stay out.
    """
    ids, mask, extras = inputs.input_ids, inputs.attention_mask, dict(inputs.token_extras)
    if responses is not None:
        ids = torch.cat([ids, responses.ids], dim=1)
        mask = torch.cat([mask, responses.mask.to(mask.dtype)], dim=1)
        extras = {k: pad(v, (0, responses.ids.shape[1])) for k, v in extras.items()}
    vision = join_vision(inputs.vision)
    if inputs.features is not None:
        vision = {k: v for k, v in vision.items() if not PIXEL_INPUT.match(k)} | join_features(inputs.features)
    return {"input_ids": ids, "attention_mask": mask, **extras, **vision}


def join_vision(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Join rows' vision inputs: zero-pad trailing dimensions to the largest, concatenate on dimension 0."""
    names = {name: None for row in rows for name in row}
    return {name: _concatenate([row[name] for row in rows if name in row]) for name in names}


def join_features(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put rows' cached image features (see `vision_cache`) into the shape the model's forward takes them in."""
    rows = [row for row in rows if row]
    if not rows:
        return {}
    entries = [entry for row in rows for entry in row["pooler_output"]]
    output = BaseModelOutputWithPooling(pooler_output=torch.stack(entries) if rows[0]["stacked"] else entries)
    if rows[0]["deepstack_features"]:
        layers = zip(*(row["deepstack_features"] for row in rows), strict=True)
        output.deepstack_features = [[entry for part in layer for entry in part] for layer in layers]
    return {"mm_encoder_outputs": {"image": output}}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    shapes = {t.shape[1:] for t in tensors}
    if len(shapes) > 1:
        target = [max(sizes) for sizes in zip(*shapes, strict=True)]
        tensors = [_pad_to(t, target) for t in tensors]
    return torch.cat(list(tensors))


def _pad_to(tensor: Tensor, target: Sequence[int]) -> Tensor:
    """Zero-pad every dimension but the first at its end."""
    amounts = [(0, want - have) for want, have in zip(target, tensor.shape[1:], strict=True)]
    return pad(tensor, [x for pair in reversed(amounts) for x in pair])


class _Cache:
    """Least-recently-used encoded rows, bounded in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._rows: OrderedDict[str, Inputs] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> Inputs | None:
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: str, row: Inputs) -> None:
        self._rows[key] = row
        self.used += _bytes(row)
        while self.used > self.limit:
            self.used -= _bytes(self._rows.popitem(last=False)[1])


def _bytes(row: Inputs) -> int:
    tensors = [row.input_ids, row.attention_mask, *row.token_extras.values(), *(t for v in row.vision for t in v.values())]
    return sum(t.numel() * t.element_size() for t in tensors)

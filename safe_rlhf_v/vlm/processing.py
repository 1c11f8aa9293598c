"""From prompts and texts to tensors, one road for every family.

The processor is called once per prompt, on that prompt alone; `collation` puts batches together, left-padded, and
joins the rows' vision inputs only at the forward. So a row never depends on its neighbours, samples with no picture or
several mix freely, and token-shaped extras are padded on the same side as the ids.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.utils import is_torchvision_available

from beavertails_v.errors import UserError
from beavertails_v.images import ImageError
from beavertails_v.schema import Prompt
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.collation import as_row, collate, join, join_vision, row_bytes, stack_responses
from safe_rlhf_v.vlm.lru import Lru
from safe_rlhf_v.vlm.quirks import MODALITY_ATTRIBUTE, MODALITY_TOKEN, TOKEN_ALIGNED, NoVideos
from safe_rlhf_v.vlm.source import NO_PROCESSOR, PROCESSOR, ModelError, reading, require_processor, trust_remote_code

__all__ = [
    "Encoder",
    "EncodingError",
    "PromptTooLong",
    "ResponseTooLong",
    "SpecialTokenInText",
    "TemplateFault",
    "UnreadablePicture",
    "collate",
    "join",
    "join_vision",
    "load_processor",
    "placeholder_ids",
    "stack_responses",
]


_PLACE = re.compile(r"\A\s*<image>\s*|\s*<image>\s*\Z")


class EncodingError(UserError, ValueError):
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
    """A text spells a special token of the model: it would add a picture that is not there, or forge a turn."""


class UnreadablePicture(EncodingError, ImageError):
    """A picture cannot be decoded, or the processor refuses it, as some do those of extreme shapes."""


class TemplateFault(ModelError):
    """The model's chat template cannot be rendered: a fault of the model, not of a row."""


def load_processor(path: str | Path) -> ProcessorMixin:
    """The processor saved at `path` (a model, adapter or headed-model folder, or a hub id).

    Without torchvision a family's video processor cannot be built; `NoVideos` stands in for it. Raises ModelError.
    """
    with reading(path, NO_PROCESSOR, PROCESSOR):
        processor = _load_processor(path)
    require_processor(processor, path)
    return processor


def _load_processor(path: str | Path) -> ProcessorMixin:
    trust = trust_remote_code()
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(path, trust_remote_code=trust)
    config, _ = ProcessorMixin.get_processor_dict(path)
    cls = getattr(transformers, config.get("processor_class") or "", None)
    if cls is None or "video_processor" not in cls.get_attributes():
        return AutoProcessor.from_pretrained(path, trust_remote_code=trust)
    load: dict[str, Callable[..., Any]] = {
        "image_processor": AutoImageProcessor.from_pretrained,
        "tokenizer": AutoTokenizer.from_pretrained,
    }
    load["video_processor"] = lambda *_, **__: NoVideos(**config.get("video_processor", {}))
    parts = [load[name](path, trust_remote_code=trust) for name in cls.get_attributes()]
    return cls.from_args_and_dict(parts, config)


class Encoder:
    """Encodes prompts and responses for one processor.

    max_prompt_length: tokens of a prompt, image tokens included; a longer one raises `PromptTooLong`.
    max_response_length: tokens of a response, EOS included; a longer one raises `ResponseTooLong`, or with
        truncate_responses=True is cut, ends without EOS, and is counted in `.truncated_responses`.
    opens_pictures: whether the gate of rows (`training.encode.fault`) reads pictures in full also without such a limit.
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
        opens_pictures: bool = False,
        config: Any = None,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.truncate_responses = truncate_responses
        self.opens_pictures = opens_pictures
        self.truncated_responses = 0
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no eos_token: set one, responses must end")
        self.eos_id = int(self.tokenizer.eos_token_id)
        self.pad_id = int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_id)
        self.placeholder_ids = placeholder_ids(processor, config)
        if {self.eos_id, self.pad_id} & set(self.placeholder_ids):
            raise ModelError("the tokenizer uses an image placeholder as eos_token or pad_token: give it another")
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._placeholders = set(self.tokenizer.convert_ids_to_tokens(list(self.placeholder_ids)))
        self._special = tuple(special | self._placeholders)
        self._cache: Lru[Inputs] = Lru(cache_bytes, row_bytes)
        self._responses: Lru[list[int]] = Lru(cache_bytes // 8, sys.getsizeof)

    def prompts(self, prompts: Sequence[Prompt]) -> Inputs:
        """(B, P) left-padded inputs that end with the generation prompt, never with EOS. Raises `EncodingError`."""
        return collate([self._prompt(p) for p in prompts], pad_id=self.pad_id)

    def responses(self, texts: Sequence[str]) -> Responses:
        """(B, R): tokens of each text without special tokens, then EOS exactly once; mask True through EOS."""
        return stack_responses([self.response_ids(t) for t in texts], pad_id=self.pad_id)

    def decode(self, responses: Responses) -> list[str]:
        """Texts of the tokens under the mask, special tokens left out."""
        rows = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render(self, prompt: Prompt) -> str:
        """The chat text of a prompt: its pictures, then its question, then the generation prompt."""
        content = [{"type": "image"} for _ in prompt.images] + [{"type": "text", "text": self.question(prompt)}]
        messages = [{"role": "user", "content": content}]
        try:
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            where = getattr(self.tokenizer, "name_or_path", "") or "the model"
            raise TemplateFault(
                f"{where}: its chat template cannot be rendered ({str(error).strip().partition(chr(10))[0]}); copy "
                "chat_template.jinja from the model it was made of, or give the processor one"
            ) from error

    def question(self, prompt: Prompt) -> str:
        """A prompt's text; beside exactly one picture without the '<image>' that data of LLaVA's form begin or end
        with, since the chat template puts the picture in."""
        return _PLACE.sub("", prompt.text) if self.marks_place(prompt) else prompt.text

    def marks_place(self, prompt: Prompt) -> bool:
        """Whether the text says itself where its one picture stands, and says something else besides."""
        alone = len(prompt.images) == 1 and prompt.text.count("<image>") == 1
        return alone and bool(_PLACE.sub("", prompt.text).strip())

    def refuse_special(self, prompt: Prompt) -> None:
        """Raises SpecialTokenInText where the text of a prompt spells a special token."""
        self._refuse_special(self.question(prompt), f"prompt {prompt.id}")

    def _prompt(self, prompt: Prompt) -> Inputs:
        key = prompt.id
        row = self._cache.get(key)
        if row is None:
            row = self._encode(prompt, key)
            self._cache.put(key, row)
        return row

    def _encode(self, prompt: Prompt, prompt_id: str) -> Inputs:
        self.refuse_special(prompt)
        text = self.render(prompt)
        bos = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        try:
            images = [[image.load() for image in prompt.images]] if prompt.images else None
            data = self.processor(text=[text], images=images, return_tensors="pt", **options)
        except (ImageError, ValueError) as error:
            raise UnreadablePicture(f"prompt {prompt_id}: {str(error).strip().partition(chr(10))[0]}") from error
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
            vision=tuple({k: v[:, :-1] if k in TOKEN_ALIGNED else v for k, v in x.items()} for x in row.vision),
            image_keys=row.image_keys,
        )

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a response without special tokens, then EOS exactly once. Raises `EncodingError`."""
        eos = self.tokenizer.eos_token
        while text.endswith(eos):
            text = text.removesuffix(eos)
        self._refuse_special(text, f"response {text[:40]!r}")
        ids = self._tokens(text)
        limit = self.max_response_length
        if limit is None or len(ids) <= limit:
            return ids
        if not self.truncate_responses:
            raise ResponseTooLong(f"response {text[:40]!r}: {len(ids)} tokens, more than max_response_length {limit}")
        self.truncated_responses += 1
        return ids[:limit]

    def _tokens(self, text: str) -> list[int]:
        """Tokens of a response, EOS last. Every response is checked before it is used: it is tokenized once."""
        ids = self._responses.get(text)
        if ids is None:
            ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_id]
            self._responses.put(text, ids)
        return ids

    def _refuse_special(self, text: str, where: str) -> None:
        for token in self._special:
            if token in text:
                why = " (the picture is put in by the chat template)" if token in self._placeholders else ""
                raise SpecialTokenInText(f"{where}: the text contains the special token {token!r}; remove it{why}")


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

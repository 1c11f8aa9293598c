"""Responses from vLLM, in this process or from a server. Tested against a stub of its interface, never against vLLM.

The base model stays where it is; before every rollout vLLM is sent the policy's adapter, a few megabytes. It is given
texts and images, makes prompt ids of them itself, and sends those back: other ids than ours would mean another prompt
than the one that log-probabilities are taken of, so they are an error. A placeholder's logit is lowered by 100, the
most vLLM allows, where `token_logps` takes it out of the softmax altogether.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from beavertails_v.schema import Prompt
from safe_rlhf_v.generation.base import Sampling
from safe_rlhf_v.generation.transformers_engine import through_eos
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.collation import stack_responses
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.source import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt: `text` is the whole chat text, `question` the user's part of it; seed of its samples."""

    text: str
    question: str
    images: tuple[Image, ...]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """prompt_ids: what the engine made of the prompt; responses: token ids of each sample, the closing EOS included."""

    prompt_ids: list[int]
    responses: list[list[int]]


class Client(Protocol):
    """A vLLM, wherever it runs."""

    def load_adapter(self, name: str, number: int, folder: Path) -> None:
        """Answer with this adapter from now on; the one before it is not needed any more."""
        ...

    def complete(self, requests: Sequence[Request], options: dict[str, Any]) -> list[Completion]:
        """options: vLLM's sampling parameters, the same for all requests."""
        ...


class VLLMEngine:
    """An `Engine` on a vLLM.

    save_adapter: writes the policy's adapter as it is now to a folder. folder: where adapters are put, read by vLLM;
    only the newest is kept. eos_ids: tokens that end a response; None takes the encoder's.
    """

    def __init__(
        self,
        client: Client,
        encoder: Encoder,
        save_adapter: Callable[[Path], None],
        folder: Path,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        self.client, self.encoder, self.save_adapter, self.folder = client, encoder, save_adapter, Path(folder)
        self.eos_ids = sorted(eos_ids or [encoder.eos_id])
        self.sent = 0

    def generate(self, inputs: Inputs, samples: int, sampling: Sampling, prompts: Sequence[Prompt] = ()) -> Responses:
        """(N * samples, R) responses. Raises ModelError where vLLM read other prompt ids than those of `inputs`."""
        if len(prompts) != len(inputs):
            raise ValueError(f"vLLM encodes prompts by itself: {len(prompts)} were given for {len(inputs)} inputs")
        self._send_adapter()
        asked = samples if sampling.temperature > 0 else 1  # greedy samples are one sample, and vLLM asks for one
        completions = self.client.complete(self._requests(prompts), self._options(sampling, asked))
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ours = inputs.input_ids[row][inputs.attention_mask[row].bool()].tolist()
            _require_same(prompt.id, ours, completion.prompt_ids)
        responses = [ids for a in completions for ids in a.responses * (samples // asked)]
        padded = stack_responses(responses, pad_id=self.encoder.pad_id)
        mask = padded.mask & through_eos(padded.ids.masked_fill(~padded.mask, self.eos_ids[0]), self.eos_ids)
        return Responses(ids=padded.ids.masked_fill(~mask, self.encoder.pad_id), mask=mask)

    def _send_adapter(self) -> None:
        self.sent += 1
        fresh = self.folder / f"{self.folder.name}-{self.sent}"
        shutil.rmtree(self.folder, ignore_errors=True)
        fresh.mkdir(parents=True)
        self.save_adapter(fresh)
        self.client.load_adapter(fresh.name, self.sent, fresh.absolute())

    def _requests(self, prompts: Sequence[Prompt]) -> list[Request]:
        seeds = torch.randint(2**31 - 1, (len(prompts),)).tolist()  # so that torch's generator decides here, too
        return [
            Request(
                text=self._text(prompt), question=prompt.text, images=tuple(i.load() for i in prompt.images), seed=seed
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def _text(self, prompt: Prompt) -> str:
        """The chat text, without the BOS that the tokenizer adds by itself."""
        text, tokenizer = self.encoder.render(prompt), self.encoder.tokenizer
        adds = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if adds else text

    def _options(self, sampling: Sampling, samples: int) -> dict[str, Any]:
        return {
            "n": samples,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": self.eos_ids,
            "logit_bias": dict.fromkeys(self.encoder.placeholder_ids, -100.0),
            "skip_special_tokens": False,
        }


def _require_same(prompt_id: str, ours: list[int], theirs: list[int]) -> None:
    if ours != theirs:
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        where = f"the first difference is at {at}" if at is not None else "one is the beginning of the other"
        raise ModelError(
            f"prompt {prompt_id}: vLLM read {len(theirs)} tokens where {len(ours)} are trained on, {where}; give it "
            "the processor and chat template of the model trained here, and no image settings of its own"
        )


class Colocated:
    """A vLLM in this process."""

    def __init__(self, model: Any, vllm: Any) -> None:
        self.model, self.vllm = model, vllm
        self._adapter: Any = None

    def load_adapter(self, name: str, number: int, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest(name, number, str(folder))

    def complete(self, requests: Sequence[Request], options: dict[str, Any]) -> list[Completion]:
        prompts = [
            {"prompt": r.text} | ({"multi_modal_data": {"image": list(r.images)}} if r.images else {}) for r in requests
        ]
        settings = [self.vllm.SamplingParams(**options, seed=r.seed, detokenize=False) for r in requests]
        outputs = self.model.generate(prompts, settings, lora_request=self._adapter, use_tqdm=False)
        return [
            Completion(prompt_ids=list(o.prompt_token_ids), responses=[list(x.token_ids) for x in o.outputs])
            for o in outputs
        ]


def colocated(
    model: str | Path, *, rank: int, dtype: str, seed: int, gpu_memory_utilization: float, max_model_len: int | None
) -> Colocated:
    """Load the base `model` into a vLLM of this process. rank: of the adapters it will be sent. Raises ModelError."""
    if importlib.util.find_spec("vllm") is None:
        raise ModelError("policy.engine.kind vllm needs vLLM: pip install vllm, or take engine.kind: transformers")
    if (Path(model) / "adapter_config.json").is_file():
        raise ModelError(f"{model} is an adapter, and vLLM is sent one already: merge it into its base model first")
    import vllm

    loaded = vllm.LLM(
        model=str(model),
        dtype=dtype,
        seed=seed,
        enable_lora=True,
        max_lora_rank=rank,
        max_loras=1,
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=max_model_len,
    )
    return Colocated(loaded, vllm)

"""What a model takes in memory, from its config alone: weights by part, and the peak of a training step.

The step is run on fake tensors, which have shapes and no contents: the language model's own layers, adapters and
loss head, at full depth. So what a family saves for its backward pass is not guessed. Attention is taken as a fused
kernel, without an (L, L) score matrix. Shapes: B rows, L tokens a row, R of them response.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText

from safe_rlhf_v.planning.allocations import Allocations
from safe_rlhf_v.tensors import token_logps
from safe_rlhf_v.vlm.backbone import LoraSettings, add_lora, freeze_vision, outside_language, to_dtype
from safe_rlhf_v.vlm.memory import recompute_language
from safe_rlhf_v.vlm.shared_prompts import empty_cache, keeps_plain_caches, release_cache, repeat_cache
from safe_rlhf_v.vlm.source import reading, trust_remote_code

Loss = Literal["logps", "values", "score"]
# bytes a weight: NF4 with double quantization (arXiv 2305.14314: 64 weights share a byte, 256 of those 4 bytes), and
# LLM.int8 (arXiv 2208.07339)
QUANTIZED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A forward, and with `grad` a backward, of B `rows` of L `length` tokens, R `response` of them.

    prompts: as many of them that rows share and a pass reads once; None: each row reads its own.
    loss: what stands on the hidden states. lora: adapters train, all else is frozen; None trains all but the tower.
    autocast: compute in bfloat16. keep_grads: gradients stay (False: they leave at once, as sharded ones do).
    """

    rows: int
    length: int
    response: int
    loss: Loss
    prompts: int | None = None
    grad: bool = True
    lora: LoraSettings | None = None
    autocast: bool = False
    checkpointing: bool = False
    keep_grads: bool = True
    chunk_size: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of a model's weights by part, its trainable parameters and those of one adapter (numbers, not bytes).

    reads_once: whether a pass reads a prompt that rows share once.
    """

    language: int
    vision: int
    largest_layer: int
    outside_layers: int
    trainable: int
    adapter: int
    cache_a_token: int
    width: int
    vocabulary: int
    tied: bool
    reads_once: bool

    @property
    def weights(self) -> int:
        return self.language + self.vision


def meta_model(path: str | Path, dtype: str) -> Any:
    """The model of a folder with a config.json (weights are not needed) or of a hub id, without any memory."""
    with reading(path, "has no config.json that transformers can read"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code())
    with torch.device("meta"), reading(path, "not a vision-language model that transformers knows"):
        options = {"dtype": to_dtype(dtype), "trust_remote_code": trust_remote_code()}
        return AutoModelForImageTextToText.from_config(config, **options).eval()


def sizes(path: str | Path, dtype: str, quantization: str | None = None, lora: LoraSettings | None = None) -> Sizes:
    """Count a model's parts. quantization: of every linear layer but the output layer, as bitsandbytes does."""
    model = meta_model(path, dtype)
    output = model.get_output_embeddings()
    small = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not output}

    def size(parameter: nn.Parameter) -> int:
        quantized = quantization is not None and id(parameter) in small
        each = QUANTIZED[str(quantization)] if quantized else parameter.element_size()
        return int(parameter.numel() * each)

    outside = {id(p) for p in outside_language(model)}
    language = sum(size(p) for p in model.parameters() if id(p) not in outside)
    layers = [sum(map(size, layer.parameters())) for layer in model.get_decoder().layers]
    vision = sum(size(p) for p in model.parameters() if id(p) in outside)
    trainable = sum(p.numel() for p in model.parameters() if id(p) not in outside)
    text = model.config.get_text_config()
    heads = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    adapter = sum(p.numel() for p in add_lora(model, lora).values()) if lora else 0
    return Sizes(
        language=language, vision=vision, largest_layer=max(layers), outside_layers=language - sum(layers),
        trainable=trainable, adapter=adapter, width=text.hidden_size, vocabulary=output.weight.shape[0],
        cache_a_token=2 * len(layers) * heads * to_dtype(dtype).itemsize,
        tied=output.weight is model.get_input_embeddings().weight,
        reads_once=keeps_plain_caches(model.config) and not getattr(text, "cross_attention_layers", None),
    )  # fmt: skip


@lru_cache(maxsize=32)
def step_peak(path: str | Path, dtype: str, step: Step) -> int:
    """Peak bytes of a step beyond the weights: activations, logits, gradients. Remembered: two stages may share one."""
    fake, model, head = _fake_model(str(path), dtype, step.lora)
    trained = [p for p in model.parameters() if p.requires_grad and not step.keep_grads]
    with fake, ExitStack() as undo:
        if step.checkpointing:
            recompute_language(model)
            undo.callback(lambda: (model.gradient_checkpointing_disable(), model.eval()))
        for parameter in trained:
            hook = parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            undo.callback(hook.remove)
        undo.callback(model.zero_grad)
        seen = undo.enter_context(Allocations(held=list(model.parameters())))
        before = seen.live
        with torch.set_grad_enabled(step.grad):
            loss = _loss(model, head, step)
            if step.grad:
                loss.backward()
        return seen.peak - before


@lru_cache(maxsize=1)
def _fake_model(path: str, dtype: str, lora: LoraSettings | None) -> tuple[FakeTensorMode, Any, nn.Module]:
    """A model whose tensors say they are on the CPU and hold nothing, with what a stage trains taking gradients."""
    model = meta_model(path, dtype)
    if lora is not None:
        add_lora(model, lora)
    freeze_vision(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to_empty(device="cpu")
        model.tie_weights()
        return fake, model, nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)


def _loss(model: Any, head: nn.Module, step: Step) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16) if step.autocast else nullcontext():
        states = _states(model, step)  # (B, R + 1, H)
        if step.loss == "score":
            return head(states[:, -1].float()).sum()
        if step.loss == "values":
            return head(states[:, :-1].float()).sum()
        ids = torch.zeros(step.rows, step.response, dtype=torch.long)
        return token_logps(states[:, :-1], model.get_output_embeddings(), ids, step.chunk_size).sum()


def _states(model: Any, step: Step) -> torch.Tensor:
    """As `prefix.response_states` makes them."""
    said = step.response + 1
    if step.prompts is None:
        return _decode(model, step.rows, step.length, 0)[:, -said:]
    cache, before = empty_cache(model, keep=True), step.length - said
    _decode(model, step.prompts, before, 0, past_key_values=cache)
    rows = repeat_cache(model, cache, [i % step.prompts for i in range(step.rows)])
    release_cache(model, cache)
    return _decode(model, step.rows, said, before, past_key_values=rows)


def _decode(model: Any, rows: int, length: int, before: int, **options: Any) -> torch.Tensor:
    """(B, L, H) after L tokens that `before` tokens stand before, with a mask as padded rows have."""
    embedded = model.get_input_embeddings()(torch.zeros(rows, length, dtype=torch.long))
    mask = torch.ones(rows, 1, length, before + length, dtype=torch.bool)
    decoded = model.get_decoder()(inputs_embeds=embedded, attention_mask=mask, use_cache=False, **options)
    return decoded.last_hidden_state  # type: ignore[no-any-return]

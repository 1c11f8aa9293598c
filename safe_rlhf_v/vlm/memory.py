"""Options that trade memory and time and change no result: recomputed activations, compiled layers, fused kernels."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from safe_rlhf_v.vlm.source import ModelError

Checkpointed = bool | Literal["language", "vision"]


def checkpoint_gradients(model: Any, which: Checkpointed, context_fn: Callable[[], Any] | None = None) -> None:
    """Recompute activations of language model, vision tower or (True) both in the backward pass; False: of neither.

    A frozen tower keeps no activations, so there it saves nothing. context_fn: as of torch.utils.checkpoint.
    """
    settings: dict[str, Any] = {"use_reentrant": False} | ({"context_fn": context_fn} if context_fn else {})
    if which is True or which == "language":
        model.get_decoder().gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        for layer in model.get_decoder().layers:
            if hasattr(layer, "_can_checkpoint_with_cache"):
                layer._can_checkpoint_with_cache = True  # else transformers drops the cache of a layer that recomputes
    if which is True or which == "vision":
        model.get_encoder(modality="image").gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def without_dropout(model: nn.Module) -> None:
    """Train mode then changes no number, whatever dropout the base or a reward or cost adapter was trained with."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # what attention modules hold as a number
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def recompute_language(model: Any, context_fn: Callable[[], Any] | None = None) -> None:
    """Recompute the language model's activations, with the numbers of eval mode: transformers does so in train mode
    only."""
    checkpoint_gradients(model, "language", context_fn)
    without_dropout(model)
    model.train()


def keeps_caches(model: Any) -> bool:
    """Whether layers that recompute their activations, in train mode, do so with the keys and values they are given."""
    recompute = [x for x in model.get_decoder().modules() if getattr(x, "gradient_checkpointing", False)]
    layers = [x for x in recompute if isinstance(x, GradientCheckpointingLayer)]
    return not recompute or (bool(layers) and all(x._can_checkpoint_with_cache for x in layers))


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """torch.compile each layer of the language model, in place: one graph serves all of like shape.

    Roles on one backbone are variants of a layer; each is compiled at its first use. Raises ModelError without what
    inductor compiles with.
    """
    if backend == "inductor":
        _require_compiler(model.device)
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(64, limit)  # roles, each with and without gradients
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend, dynamic=True)


def _require_compiler(device: torch.device) -> None:
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        raise ModelError("policy.torch_compile needs triton on a GPU: pip install triton, or leave it off")
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ModelError("policy.torch_compile needs a C++ compiler on a CPU: install g++ or clang, or leave it off")


def apply_liger(model: Any) -> None:
    """Liger's fused norm, MLP and rotary kernels; not its losses, since log-probabilities are taken in chunks here.

    Raises ModelError where it is not installed, or does not know the family: it would then do nothing, and not say so.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError(
            "policy.use_liger_kernel needs liger-kernel, and that a GPU with triton: pip install liger-kernel, or "
            "leave it off"
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if (kind := model.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"policy.use_liger_kernel: liger-kernel has no kernels for model type {kind}; leave it off")
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)

"""The one vision-language model everything stands on: loading, forwards without logits, adapters, freezing.

Shapes: B rows, P prompt length (left-padded), R response length (right-padded), L = P + R, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from safe_rlhf_v.processes import process_state
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.adapters import CONFIG_FILE, LoraSettings, adapter_parameters, add_lora
from safe_rlhf_v.vlm.collation import alike, in_order, join
from safe_rlhf_v.vlm.generation_config import require_generation_config, savable
from safe_rlhf_v.vlm.image_features import encode_images
from safe_rlhf_v.vlm.quirks import LOGIT_CAPS, LOGIT_DIVISORS, LOGIT_FACTORS, UNJOINABLE
from safe_rlhf_v.vlm.source import ModelError, is_model, reading, trust_remote_code
from safe_rlhf_v.vlm.weights import DamagedFile, read_json, weight_shapes

__all__ = [
    "LoraSettings",
    "adapter_parameters",
    "add_lora",
    "base_of",
    "encode_images",
    "fingerprint",
    "freeze_vision",
    "hidden_states",
    "load_backbone",
    "on_device",
    "output_head",
    "position_ids",
    "share_vision",
    "to_dtype",
    "vision_is_frozen",
]

Quantization = Literal["4bit", "8bit"]
_HEADS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def load_backbone(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    quantization: Quantization | None = None,
    adapter: str | Path | None = None,
    attn_implementation: str | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load an image-text-to-text model in eval mode, its parameters as they are (nothing frozen).

    path: model folder or hub id, or a PEFT adapter folder, whose own base is then loaded and the adapter merged in.
    adapter: one more adapter folder to merge. quantization: "4bit" (NF4) or "8bit" through bitsandbytes; an adapter
    is never merged into quantized weights, which would round it away, so the two together are an error.
    device: quantized weights load on this process's own where none is given; others stay on the CPU.
    """
    adapters = [] if adapter is None else [Path(adapter)]
    while (config := _adapter_config(path)) is not None:
        adapters.insert(0, Path(path))
        path = base_of(path, config)
    if adapters and quantization:
        raise ModelError(
            f"adapter {adapters[0]} cannot be merged into {quantization} weights without rounding it away: "
            "merge it in full precision first (load_backbone(...).save_pretrained(...)), then quantize that folder"
        )
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code()}
    if quantization:  # quantized weights are placed while they load and never moved: each process has its own device
        options["quantization_config"] = _quantization(quantization, dtype)
        options["device_map"] = {"": process_state().device if device is None else device}
    options = {"dtype": to_dtype(dtype)} | {k: v for k, v in options.items() if v is not None}
    require_fitting(path, weight_shapes(path))
    require_generation_config(path)
    with reading(path, "not a vision-language model that transformers can load"):
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
    if (kind := model.config.model_type) in UNJOINABLE:
        raise ModelError(f"model type {kind} is not supported: {UNJOINABLE[kind]}")
    if model.can_generate():
        savable(model.generation_config)
    for folder in adapters:
        weight_shapes(folder)
        with reading(folder, "an adapter that does not fit its base", (CONFIG_FILE,)):
            model = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
    if quantization:
        _keep_differentiable(model)
    elif device is not None:
        model.to(device)
    return model.eval()


def _keep_differentiable(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights at the first forward without gradients, in a layout
    through which no gradient passes: a rollout would end training silently."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def hidden_states(model: Any, inputs: Inputs, responses: Responses | None = None) -> Tensor:
    """Final, normed hidden states (B, L, H) of prompts, or prompts and responses; no logits are ever formed."""
    inputs, responses = on_device(model, inputs), None if responses is None else on_device(model, responses)
    groups = alike(inputs)
    if len(groups) == 1:
        return _forward(model, inputs, responses)
    parts = [_forward(model, inputs.select(g), None if responses is None else responses.select(g)) for g in groups]
    return in_order(parts, groups)


def _forward(model: Any, inputs: Inputs, responses: Responses | None) -> Tensor:
    kwargs = join(inputs, responses)
    kwargs["position_ids"] = position_ids(model, kwargs)
    return model.base_model(**kwargs, use_cache=False, return_dict=True).last_hidden_state  # type: ignore[no-any-return]


def position_ids(model: Any, kwargs: dict[str, Any]) -> Tensor:
    """Positions from the very function generation uses (M-RoPE included), so the two can never differ."""
    if "image_grid_thw" in kwargs and hasattr(model.base_model, "get_rope_index") and "mm_token_type_ids" not in kwargs:
        raise ValueError("mm_token_type_ids is missing: this family's positions would silently become one-dimensional")
    given = {k: v for k, v in kwargs.items() if k != "input_ids"}
    return model._prepare_position_ids_for_generation(kwargs["input_ids"], given)  # type: ignore[no-any-return]


def output_head(model: Any) -> nn.Module:
    """The map from hidden states to the logits (..., V) that generation uses: output layer, then scaling or capping.

    Found once per model by comparing with the model's own logits on two tokens. Raises NotImplementedError where they
    come about in a way `quirks` does not know.
    """
    if model not in _HEADS:
        _HEADS[model] = _find_head(model)
    return _HEADS[model]


@torch.no_grad()
def _find_head(model: Any) -> nn.Module:
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    value = lambda names: next((v for n in names if (v := getattr(config, n, None))), None)  # noqa: E731
    scaled = ScaledHead(layer, (value(LOGIT_FACTORS) or 1.0) / (value(LOGIT_DIVISORS) or 1.0), value(LOGIT_CAPS))
    was_training = model.training
    model.eval()
    probe = torch.tensor([[1, 2]], device=model.device)
    logits = model(input_ids=probe).logits
    hidden = model.base_model(input_ids=probe).last_hidden_state
    model.train(was_training)
    for head in (layer, scaled):
        if torch.allclose(head(hidden), logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
            return head
    name = type(model).__name__
    raise NotImplementedError(f"{name}: its logits are not its output layer's; add what they are to vlm/quirks.py")


class ScaledHead(nn.Module):
    """logits = cap * tanh(scale * layer(x) / cap), without the tanh where there is no cap."""

    def __init__(self, layer: nn.Module, scale: float, cap: float | None) -> None:
        super().__init__()
        self.layer, self.scale, self.cap = layer, scale, cap

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.layer(hidden) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def freeze_vision(model: Any, projector: bool = True) -> None:
    """Turn gradients off for the vision tower and, unless projector=False, for what maps it to the language model."""
    frozen = outside_language(model) if projector else model.get_encoder(modality="image").parameters()
    for parameter in frozen:
        parameter.requires_grad_(False)


def vision_is_frozen(model: Any) -> bool:
    """Whether image features can be reused between updates: nothing that makes them takes gradients."""
    return not any(p.requires_grad for p in outside_language(model))


def outside_language(model: Any) -> Iterator[nn.Parameter]:
    """Parameters of the base model that are not the language model's: tower, projector, connector."""
    language = {id(p) for p in model.get_decoder().parameters()}
    return (p for p in model.base_model.parameters() if id(p) not in language)


def share_vision(model: Any, owner: Any) -> bool:
    """Let `model` use `owner`'s tower and projector where all their weights are equal; returns whether it does."""
    mine, theirs = (dict(_vision_state(m)) for m in (model, owner))
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k].to(mine[k])) for k in mine)
    if same:
        decoder = model.get_decoder()
        for name, child in list(model.base_model.named_children()):
            if decoder not in child.modules():
                setattr(model.base_model, name, getattr(owner.base_model, name))
    return same


def _vision_state(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Named parameters and buffers of the base model outside its language model."""
    language = {id(t) for t in (*model.get_decoder().parameters(), *model.get_decoder().buffers())}
    named = (*model.base_model.named_parameters(), *model.base_model.named_buffers())
    return ((name, t) for name, t in named if id(t) not in language)


def fingerprint(model: Any) -> str | None:
    """Tells two bases apart by the first weights of every language parameter, adapters left out; None if quantized.

    Compared in bfloat16, so that a base loaded in another precision is still the same base.
    """
    if getattr(model, "is_quantized", False):
        return None
    digest = hashlib.sha256()
    for name, p in sorted((n.replace(".base_layer", ""), p) for n, p in model.get_decoder().named_parameters()):
        if ".lora_" not in name:
            start = p.detach().flatten()[:8].to("cpu", torch.bfloat16).view(torch.int16).tolist()
            digest.update(f"{name}{start}".encode())
    return digest.hexdigest()[:16]


def on_device(model: Any, value: Any) -> Any:
    """Inputs or responses on the model's device; untouched where they are there already."""
    ids = value.input_ids if isinstance(value, Inputs) else value.ids
    return value if ids.device == model.device else value.to(model.device)


def _adapter_config(path: str | Path) -> dict[str, Any] | None:
    file = Path(path) / CONFIG_FILE
    try:
        return dict(read_json(file)) if file.is_file() else None
    except (DamagedFile, TypeError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: copy or fetch it again ({error})") from None


def require_fitting(path: str | Path, shapes: Mapping[str, list[int]]) -> None:
    """Raises ModelError where the embedding in the files of weights does not fit the shape that config.json says.

    Read before anything is allocated: where a section of config.json is missing, transformers takes one of a far
    larger model. shapes: of the weights, by name.
    """
    found = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight") and len(shape) == 2]
    if not found:
        return
    with reading(path, "not a vision-language model that transformers can load"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code()).get_text_config()
        wanted = [int(config.vocab_size), int(config.hidden_size)]
    if not any(rows >= wanted[0] and width == wanted[1] for rows, width in found):  # Mllama has rows beside those
        raise ModelError(
            f"{path}: config.json says that the embedding is {wanted[0]} x {wanted[1]}, and in the weights it is "
            f"{found[0][0]} x {found[0][1]}: take config.json and weights of one model"
        )


def chain(path: str | Path) -> list[str | Path]:
    """A model's folder or hub id, and below an adapter its base, down to a whole model."""
    found = [path]
    while (config := _adapter_config(found[-1])) is not None:
        found.append(base_of(found[-1], config))
    return found


def base_of(adapter: str | Path, config: dict[str, Any]) -> str:
    """The base's folder or hub id; where a run was moved, the base that was moved with it."""
    if not config.get("base_model_name_or_path"):
        raise ModelError(f"{Path(adapter) / CONFIG_FILE} names no base_model_name_or_path")
    base = str(config["base_model_name_or_path"])
    if Path(base).is_absolute() and not Path(base).is_dir():
        beside = [parent / Path(base).name for parent in Path(adapter).resolve().parents[:2]]
        moved = [folder for folder in beside if folder != Path(adapter).resolve() and is_model(folder)]
        if moved:
            return str(moved[0])
        raise FileNotFoundError(
            f"adapter {adapter} stands on {base}, which is not there: put it back, or correct base_model_name_or_path "
            f"in its {CONFIG_FILE}"
        )
    return base


def to_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """"bfloat16" to torch.bfloat16. Raises ValueError for a name that is not one."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not a torch dtype: use float32, bfloat16 or float16")
    return found


def _quantization(kind: Quantization, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    if kind not in ("4bit", "8bit"):
        raise ValueError(f"quantization {kind!r} is unknown: use '4bit', '8bit' or nothing")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"quantization {kind!r} needs bitsandbytes: pip install bitsandbytes, or leave it off")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = to_dtype(dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )

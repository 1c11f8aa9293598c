"""LoRA adapters on the language model: fresh, saved and loaded as plain PEFT folders, several on one backbone."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from safe_rlhf_v.arguments import LoraSettings
from safe_rlhf_v.vlm.source import ModelError, reading
from safe_rlhf_v.vlm.weights import read_tensors

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


def language_prefix(model: Any) -> str:
    """Qualified name of the language model inside `model` ("model.language_model", "model.text_model", ...)."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def lora_config(model: Any, settings: LoraSettings) -> LoraConfig:
    """PEFT configuration whose targets are one regex, anchored on the language model."""
    prefix = language_prefix(model)
    named = ((n.removesuffix(".base_layer"), m) for n, m in model.get_decoder().named_modules() if ".lora_" not in n)
    linears = {name.rsplit(".", 1)[-1] for name, module in named if isinstance(module, nn.Linear)}
    leaves = linears if settings.targets == "all" else {n for n in linears if re.fullmatch(settings.targets, n)}
    if not leaves:
        raise ModelError(f"LoRA targets {settings.targets!r} match none of the language model's {sorted(linears)}")
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(leaves))})",
        base_model_name_or_path=whole_name(model.name_or_path),
    )


def whole_name(name: str | Path) -> str | None:
    """A folder's absolute path, so that the adapter finds its base from any working directory; a hub id as it is."""
    return str(Path(name).resolve()) if str(name) and Path(name).is_dir() else str(name) or None


def add_lora(model: Any, settings: LoraSettings, name: str = "default") -> dict[str, nn.Parameter]:
    """Freeze the model, inject a fresh adapter (a zero change) and return its parameters, which take gradients."""
    return inject(model, lora_config(model, settings), name)


def inject(model: Any, config: LoraConfig, name: str) -> dict[str, nn.Parameter]:
    """Inject one more adapter, in float32. It takes gradients, as earlier adapters go on doing; the base does not."""
    before = {key for key, p in model.named_parameters() if p.requires_grad and ".lora_" in key}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        model.add_adapter(config, adapter_name=name)
    mine = adapter_parameters(model, name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in mine or key in before)
    for parameter in mine.values():
        parameter.data = parameter.data.float()  # small updates vanish in half precision
    return mine


def adapter_parameters(model: Any, name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter by their qualified names."""
    pattern = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
    return {key: p for key, p in model.named_parameters() if pattern.search(key)}


def save_adapter(backbone: Any, name: str, folder: Path) -> None:
    """Write one adapter as a plain PEFT folder, whatever it is called in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(backbone, adapter_name=name, save_embedding_layers=False)
    save_file({f"base_model.model.{k}": v.contiguous().cpu() for k, v in weights.items()}, folder / ADAPTER_FILE)
    config = backbone.peft_config[name]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False


def load_adapter(backbone: Any, folder: str | Path, name: str) -> None:
    """Inject a saved PEFT adapter under `name`, taking gradients; the base is frozen. Raises where it does not fit."""
    folder = Path(folder)
    with reading(folder, f"its {CONFIG_FILE} cannot be read", (CONFIG_FILE,)):
        config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    mine = inject(backbone, config, name)
    weights = {k.removeprefix("base_model.model."): v for k, v in read_tensors(folder / ADAPTER_FILE).items()}
    outcome = set_peft_model_state_dict(backbone, weights, adapter_name=name)
    missing = sorted(mine.keys() & set(outcome.missing_keys))
    if missing or outcome.unexpected_keys:
        raise ModelError(
            f"adapter {folder} does not fit the base: missing {missing[:3]}, unexpected {outcome.unexpected_keys[:3]}"
        )

"""A backbone with scalar heads on the last attended token: reward and cost models, guards.

A saved folder holds heads.safetensors and headed.json beside either a PEFT adapter or a full model, and the processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safe_rlhf_v.models.backbone import LoraSettings, add_lora, fingerprint, hidden_states, inject, load_backbone
from safe_rlhf_v.models.processing import load_processor
from safe_rlhf_v.tensors import pool_last
from safe_rlhf_v.types import Inputs, Responses

HEADS_FILE = "heads.safetensors"
DESCRIPTION_FILE = "headed.json"
ADAPTER_FILE = "adapter_model.safetensors"


class HeadedModel(nn.Module):
    """Scores (B, k) per named head: Linear(H, k) in float32 on the hidden state of the last attended token.

    backbone: taken over as it is; with `lora` it is frozen and a fresh adapter injected, else it trains in full.
    heads: name to number of outputs. bias: whether heads have one (the released reward and cost models have none).
    """

    def __init__(
        self, backbone: Any, heads: Mapping[str, int], lora: LoraSettings | None = None, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.lora = lora
        self.bias = bias
        if lora is not None:
            add_lora(backbone, lora)
        width = backbone.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, k, bias=bias, device=backbone.device) for name, k in heads.items()})

    def forward(self, inputs: Inputs, responses: Responses | None = None) -> dict[str, Tensor]:
        """Each head's scores (B, k), float32, of the prompts or of prompts with responses."""
        pooled = self.pooled(inputs, responses)
        return {name: head(pooled) for name, head in self.heads.items()}

    def pooled(self, inputs: Inputs, responses: Responses | None = None) -> Tensor:
        """(B, H) float32 state of the last attended token, found by the mask and never by a pad id or position."""
        hidden = hidden_states(self.backbone, inputs, responses)
        mask = inputs.attention_mask.to(hidden.device)
        if responses is not None:
            mask = torch.cat([mask, responses.mask.to(mask)], dim=1)
        return pool_last(hidden, mask).float()

    def save_pretrained(self, folder: str | Path, processor: Any = None) -> None:
        """Write heads, adapter or full weights, and the processor (copied from the backbone's folder if not given)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is None:
            self.backbone.save_pretrained(folder)
        else:
            save_adapter(self.backbone, "default", folder)
        save_heads(self.heads, folder, self.backbone, bias=self.bias)
        (load_processor(self.backbone.name_or_path) if processor is None else processor).save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: Any = None, **load: Any) -> HeadedModel:
        """Load what `save_pretrained` wrote, in eval mode, its adapter or weights ready to train on.

        base: a loaded backbone, or a path, in place of the one the adapter names. load: options of `load_backbone`.
        Raises FileNotFoundError or ValueError naming the missing head.
        """
        folder = Path(folder)
        description = read_description(folder)
        if (folder / ADAPTER_FILE).is_file():
            config = LoraConfig.from_pretrained(str(folder))
            source = config.base_model_name_or_path if base is None else base
            backbone = load_backbone(source, **load) if isinstance(source, (str, Path)) else source
            load_adapter(backbone, folder, "default")
            model = cls(backbone, description["heads"], bias=description["bias"])
            model.lora = LoraSettings(r=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout)
        else:
            model = cls(load_backbone(folder, **load), description["heads"], bias=description["bias"])
        model.heads.load_state_dict(load_heads(folder, description))
        return model.eval()


def save_heads(heads: nn.ModuleDict, folder: Path, backbone: Any, *, bias: bool) -> None:
    """Write heads.safetensors and headed.json, which also says what base they stand on."""
    save_file({k: v.contiguous() for k, v in heads.state_dict().items()}, folder / HEADS_FILE)
    sizes = {name: head.out_features for name, head in heads.items()}
    description = {"heads": sizes, "bias": bias, "base": str(backbone.name_or_path), "fingerprint": fingerprint(backbone)}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


def read_description(folder: Path) -> dict[str, Any]:
    """headed.json; an error where the folder holds no headed model."""
    for name in (DESCRIPTION_FILE, HEADS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it is not a saved reward, cost or guard model, or lost its heads")
    return dict(json.loads((folder / DESCRIPTION_FILE).read_text()))


def load_heads(folder: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of every head the description names; an error naming each that is missing."""
    weights = load_file(folder / HEADS_FILE)
    missing = [name for name in description["heads"] if f"{name}.weight" not in weights]
    if missing:
        raise ValueError(f"{folder / HEADS_FILE} lacks the heads {missing} that {DESCRIPTION_FILE} names; it has {sorted(weights)}")
    return weights


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
    """Inject a saved PEFT adapter under `name`, taking gradients; the base is frozen. Raises if any weight does not fit."""
    folder = Path(folder)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    mine = inject(backbone, config, name)
    weights = {k.removeprefix("base_model.model."): v for k, v in load_file(folder / ADAPTER_FILE).items()}
    outcome = set_peft_model_state_dict(backbone, weights, adapter_name=name)
    missing = sorted(mine.keys() & set(outcome.missing_keys))
    if missing or outcome.unexpected_keys:
        raise ValueError(f"adapter {folder} does not fit the base: missing {missing[:3]}, unexpected {outcome.unexpected_keys[:3]}")

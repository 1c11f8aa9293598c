"""A backbone with scalar heads on the last attended token: reward and cost models, guards.

A saved folder holds heads.safetensors and headed.json beside either a PEFT adapter or a full model, and the processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from safe_rlhf_v.tensors import pool_last
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.adapters import ADAPTER_FILE, CONFIG_FILE, LoraSettings, add_lora, load_adapter, save_adapter
from safe_rlhf_v.vlm.backbone import base_of, fingerprint, hidden_states, load_backbone
from safe_rlhf_v.vlm.processing import load_processor
from safe_rlhf_v.vlm.shared_prompts import last_state, response_states
from safe_rlhf_v.vlm.source import reading
from safe_rlhf_v.vlm.weights import DamagedFile, read_json, read_tensors

HEADS_FILE = "heads.safetensors"
DESCRIPTION_FILE = "headed.json"


class HeadedModel(nn.Module):
    """Scores (B, k) per named head: Linear(H, k) in float32 on the hidden state of the last attended token.

    backbone: taken over as it is; with `lora` it is frozen and a fresh adapter injected, else it trains in full.
    heads: name to number of outputs. bias: whether heads have one (the released reward and cost models have none).
    one_forward: forward a prompt with each of its responses, as sharded models must.
    kind: "reward" or "cost", kept in its folder, so that neither is taken for the other.
    """

    one_forward = False
    kind: str | None = None

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
        linear = lambda k: nn.Linear(width, k, bias=bias, device=backbone.device)  # noqa: E731
        self.heads = nn.ModuleDict({name: linear(k) for name, k in heads.items()})

    def use_one_forward(self) -> None:
        """From now on: for a sharded model."""
        self.one_forward = True

    def forward(self, inputs: Inputs, responses: Responses | None = None) -> dict[str, Tensor]:
        """Each head's scores (B, k), float32, of the prompts or of prompts with responses."""
        return self.scores(self.pooled(inputs, responses))

    def scores(self, pooled: Tensor) -> dict[str, Tensor]:
        """Each head on states (..., H), in float32 also under autocast: bfloat16 would round scores to two digits."""
        with torch.autocast(pooled.device.type, enabled=False):
            return {name: head(pooled.float()) for name, head in self.heads.items()}

    def pooled(self, inputs: Inputs, responses: Responses | None = None) -> Tensor:
        """(B, H) float32 state of the last attended token, found by the mask and never by a pad id or position."""
        if responses is not None:
            states = response_states(self.backbone, inputs, responses, one_forward=self.one_forward)
            return last_state(states, inputs, responses)
        hidden = hidden_states(self.backbone, inputs)
        return pool_last(hidden, inputs.attention_mask.to(hidden.device)).float()

    def save_pretrained(self, folder: str | Path, processor: Any = None) -> None:
        """Write heads, adapter or full weights, and the processor (copied from the backbone's folder if not given)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is None:
            self.backbone.save_pretrained(folder)
        else:
            save_adapter(self.backbone, "default", folder)
        save_heads(self.heads, folder, self.backbone, bias=self.bias, kind=self.kind)
        if processor is None and not self.backbone.name_or_path:
            raise ValueError("this backbone was not loaded from a folder, so its processor is unknown: pass processor=")
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
            with reading(folder, f"its {CONFIG_FILE} cannot be read", (CONFIG_FILE,)):
                config = LoraConfig.from_pretrained(str(folder))
            source = base_of(folder, config.to_dict()) if base is None else base
            backbone = load_backbone(source, **load) if isinstance(source, (str, Path)) else source
            load_adapter(backbone, folder, "default")
            model = cls(backbone, description["heads"], bias=description["bias"])
            model.lora = LoraSettings(r=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout)
        else:
            model = cls(load_backbone(folder, **load), description["heads"], bias=description["bias"])
        model.heads.load_state_dict(load_heads(folder, description))
        model.kind = description.get("kind")
        return model.eval()


def save_heads(heads: nn.ModuleDict, folder: Path, backbone: Any, *, bias: bool, kind: str | None = None) -> None:
    """Write heads.safetensors and headed.json, which also says what base they stand on and, where known, their kind."""
    save_file({k: v.contiguous() for k, v in heads.state_dict().items()}, folder / HEADS_FILE)
    sizes = {name: head.out_features for name, head in heads.items()}
    base = {"base": str(backbone.name_or_path), "fingerprint": fingerprint(backbone)}
    description = {"heads": sizes, "bias": bias, **base} | ({} if kind is None else {"kind": kind})
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_description(folder: Path) -> dict[str, Any]:
    """headed.json; an error where the folder holds no headed model."""
    for name in (DESCRIPTION_FILE, HEADS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it is not a model with heads, or it has lost them")
    description = read_json(folder / DESCRIPTION_FILE)
    if not isinstance(description, dict) or not {"heads", "bias"} <= description.keys():
        raise DamagedFile(f"{folder / DESCRIPTION_FILE} does not say which heads there are: copy or fetch it again")
    return description


def load_heads(folder: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of every head the description names; an error naming each that is missing."""
    weights = read_tensors(folder / HEADS_FILE)
    missing = [name for name in description["heads"] if f"{name}.weight" not in weights]
    if missing:
        raise ValueError(f"{folder / HEADS_FILE} lacks the heads {missing} that {DESCRIPTION_FILE} names")
    return weights

"""Six roles on six models, for those with the memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safe_rlhf_v.models.backbone import freeze_vision, load_backbone, share_vision
from safe_rlhf_v.models.heads import HeadedModel
from safe_rlhf_v.models.memory import apply_liger, checkpoint_gradients, compile_layers, without_dropout
from safe_rlhf_v.models.processing import Encoder, load_processor
from safe_rlhf_v.models.role_base import TRAINABLE, RoleBase, pick_head
from safe_rlhf_v.models.source import ModelError
from safe_rlhf_v.types import Inputs


class SeparateRoles(RoleBase):
    """A full model per role, for those with the memory. Vision tower and projector stay frozen, and are shared between
    roles whose weights there are equal; if all are, pictures are encoded once.

    gradient_checkpointing: recompute the language models' activations in the backward pass, for less memory. options:
    those of `RoleBase`.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        scorers: Mapping[str, HeadedModel],
        encoder: Encoder,
        *,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        heads = {role: headed.heads[pick_head(headed.heads, role, "scorers")] for role, headed in scorers.items()}
        super().__init__(encoder, heads, **options)  # type: ignore[arg-type]
        self.models = {"policy": policy, "reference": reference} | {r: h.backbone for r, h in scorers.items()}
        shared = [share_vision(model, policy) for role, model in self.models.items() if role != "policy"]
        self._one_tower = all(shared)
        for role, model in self.models.items():
            model.eval()
            if role in ("reference", "reward", "cost"):
                model.requires_grad_(False)
            freeze_vision(model)
            if gradient_checkpointing and role in TRAINABLE:
                checkpoint_gradients(model, "language")
                without_dropout(model)
                model.train()  # transformers recomputes in train mode only
        self._groups = {role: self._collect(role) for role in TRAINABLE if role in self.models}

    @classmethod
    def from_pretrained(
        cls,
        policy_dir: str | Path,
        reward_dir: str | Path | None = None,
        cost_dir: str | Path | None = None,
        critics: bool = True,
        *,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        max_prompt_length: int | None = None,
        device: str | torch.device | None = None,
        torch_compile: bool = False,
        use_liger_kernel: bool = False,
        **options: Any,
    ) -> SeparateRoles:
        """Load every model; reward and cost folders may hold full weights or adapters.

        The reference is a frozen copy of the policy; critics are copies of the reward and cost model.
        """
        if critics and (reward_dir is None or cost_dir is None):
            raise ValueError("critics start from the reward and cost model: give both folders, or set critics=False")
        load: dict[str, Any] = dict(dtype=dtype, attn_implementation=attn_implementation, device=device)
        policy = load_backbone(policy_dir, **load)
        encoder = Encoder(load_processor(policy_dir), max_prompt_length, config=policy.config)
        scorers = {}
        for which, folder in (("reward", reward_dir), ("cost", cost_dir)):
            if folder is not None:
                same_tokens(encoder.tokenizer, folder)
                scorers[which] = HeadedModel.from_pretrained(folder, **load)
                if critics:
                    scorers[f"{which}_critic"] = copy.deepcopy(scorers[which])
        reference = copy.deepcopy(policy)
        for model in (policy, reference, *(headed.backbone for headed in scorers.values())):
            if use_liger_kernel:
                apply_liger(model)
            if torch_compile:
                compile_layers(model)
        return cls(policy, reference, scorers, encoder, **options)

    def _collect(self, role: str) -> dict[str, nn.Parameter]:
        parameters = {n: p for n, p in self.models[role].named_parameters() if p.requires_grad}
        if role in self.heads:
            parameters |= {f"head.{name}": p for name, p in self.heads[role].named_parameters()}
        return parameters

    def _trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        return self._groups

    def _as(self, role: str) -> Any:
        return self.models[role]

    def prepare(self, inputs: Inputs) -> Inputs:
        return super().prepare(inputs) if self._one_tower else inputs

    def save_policy(self, folder: str | Path) -> None:
        self.models["policy"].save_pretrained(folder)
        self.encoder.processor.save_pretrained(folder)


def same_tokens(tokenizer: Any, folder: str | Path) -> None:
    """Roles are handed one set of token ids: a reward or cost model with other tokens would read nonsense."""
    other: Any = load_processor(folder)
    if other.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"{folder} has another vocabulary than the policy: it would misread the policy's token ids")

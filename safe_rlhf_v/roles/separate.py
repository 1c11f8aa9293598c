"""Six roles on six models, for those with the memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safe_rlhf_v.config_io import SettingsError
from safe_rlhf_v.distributed.fsdp2 import refuse_several_forwards, whole_tree
from safe_rlhf_v.distributed.sharded import ShardedModel, Sharder
from safe_rlhf_v.roles.base import TRAINABLE, RoleBase, pick_head
from safe_rlhf_v.types import Inputs
from safe_rlhf_v.vlm.backbone import freeze_vision, load_backbone, share_vision
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.memory import apply_liger, compile_layers, recompute_language
from safe_rlhf_v.vlm.processing import Encoder, load_processor
from safe_rlhf_v.vlm.source import ModelError


class SeparateRoles(RoleBase):
    """A full model per role, for those with the memory. Vision tower and projector stay frozen, and are shared between
    roles whose weights there are equal; if all are, pictures are encoded once.

    gradient_checkpointing: recompute the language models' activations in the backward pass, for less memory. options:
    those of `RoleBase`.
    sharding: cut every model over the ranks (FSDP2, ZeRO-3); each rank then asks each role as many questions, in one
    order.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        scorers: Mapping[str, HeadedModel] | Iterable[tuple[str, HeadedModel]],
        encoder: Encoder,
        *,
        gradient_checkpointing: bool = False,
        sharding: Sharder | None = None,
        **options: Any,
    ) -> None:
        super().__init__(encoder, {}, **options)
        self._recompute = gradient_checkpointing
        self.models: dict[str, Any] = {}
        self._roots: dict[str, ShardedModel] = {}
        self._sharder, self._one_tower = sharding, True
        self._weights: Any = None
        self._settle("policy", policy)
        self._settle("reference", reference)
        for role, headed in scorers.items() if isinstance(scorers, Mapping) else scorers:
            self._settle(role, headed.backbone, headed.heads[pick_head(headed.heads, role, "scorers")])
        self._groups = {role: self._collect(role) for role in TRAINABLE if role in self.models}

    def _settle(self, role: str, model: Any, head: Any = None) -> None:
        """Take a model in: share the policy's vision tower where it is the same, freeze, and cut."""
        self._one_tower &= role == "policy" or share_vision(model, self.models["policy"])
        self.models[role] = model.eval()
        if head is not None:
            self.heads[role] = head
        if role in ("reference", "reward", "cost"):
            for module in filter(None, (model, head)):
                module.requires_grad_(False)
        freeze_vision(model)
        if self._recompute and role in TRAINABLE:
            recompute_language(model)
        if self._sharder is not None:
            self._roots[role] = self._sharder.root(model, head)

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
        sharded = options.get("sharding") is not None
        load: dict[str, Any] = dict(dtype=dtype, attn_implementation=attn_implementation)
        if sharded and torch_compile:
            raise SettingsError("policy.torch_compile is not supported where models are cut: set it to false")
        load["device"] = None if sharded else device  # cut models go to the device in parts
        policy = load_backbone(policy_dir, **load)
        encoder = Encoder(load_processor(policy_dir), max_prompt_length, config=policy.config)

        def sped_up(model: Any) -> Any:
            if use_liger_kernel:
                apply_liger(model)
            if torch_compile:
                compile_layers(model)
            return model

        def scorers() -> Iterator[tuple[str, HeadedModel]]:  # one after the other: at most two whole models at a time
            for which, folder in (("reward", reward_dir), ("cost", cost_dir)):
                if folder is not None:
                    same_tokens(encoder.tokenizer, folder)
                    headed = HeadedModel.from_pretrained(folder, **load)
                    critic = copy.deepcopy(headed) if critics else None
                    sped_up(headed.backbone)
                    yield which, headed
                    if critic is not None:
                        sped_up(critic.backbone)
                        yield f"{which}_critic", critic

        reference = sped_up(copy.deepcopy(policy))
        return cls(sped_up(policy), reference, scorers(), encoder, **options)

    def _collect(self, role: str) -> dict[str, nn.Parameter]:
        parameters = {n: p for n, p in self.models[role].named_parameters() if p.requires_grad}
        if role in self.heads:
            parameters |= {f"head.{name}": p for name, p in self.heads[role].named_parameters()}
        return parameters

    def _trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        return self._groups

    def _as(self, role: str) -> Any:
        return self.models[role]

    def _ask(self, role: str, question: Callable[..., Any], *args: Any) -> Any:
        if not self.sharded:
            return super()._ask(role, question, *args)
        return self._roots[role].ask(question, self, *args)

    @property
    def sharded_models(self) -> Mapping[str, ShardedModel]:
        return self._roots

    def prepare(self, inputs: Inputs) -> Inputs:
        if self.sharded:
            refuse_several_forwards(inputs)
        return super().prepare(inputs) if self._one_tower else inputs

    def gather_policy(self, keep: bool) -> None:
        """Before `save_policy` on one rank, on every rank: make sharded weights whole. keep: on the rank that saves."""
        if self.sharded:
            weights = whole_tree(self.models["policy"].state_dict(keep_vars=True), keep)
            self._weights = weights if keep else None

    def save_policy(self, folder: str | Path) -> None:
        if self.sharded and self._weights is None:
            raise RuntimeError("sharded weights must be made whole by all ranks first: gather_policy")
        self.models["policy"].save_pretrained(folder, state_dict=self._weights)
        self.encoder.processor.save_pretrained(folder)
        self._weights = None


def same_tokens(tokenizer: Any, folder: str | Path) -> None:
    """Roles are handed one set of token ids: a reward or cost model with other tokens would read nonsense."""
    other: Any = load_processor(folder)
    if other.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"{folder} has another vocabulary than the policy: it would misread the policy's token ids")

"""Six roles on one backbone: a role is a LoRA adapter and perhaps a head; the reference is none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from safe_rlhf_v.roles.base import TRAINABLE, RoleBase, pick_head
from safe_rlhf_v.vlm.adapters import (
    CONFIG_FILE,
    LoraSettings,
    adapter_parameters,
    add_lora,
    load_adapter,
    save_adapter,
)
from safe_rlhf_v.vlm.backbone import fingerprint, load_backbone
from safe_rlhf_v.vlm.heads import load_heads, read_description
from safe_rlhf_v.vlm.memory import apply_liger, compile_layers, recompute_language
from safe_rlhf_v.vlm.processing import Encoder, load_processor
from safe_rlhf_v.vlm.source import ModelError


class AdapterRoles(RoleBase):
    """One frozen backbone with adapters "policy", "reward", "cost", "reward_critic", "cost_critic".

    The reference is the backbone without adapters, so the policy starts equal to it. Build it with `from_pretrained`.
    gradient_checkpointing: recompute the language model's activations in the backward pass, for less memory. (The
    frozen tower keeps none.) options: those of `RoleBase`.
    """

    def __init__(
        self,
        backbone: Any,
        encoder: Encoder,
        heads: Mapping[str, nn.Linear],
        *,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(encoder, heads, **options)
        self.backbone = backbone
        self._layers = [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]
        self._active: str | None = None
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)
        self._groups = {role: self._collect(role) for role in TRAINABLE if role == "policy" or role in self.heads}
        backbone.eval()
        if gradient_checkpointing:
            self._checkpoint_gradients()

    @classmethod
    def from_pretrained(
        cls,
        base_dir: str | Path,
        reward_dir: str | Path | None = None,
        cost_dir: str | Path | None = None,
        critics: bool = True,
        lora: LoraSettings = LoraSettings(),  # noqa: B008
        *,
        dtype: str = "float32",
        quantization: Literal["4bit", "8bit"] | None = None,
        attn_implementation: str | None = None,
        max_prompt_length: int | None = None,
        device: str | torch.device | None = None,
        torch_compile: bool = False,
        use_liger_kernel: bool = False,
        **options: Any,
    ) -> AdapterRoles:
        """Load the base, adapters and heads of reward and cost model (trained on this very base), and add the rest.

        Critics start as copies of the reward and cost model, or where there is none (rewards from rules, say) from the
        base with a head of zeros. Raises ValueError for dropout, for a reward or cost model that is not an adapter, and
        for one that was trained on another base.
        """
        if lora.dropout:
            raise ValueError(f"lora dropout {lora.dropout}: log-probabilities must not differ by chance; set it to 0")
        backbone = load_backbone(base_dir, dtype, quantization, None, attn_implementation, device)
        encoder = Encoder(load_processor(base_dir), max_prompt_length, config=backbone.config)
        if use_liger_kernel:
            apply_liger(backbone)
        add_lora(backbone, lora, "policy")
        heads: dict[str, nn.Linear] = {}
        for which, folder in (("reward", reward_dir), ("cost", cost_dir)):
            if folder is not None:
                heads[which] = _load_role(backbone, Path(folder), which)
            if critics and folder is not None:
                heads[f"{which}_critic"] = _load_role(backbone, Path(folder), f"{which}_critic")
            elif critics:
                add_lora(backbone, lora, f"{which}_critic")
                heads[f"{which}_critic"] = _zero_head(backbone)
        if torch_compile:
            compile_layers(backbone)
        return cls(backbone, encoder, heads, **options)

    def _collect(self, role: str) -> dict[str, nn.Parameter]:
        """Parameters of a role that trains: its adapter's, and its head's; they are turned on here."""
        parameters = adapter_parameters(self.backbone, role)
        if role in self.heads:
            parameters |= {f"head.{name}": p for name, p in self.heads[role].named_parameters()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return parameters

    def _trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        return self._groups

    def _as(self, role: str) -> Any:
        """Switch every adapter layer. PEFT's own set_adapter also toggles requires_grad, which must stay as it is."""
        if role != self._active:
            for layer in self._layers:
                layer._disable_adapters = role == "reference"
                layer._active_adapter = [role]
            self._active = role
        return self.backbone

    def save_policy_adapter(self, folder: str | Path) -> None:
        """The policy's adapter alone, a plain PEFT folder."""
        save_adapter(self.backbone, "policy", Path(folder))

    def save_policy(self, folder: str | Path) -> None:
        self.save_policy_adapter(folder)
        self.encoder.processor.save_pretrained(folder)

    def _checkpoint_gradients(self) -> None:
        """Recompute layers in the backward pass, each under the adapter its forward ran with."""
        recompute_language(self.backbone, self._recall)

    def _recall(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._again(self._active or "policy")

    @contextmanager
    def _again(self, role: str) -> Iterator[None]:
        now = self._active
        self._as(role)
        try:
            yield
        finally:  # torch leaves a recomputation early, by an exception
            if now is not None:
                self._as(now)


def _load_role(backbone: Any, folder: Path, role: str) -> nn.Linear:
    """Inject the adapter of a saved reward or cost model under the name `role`; returns its head."""
    description = read_description(folder)
    head = pick_head(description["heads"], role, folder)
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{folder} holds full weights, not an adapter: train it with LoRA, or use SeparateRoles")
    theirs, ours = description.get("fingerprint"), fingerprint(backbone)
    if None not in (theirs, ours) and theirs != ours:
        raise ModelError(
            f"{folder} was trained on another base ({description['base']}) than this one ({backbone.name_or_path}): "
            "train it on this base, or use SeparateRoles"
        )
    load_adapter(backbone, folder, role)
    weights = load_heads(folder, description)
    outputs, width = weights[f"{head}.weight"].shape
    layer = nn.Linear(width, outputs, bias=description["bias"], device=backbone.device)
    layer.load_state_dict({k.removeprefix(f"{head}."): v for k, v in weights.items() if k.startswith(f"{head}.")})
    return layer


def _zero_head(backbone: Any) -> nn.Linear:
    layer = nn.Linear(backbone.config.get_text_config().hidden_size, 1, bias=False, device=backbone.device)
    nn.init.zeros_(layer.weight)
    return layer

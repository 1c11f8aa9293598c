"""Policy, reference, reward, cost and two critics, on one backbone or on six.

`AdapterRoles`: one frozen backbone; a role is a LoRA adapter and perhaps a head; the reference is the adapters switched
off. `SeparateRoles`: a full model per role, the frozen vision tower shared where its weights are the same.
Shapes: B rows, P prompt length, R response length, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safe_rlhf_v.generation.base import Sampling
from safe_rlhf_v.generation.transformers_engine import TransformersEngine
from safe_rlhf_v.models.backbone import (
    LoraSettings,
    adapter_parameters,
    add_lora,
    encode_images,
    fingerprint,
    freeze_vision,
    hidden_states,
    load_backbone,
    output_head,
    response_hidden,
    share_vision,
)
from safe_rlhf_v.models.heads import HeadedModel, load_adapter, load_heads, read_description, save_adapter
from safe_rlhf_v.models.processing import Encoder, load_processor
from safe_rlhf_v.models.vision_cache import VisionCache
from safe_rlhf_v.tensors import pool_last, token_logps
from safe_rlhf_v.types import Inputs, Responses

Which = Literal["reward", "cost"]


class Roles(Protocol):
    """What the online trainers ask of models, whoever holds them."""

    encoder: Encoder

    def prepare(self, inputs: Inputs) -> Inputs:
        """Encode the pictures once; everything below accepts the result, and faster."""
        ...

    def logps(
        self, inputs: Inputs, responses: Responses, role: Literal["policy", "reference"] = "policy", *, temperature: float = 1.0
    ) -> Tensor:
        """(B, R) float32 log-probabilities of the response tokens, placeholders removed from the softmax as in sampling.

        Of the policy with gradients where they are enabled, of the reference never. Outside the mask: any finite value.
        """
        ...

    def scores(self, inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        """Rewards (B,) and costs (B,), float32, without gradients; cost > 0 is unsafe."""
        ...

    def values(self, inputs: Inputs, responses: Responses, which: Which = "reward") -> Tensor:
        """(B, R) float32: V_t, the critic's head on the state that predicts token t; with gradients where enabled."""
        ...

    def generate(self, inputs: Inputs, samples: int, sampling: Sampling) -> Responses:
        """N * samples responses of the policy; rows of one prompt stand together."""
        ...

    def policy_parameters(self) -> list[nn.Parameter]: ...

    def critic_parameters(self, which: Which) -> list[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that trains, by name: what a checkpoint must hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless the names and shapes are exactly those of `state_dict`."""
        ...

    def save_policy(self, folder: str | Path) -> None:
        """Write the policy and its processor where `load_backbone` finds it again."""
        ...


class _Roles:
    """What both implementations share: everything but who plays a role."""

    def __init__(self, encoder: Encoder, heads: Mapping[str, nn.Linear], chunk_size: int, vision_cache_bytes: int) -> None:
        self.encoder = encoder
        self.heads = dict(heads)
        self.chunk_size = chunk_size
        self._cache = VisionCache(vision_cache_bytes) if vision_cache_bytes else None

    def _as(self, role: str) -> Any:
        """The backbone that plays `role`, ready for a forward."""
        raise NotImplementedError

    def _trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """Role to its trainable parameters by name: "policy", "reward_critic", "cost_critic"."""
        raise NotImplementedError

    def prepare(self, inputs: Inputs) -> Inputs:
        return encode_images(self._as("reference"), inputs, self._cache)

    def logps(
        self, inputs: Inputs, responses: Responses, role: Literal["policy", "reference"] = "policy", *, temperature: float = 1.0
    ) -> Tensor:
        if role not in ("policy", "reference"):
            raise ValueError(f"role {role!r} has no log-probabilities: ask for 'policy' or 'reference'")
        with torch.set_grad_enabled(torch.is_grad_enabled() and role == "policy"):
            model = self._as(role)
            hidden = response_hidden(model, inputs, responses)
            ids, suppress = responses.ids.to(hidden.device), self.encoder.placeholder_ids
            return token_logps(hidden, output_head(model), ids, self.chunk_size, suppress=suppress, temperature=temperature)

    @torch.no_grad()
    def scores(self, inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        return self._score("reward", inputs, responses), self._score("cost", inputs, responses)

    def _score(self, which: Which, inputs: Inputs, responses: Responses) -> Tensor:
        head = self._head(which, "scores")
        hidden = hidden_states(self._as(which), inputs, responses)
        mask = torch.cat([inputs.attention_mask.bool(), responses.mask], dim=1)
        return head(pool_last(hidden, mask).float()).squeeze(-1)  # type: ignore[no-any-return]

    def values(self, inputs: Inputs, responses: Responses, which: Which = "reward") -> Tensor:
        head = self._head(f"{which}_critic", "values")
        hidden = response_hidden(self._as(f"{which}_critic"), inputs, responses)
        return head(hidden.float()).squeeze(-1)  # type: ignore[no-any-return]

    def _head(self, role: str, what: str) -> nn.Linear:
        if role not in self.heads:
            raise ValueError(f"these roles have no {role}, so no {what}: they hold {sorted(self.heads)}")
        return self.heads[role]

    def generate(self, inputs: Inputs, samples: int, sampling: Sampling) -> Responses:
        return TransformersEngine(self._as("policy"), self.encoder).generate(inputs, samples, sampling)

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self._trainable()["policy"].values())

    def critic_parameters(self, which: Which) -> list[nn.Parameter]:
        self._head(f"{which}_critic", "parameters")
        return list(self._trainable()[f"{which}_critic"].values())

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for role, parameters in self._trainable().items():
            yield from ((f"{role}.{name}", p) for name, p in parameters.items())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._named()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        mine = dict(self._named())
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        if missing or extra:
            raise ValueError(f"the state does not fit these roles: missing {missing[:3]}, unexpected {extra[:3]}")
        for name, parameter in mine.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name}: shape {tuple(state[name].shape)} in the state, {tuple(parameter.shape)} here")
            parameter.copy_(state[name])


class AdapterRoles(_Roles):
    """One frozen backbone with adapters "policy", "reward", "cost", "reward_critic", "cost_critic".

    The reference is the backbone without adapters, so the policy starts equal to it. Build it with `from_pretrained`.
    """

    def __init__(
        self,
        backbone: Any,
        encoder: Encoder,
        heads: Mapping[str, nn.Linear],
        *,
        chunk_size: int = 1024,
        vision_cache_bytes: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(encoder, heads, chunk_size, vision_cache_bytes)
        self.backbone = backbone
        self._layers = [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]
        self._active: str | None = None
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)
        self._groups = {role: self._collect(role) for role in ("policy", "reward_critic", "cost_critic") if self._plays(role)}
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
        **options: Any,
    ) -> AdapterRoles:
        """Load the base, adapters and heads of reward and cost model (both trained on this very base), and add the rest.

        Critics start as copies of the reward and cost model, or where there is none (rewards from rules, say) from the
        base with a head of zeros. Raises ValueError for dropout, for a reward or cost model that is not an adapter, and
        for one that was trained on another base.
        """
        if lora.dropout:
            raise ValueError(f"lora dropout {lora.dropout}: old and new log-probabilities must not differ by chance; set it to 0")
        load = dict(dtype=dtype, quantization=quantization, attn_implementation=attn_implementation)
        backbone = load_backbone(base_dir, **load)  # type: ignore[arg-type]
        if device is not None:
            backbone.to(device)
        encoder = Encoder(load_processor(base_dir), max_prompt_length, config=backbone.config)
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
        return cls(backbone, encoder, heads, **options)

    def _plays(self, role: str) -> bool:
        return role == "policy" or role in self.heads

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

    def save_policy(self, folder: str | Path) -> None:
        save_adapter(self.backbone, "policy", Path(folder))
        self.encoder.processor.save_pretrained(folder)

    def _checkpoint_gradients(self) -> None:
        """Recompute layers in the backward pass, each under the adapter its forward ran with."""
        settings = {"use_reentrant": False, "context_fn": self._recall}
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        self.backbone.train()  # transformers recomputes in train mode only; there is no dropout to turn on

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


class SeparateRoles(_Roles):
    """A full model per role, for those with the memory. Vision tower and projector stay frozen, and are shared between
    roles whose weights there are equal; if all are, pictures are encoded once.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        scorers: Mapping[str, HeadedModel],
        encoder: Encoder,
        *,
        chunk_size: int = 1024,
        vision_cache_bytes: int = 0,
    ) -> None:
        heads = {role: headed.heads[pick_head(headed.heads, role, "scorers")] for role, headed in scorers.items()}
        super().__init__(encoder, heads, chunk_size, vision_cache_bytes)  # type: ignore[arg-type]
        self.models = {"policy": policy, "reference": reference} | {r: h.backbone for r, h in scorers.items()}
        self._one_tower = all([share_vision(m, policy) for r, m in self.models.items() if r != "policy"])
        for role, model in self.models.items():
            model.eval()
            if role in ("reference", "reward", "cost"):
                model.requires_grad_(False)
            freeze_vision(model)
        self._groups = {role: self._collect(role) for role in ("policy", "reward_critic", "cost_critic") if role in self.models}

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
        **options: Any,
    ) -> SeparateRoles:
        """Load every model; reward and cost folders may hold full weights or adapters. The reference is a frozen copy of
        the policy; critics are copies of the reward and cost model."""
        if critics and (reward_dir is None or cost_dir is None):
            raise ValueError("critics start from the reward and cost model: give both folders, or set critics=False")
        load = dict(dtype=dtype, attn_implementation=attn_implementation)
        policy = load_backbone(policy_dir, **load).to(device or "cpu")  # type: ignore[arg-type]
        encoder = Encoder(load_processor(policy_dir), max_prompt_length, config=policy.config)
        scorers = {}
        for which, folder in (("reward", reward_dir), ("cost", cost_dir)):
            if folder is not None:
                _same_tokens(encoder.tokenizer, folder)
                scorers[which] = HeadedModel.from_pretrained(folder, **load).to(device or "cpu")
                if critics:
                    scorers[f"{which}_critic"] = copy.deepcopy(scorers[which])
        return cls(policy, copy.deepcopy(policy), scorers, encoder, **options)

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


def _same_tokens(tokenizer: Any, folder: str | Path) -> None:
    """Roles are handed one set of token ids: a reward or cost model with other tokens would read nonsense."""
    other: Any = load_processor(folder)
    if other.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{folder} has another vocabulary than the policy: its model would misread the policy's token ids")


def pick_head(heads: Mapping[str, Any] | nn.ModuleDict, role: str, where: Any) -> str:
    """The head that serves a role: the one of its name, else the only one there is."""
    which = role.removesuffix("_critic")
    if which in heads or len(heads) == 1:
        return which if which in heads else next(iter(heads))
    raise ValueError(f"{where}: no head {which!r} among {sorted(heads)}, so it is unclear which one to use")


def _load_role(backbone: Any, folder: Path, role: str) -> nn.Linear:
    """Inject the adapter of a saved reward or cost model under the name `role`; returns its head."""
    description = read_description(folder)
    head = pick_head(description["heads"], role, folder)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds full weights, not an adapter: train it with LoRA, or use SeparateRoles")
    theirs, ours = description.get("fingerprint"), fingerprint(backbone)
    if None not in (theirs, ours) and theirs != ours:
        raise ValueError(
            f"{folder} was trained on another base ({description['base']}) than this one ({backbone.name_or_path}): "
            "train it on this base, or use SeparateRoles"
        )
    load_adapter(backbone, folder, role)
    weights = load_heads(folder, description)
    layer = nn.Linear(*weights[f"{head}.weight"].shape[::-1], bias=description["bias"], device=backbone.device)
    layer.load_state_dict({k.removeprefix(f"{head}."): v for k, v in weights.items() if k.startswith(f"{head}.")})
    return layer


def _zero_head(backbone: Any) -> nn.Linear:
    layer = nn.Linear(backbone.config.get_text_config().hidden_size, 1, bias=False, device=backbone.device)
    nn.init.zeros_(layer.weight)
    return layer

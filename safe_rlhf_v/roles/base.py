"""What the roles on one backbone and the roles on six have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safe_rlhf_v.distributed.fsdp2 import held, overwrite, shape_of
from safe_rlhf_v.distributed.sharded import ShardedModel
from safe_rlhf_v.generation.base import Sampling
from safe_rlhf_v.generation.transformers_engine import CacheKind, TransformersEngine
from safe_rlhf_v.tensors import token_logps
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import encode_images, output_head
from safe_rlhf_v.vlm.image_features import VisionCache
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.shared_prompts import last_state, reads_once, response_states

Which = Literal["reward", "cost"]
Speaker = Literal["policy", "reference"]
TRAINABLE: tuple[str, ...] = ("policy", "reward_critic", "cost_critic")


class RoleBase:
    """What both implementations share: everything but who plays a role.

    chunk_size: tokens whose logits live at once. vision_cache_bytes: image features kept between steps (none at 0).
    bf16: compute in bfloat16 over wider weights, heads apart. cache: keys and values while generating.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: Mapping[str, nn.Linear],
        *,
        chunk_size: int = 1024,
        vision_cache_bytes: int = 0,
        bf16: bool = False,
        cache: CacheKind = "dynamic",
    ) -> None:
        self.encoder = encoder
        self.heads = dict(heads)
        self.chunk_size, self.bf16, self.cache = chunk_size, bf16, cache
        self._cache = VisionCache(vision_cache_bytes) if vision_cache_bytes else None

    @property
    def sharded_models(self) -> Mapping[str, ShardedModel]:
        return {}

    @property
    def sharded(self) -> bool:
        """Whether every forward is a collective call."""
        return bool(self.sharded_models)

    def _as(self, role: str) -> Any:
        """The backbone that plays `role`, ready for a forward."""
        raise NotImplementedError

    def _trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """Role to its trainable parameters by name: "policy", "reward_critic", "cost_critic"."""
        raise NotImplementedError

    def _precision(self, model: Any) -> torch.autocast:
        return torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16)

    def prepare(self, inputs: Inputs) -> Inputs:
        model = self._as("reference")
        with self._precision(model):
            return encode_images(model, inputs, self._cache)

    def reads_once(self, inputs: Inputs) -> bool:
        model = self._as("policy")
        return not self.sharded and reads_once(model, inputs)

    def _ask(self, role: str, question: Callable[..., Any], *args: Any) -> Any:
        """question(roles, backbone, head or None, *args): the one way into a model's weights."""
        return question(self, self._as(role), self.heads.get(role), *args)

    def logps(
        self, inputs: Inputs, responses: Responses, role: Speaker = "policy", *, temperature: float = 1.0
    ) -> Tensor:
        if role not in ("policy", "reference"):
            raise ValueError(f"role {role!r} has no log-probabilities: ask for 'policy' or 'reference'")
        with torch.set_grad_enabled(torch.is_grad_enabled() and role == "policy"):
            settings = (self.chunk_size, temperature)
            return self._ask(role, _logps, inputs, responses, *settings)  # type: ignore[no-any-return]

    @torch.no_grad()
    def scores(self, inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        return self._score("reward", inputs, responses), self._score("cost", inputs, responses)

    def _score(self, which: Which, inputs: Inputs, responses: Responses) -> Tensor:
        self._head(which, "scores")
        return self._ask(which, _last_value, inputs, responses)  # type: ignore[no-any-return]

    def values(self, inputs: Inputs, responses: Responses, which: Which = "reward") -> Tensor:
        self._head(f"{which}_critic", "values")
        return self._ask(f"{which}_critic", _values, inputs, responses)  # type: ignore[no-any-return]

    def _head(self, role: str, what: str) -> nn.Linear:
        if role not in self.heads:
            raise ValueError(f"these roles have no {role}, so no {what}: they hold {sorted(self.heads)}")
        return self.heads[role]

    @torch.no_grad()
    def generate(self, inputs: Inputs, samples: int, sampling: Sampling) -> Responses:
        return self._ask("policy", _draw, inputs, samples, sampling)  # type: ignore[no-any-return]

    def gather_policy(self, keep: bool) -> None:
        """Nothing to do: its weights are whole on every rank."""

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self._trainable()["policy"].values())

    def critic_parameters(self, which: Which) -> list[nn.Parameter]:
        self._head(f"{which}_critic", "parameters")
        return list(self._trainable()[f"{which}_critic"].values())

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for role, parameters in self._trainable().items():
            yield from ((f"{role}.{name}", p) for name, p in parameters.items())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: held(p) for name, p in self._named()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        mine = dict(self._named())
        missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        if missing or extra:
            raise ValueError(f"the state does not fit these roles: missing {missing[:3]}, unexpected {extra[:3]}")
        for name, parameter in mine.items():
            if shape_of(parameter) != state[name].shape:
                theirs, ours = tuple(state[name].shape), tuple(shape_of(parameter))
                raise ValueError(f"{name}: shape {theirs} in the state, {ours} here")
            overwrite(parameter, state[name])


def _draw(roles: RoleBase, model: Any, head: None, inputs: Inputs, samples: int, sampling: Sampling) -> Responses:
    with roles._precision(model):
        return TransformersEngine(model, roles.encoder, roles.cache).generate(inputs, samples, sampling)


def _states(roles: RoleBase, model: Any, inputs: Inputs, responses: Responses) -> Tensor:
    with roles._precision(model):
        return response_states(model, inputs, responses, one_forward=roles.sharded and torch.is_grad_enabled())


def _logps(
    roles: RoleBase, model: Any, head: None, inputs: Inputs, responses: Responses, chunk_size: int, temperature: float
) -> Tensor:
    output, suppress = output_head(model), roles.encoder.placeholder_ids
    hidden = _states(roles, model, inputs, responses)[:, :-1]
    ids, mask = responses.ids.to(hidden.device), responses.mask.to(hidden.device)
    with roles._precision(model):
        return token_logps(hidden, output, ids, chunk_size, suppress, temperature, mask)


def _last_value(roles: RoleBase, model: Any, head: nn.Linear, inputs: Inputs, responses: Responses) -> Tensor:
    states = _states(roles, model, inputs, responses)
    return head(last_state(states, inputs, responses)).squeeze(-1)  # type: ignore[no-any-return]


def _values(roles: RoleBase, model: Any, head: nn.Linear, inputs: Inputs, responses: Responses) -> Tensor:
    return head(_states(roles, model, inputs, responses)[:, :-1].float()).squeeze(-1)  # type: ignore[no-any-return]


def pick_head(heads: Mapping[str, Any] | nn.ModuleDict, role: str, where: Any) -> str:
    """The head that serves a role: the one of its name, else the only one there is."""
    which = role.removesuffix("_critic")
    if which in heads or len(heads) == 1:
        return which if which in heads else next(iter(heads))
    raise ValueError(f"{where}: no head {which!r} among {sorted(heads)}, so it is unclear which one to use")

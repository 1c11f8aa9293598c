"""Policy, reference, reward, cost and two critics, on one backbone (`AdapterRoles`) or on six (`SeparateRoles`).

Shapes: N prompts, B rows, P prompt length, R response length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from safe_rlhf_v.distributed.sharded import ShardedModel
from safe_rlhf_v.generation.base import Sampling
from safe_rlhf_v.roles.adapters import AdapterRoles
from safe_rlhf_v.roles.base import Speaker, Which
from safe_rlhf_v.roles.separate import SeparateRoles
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.processing import Encoder

__all__ = ["AdapterRoles", "Roles", "SeparateRoles", "Speaker", "Which"]


class Roles(Protocol):
    """What the online trainers ask of models, whoever holds them."""

    encoder: Encoder

    def prepare(self, inputs: Inputs) -> Inputs:
        """Encode the pictures once; everything below accepts the result, and faster."""
        ...

    def reads_once(self, inputs: Inputs) -> bool:
        """Whether a pass reads a prompt that its rows share once, with gradients as without."""
        ...

    def logps(
        self, inputs: Inputs, responses: Responses, role: Speaker = "policy", *, temperature: float = 1.0
    ) -> Tensor:
        """(B, R) float32 log-probabilities of the response tokens, without the placeholders that sampling leaves out.

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

    @property
    def sharded_models(self) -> Mapping[str, ShardedModel]:
        """Role to model where weights are spread over the ranks, so that every forward is a collective call; else {}.
        """
        ...

    def gather_policy(self, keep: bool) -> None:
        """Before `save_policy` on one rank, on every rank: make sharded weights whole. keep: on the rank that saves."""
        ...

    def save_policy(self, folder: str | Path) -> None:
        """Write the policy and its processor where `load_backbone` finds it again."""
        ...

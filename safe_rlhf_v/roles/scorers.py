"""Where rewards and costs come from: the reward and cost model, or any function of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from beavertails_v.schema import Prompt
from safe_rlhf_v.roles.protocol import Roles
from safe_rlhf_v.types import Inputs, Responses


class Scorer(Protocol):
    """Scores B responses, one prompt a row. Returns rewards (B,) and costs (B,) float32; cost > 0 is unsafe."""

    def __call__(self, prompts: Sequence[Prompt], inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class ModelScorer:
    """The reward and the cost model of the roles: the default."""

    roles: Roles

    def __call__(self, prompts: Sequence[Prompt], inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        return self.roles.scores(inputs, responses)


@dataclass(frozen=True, slots=True)
class TextScorer:
    """A function of prompt and decoded text, such as a rule, an oracle or a remote judge.

    rate(prompt, text) -> (reward, cost); decode: the encoder's, tokens to texts.
    """

    rate: Callable[[Prompt, str], tuple[float, float]]
    decode: Callable[[Responses], list[str]]

    def __call__(self, prompts: Sequence[Prompt], inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        rated = [self.rate(prompt, text) for prompt, text in zip(prompts, self.decode(responses), strict=True)]
        scores = torch.tensor(rated, dtype=torch.float32, device=responses.ids.device)  # (B, 2)
        return scores[:, 0], scores[:, 1]

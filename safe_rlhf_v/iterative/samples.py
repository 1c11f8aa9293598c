"""Samples of a policy with what a reward and a cost source, policy and reference say of them, kept in a file.

Shapes: N prompts, G samples a prompt, B = N*G rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed

from beavertails_v.schema import Prompt
from safe_rlhf_v.algorithms.can import preference_scores
from safe_rlhf_v.files import replacing
from safe_rlhf_v.generation.base import Sampling
from safe_rlhf_v.online.rollout import Passes, sample
from safe_rlhf_v.roles.protocol import Roles, SeparateRoles, Speaker
from safe_rlhf_v.roles.scorers import Scorer
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.weights import read_torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """rewards, costs, log_ratios (N, G) float32, the last the sum over tokens of log pi - log ref; ended (N, G) bool:
    the response ends by itself, not by max_new_tokens; texts: N lists of G.
    """

    rewards: Tensor
    costs: Tensor
    log_ratios: Tensor
    ended: Tensor
    texts: list[list[str]]


@torch.no_grad()
def draw(
    roles: Roles,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    samples: int,
    *,
    max_new_tokens: int,
    rows_at_once: int,
    seed: int,
    device: torch.device | str,
) -> Sampled:
    """`samples` responses of the policy to each prompt, at temperature 1, the policy's own distribution.

    rows_at_once: rows generated and looked at together, but at least one prompt's. Sets every generator's seed first.
    """
    set_seed(seed)
    sampling, step = Sampling(max_new_tokens=max_new_tokens, temperature=1.0), max(1, rows_at_once // samples)
    parts = []
    for start in range(0, len(prompts), step):
        some = prompts[start : start + step]
        drawn = sample(roles, scorer, some, sampling, samples, device=device, passes=Passes.bounded(rows_at_once))
        mask, rows = drawn.responses.mask, range(len(drawn.responses))
        ratios = []
        for part in (list(rows[i : i + rows_at_once]) for i in range(0, len(rows), rows_at_once)):
            look = (drawn.inputs.select(part), drawn.responses.select(part))
            ratio = roles.logps(*look, "policy") - roles.logps(*look, "reference")
            ratios.append(ratio.masked_fill(~mask[part], 0.0).sum(1))
        last = drawn.responses.ids.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
        shape = lambda x: x.cpu().view(-1, samples)  # noqa: E731
        texts = roles.encoder.decode(drawn.responses)
        parts.append(
            Sampled(
                rewards=shape(drawn.rewards),
                costs=shape(drawn.costs),
                log_ratios=shape(torch.cat(ratios)),
                ended=shape(last == roles.encoder.eos_id),
                texts=[texts[i : i + samples] for i in range(0, len(texts), samples)],
            )
        )
    joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in Sampled.__slots__ if name != "texts"}
    return Sampled(**joined, texts=[row for p in parts for row in p.texts])


def kept(path: Path, make: Callable[[], Sampled]) -> Sampled:
    """What the file holds, or else what `make` gives, written there whole or not at all."""
    if not path.is_file():
        made = asdict(make())
        with replacing(path) as beside:
            torch.save(made, beside)
    return Sampled(**read_torch(path))


@dataclass(frozen=True, slots=True)
class PreferenceScorer:
    """beta log(pi_r/ref) as reward and -beta log(pi_g/ref) as cost: PeCAN's stand-ins, arXiv 2405.19544.

    helpful, safe: roles whose policies are pi_r (DPO on helpfulness) and pi_g (DPO on safety), both beside ref. A cost
    is no longer above 0 where a response is unsafe; only its differences mean something.
    """

    helpful: SeparateRoles
    safe: SeparateRoles
    beta: float

    def __call__(self, prompts: Sequence[Prompt], inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        reference = self._logps(self.helpful, inputs, responses, "reference")
        helpful, safe = (self._logps(roles, inputs, responses, "policy") for roles in (self.helpful, self.safe))
        rewards, gains = preference_scores(helpful, safe, reference, self.beta)
        return rewards.float(), -gains.float()

    def _logps(self, roles: SeparateRoles, inputs: Inputs, responses: Responses, role: Speaker) -> Tensor:
        """(B,) float64: log-probability of each response."""
        own = roles.prepare(replace(inputs, features=None))  # another model's features may not be this one's
        logps = roles.logps(own, responses, role).double()
        return logps.masked_fill(~responses.mask, 0.0).sum(1)

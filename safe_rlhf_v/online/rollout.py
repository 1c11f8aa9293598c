"""One batch of experience. N prompts, G samples a prompt, B = N*G rows, R response length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from beavertails_v.schema import Prompt
from safe_rlhf_v.generation.base import Engine, Sampling
from safe_rlhf_v.online.micro_batches import MicroBatches, RowSizes, by_parts, stitch, trim, truncate
from safe_rlhf_v.random_state import load_rng_state, rng_state
from safe_rlhf_v.roles.protocol import Roles
from safe_rlhf_v.roles.scorers import Scorer
from safe_rlhf_v.tensors import masked_mean
from safe_rlhf_v.types import Advantages, Inputs, Responses, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Responses with their scores. inputs, responses: B rows; rewards, costs: (B,) float32."""

    inputs: Inputs
    responses: Responses
    rewards: Tensor
    costs: Tensor


@dataclass(slots=True, kw_only=True)
class Passes:
    """How the work of a rollout is spread: `looks` over forward passes on B rows, `draws` over N prompts answered."""

    looks: MicroBatches
    draws: MicroBatches

    @classmethod
    def bounded(cls, rows: int | None = None, tokens: int | None = None, fixed: bool = False) -> Passes:
        """looks of at most so many rows and tokens; all prompts are answered together while memory allows, or, where
        `fixed`, always."""
        return cls(looks=MicroBatches(rows=rows, tokens=tokens, fixed=fixed), draws=MicroBatches(fixed=fixed))

    @property
    def halved(self) -> tuple[int | None, int | None]:
        """The bounds that running out of memory has led to: what a resumed run must know to add up the same sums."""
        return self.looks.halved, self.draws.halved

    @halved.setter
    def halved(self, bounds: tuple[int | None, int | None]) -> None:
        self.looks.halved, self.draws.halved = bounds


@torch.no_grad()
def sample(
    roles: Roles,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    *,
    device: torch.device | str,
    passes: Passes | None = None,
    engine: Engine | None = None,
) -> Samples:
    """`samples` scored responses of the policy to each of N prompts.

    Pictures are encoded once, for N prompts; generation and all later forwards share the features. engine: draws the
    responses; None lets the roles do so. Raises ValueError when the scorer's answer is not one reward and one cost a
    row.
    """
    passes = passes or Passes.bounded()

    def generate(inputs: Inputs, prompts: Sequence[Prompt]) -> Responses:
        if engine is None:
            return roles.generate(inputs, samples, sampling)
        return engine.generate(inputs, samples, sampling, prompts).to(device)

    inputs = roles.prepare(roles.encoder.prompts(prompts).to(device))  # N rows
    pad_id = roles.encoder.pad_id
    responses = _generate(generate, prompts, inputs, sampling.max_new_tokens, pad_id, passes.draws)  # B rows
    inputs = inputs.repeat(samples)

    def score(rows: list[int], inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        return scorer([prompts[row // samples] for row in rows], inputs, responses)

    rewards, costs = by_parts(score, inputs, responses, passes.looks, roles.reads_once(inputs))
    if rewards.shape != (len(responses),) or costs.shape != (len(responses),):
        shapes = f"rewards {tuple(rewards.shape)} and costs {tuple(costs.shape)}"
        raise ValueError(f"the scorer returned {shapes}; both must be ({len(responses)},), one a response")
    return Samples(inputs=inputs, responses=responses, rewards=rewards.float(), costs=costs.float())


def _generate(
    generate: Callable[[Inputs, Sequence[Prompt]], Responses],
    prompts: Sequence[Prompt],
    inputs: Inputs,
    longest: int,
    pad_id: int,
    draws: MicroBatches,
) -> Responses:
    """Responses (B, R) to all prompts; in parts, with the generators put back, once memory has run out.

    longest: tokens a response may have.
    """
    before = rng_state()

    def work(parts: list[list[int]]) -> Responses:
        load_rng_state(before)
        if len(parts) == 1:
            return generate(inputs, prompts)
        drawn = [generate(inputs.select(part), [prompts[i] for i in part]) for part in parts]
        samples = len(drawn[0]) // len(parts[0])
        rows = [[i * samples + g for i in part for g in range(samples)] for part in parts]
        width = max(d.ids.shape[1] for d in drawn)
        ids = stitch(rows, [d.ids for d in drawn], width, pad_id)
        return Responses(ids=ids, mask=stitch(rows, [d.mask for d in drawn], width))

    lengths = inputs.attention_mask.sum(1).tolist()
    return draws.run(RowSizes(prompts=lengths, responses=[longest] * len(lengths), prompt_of=range(len(lengths))), work)


@torch.no_grad()
def collect(
    roles: Roles,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    *,
    critics: bool,
    device: torch.device | str,
    passes: Passes | None = None,
    engine: Engine | None = None,
) -> Rollout:
    """Sample responses, and look at them as policy, as reference and, if wanted, as both critics."""
    passes = passes or Passes.bounded()
    drawn = sample(roles, scorer, prompts, sampling, samples, device=device, passes=passes, engine=engine)
    read_once = roles.reads_once(drawn.inputs)

    def look(how: Callable[..., Tensor], what: str, **options: float) -> Tensor:
        see = lambda rows, inputs, responses: how(inputs, responses, what, **options)  # noqa: E731
        return by_parts(see, drawn.inputs, drawn.responses, passes.looks, read_once)  # type: ignore[no-any-return]

    return Rollout(
        prompts=drawn.inputs,
        responses=drawn.responses,
        logps=look(roles.logps, "policy", temperature=sampling.temperature),
        ref_logps=look(roles.logps, "reference", temperature=sampling.temperature),
        rewards=drawn.rewards,
        costs=drawn.costs,
        reward_values=look(roles.values, "reward") if critics else None,
        cost_values=look(roles.values, "cost") if critics else None,
        group_size=samples,
    )


def minibatch(rollout: Rollout, advantages: Advantages, rows: Sequence[int]) -> tuple[Rollout, Advantages]:
    """The given rows of both, without the columns that are pads in every one of them."""
    rollout, advantages = rollout.select(rows), advantages.select(rows)
    prompts, responses = trim(rollout.prompts, rollout.responses)
    width = responses.ids.shape[1]
    return truncate(replace(rollout, prompts=prompts, responses=responses), width), truncate(advantages, width)


def statistics(rollout: Rollout) -> dict[str, float]:
    """What to log of a rollout. kl: mean over responses of the sum over tokens of log pi - log ref, in nats.

    entropy: mean over tokens of -log pi, an unbiased estimate for samples at temperature 1.
    """
    mask = rollout.responses.mask
    log_ratio = (rollout.logps - rollout.ref_logps).masked_fill(~mask, 0.0)  # (B, R)
    return {
        "kl": log_ratio.sum(1).mean().item(),
        "entropy": -masked_mean(rollout.logps, mask).item(),
        "response_length": mask.sum(1).float().mean().item(),
    }

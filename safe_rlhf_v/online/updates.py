"""Minibatch updates of the policy and the two critics. B rows of a rollout, R response length."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from beavertails_v.schema import Prompt
from safe_rlhf_v.algorithms.protocol import OnlineAlgorithm
from safe_rlhf_v.config_io import SettingsError
from safe_rlhf_v.distributed.fsdp2 import optimizer_part
from safe_rlhf_v.distributed.sharded import ShardedModel
from safe_rlhf_v.losses import clipped_value_loss, token_cross_entropy
from safe_rlhf_v.online.arguments import OnlineArguments
from safe_rlhf_v.online.micro_batches import MicroBatches, sizes_of, trim
from safe_rlhf_v.online.rollout import minibatch
from safe_rlhf_v.roles.protocol import Roles, Which
from safe_rlhf_v.training.runtime import Averages, NotFinite, ShuffledIndices, average_gradients
from safe_rlhf_v.types import Advantages, Rollout

BITSANDBYTES = {
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}


def adamw(name: str) -> Callable[..., torch.optim.Optimizer]:
    """AdamW by its name in transformers. Raises SettingsError for another name, or where bitsandbytes is missing."""
    if name in ("adamw_torch", "adamw_torch_fused"):
        return partial(torch.optim.AdamW, fused=True if name == "adamw_torch_fused" else None)
    if name not in BITSANDBYTES:
        known = ", ".join(("adamw_torch", "adamw_torch_fused", *BITSANDBYTES))
        raise SettingsError(f"optim: {name!r} should be one of {known}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError(f"optim: {name!r} needs bitsandbytes: pip install bitsandbytes, or take adamw_torch")
    import bitsandbytes

    return getattr(bitsandbytes.optim, BITSANDBYTES[name])  # type: ignore[no-any-return]


class PlainStepping:
    """Gradients averaged over the ranks, clipped and stepped on: of whole weights, and of those that FSDP2 shards."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float
    ) -> None:
        self.optimizer, self.parameters, self.max_grad_norm = optimizer, list(parameters), max_grad_norm

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, accelerator: Accelerator, loss: Tensor) -> None:
        accelerator.backward(loss)

    def step(self, accelerator: Accelerator, refuse: Callable[[float], None]) -> float:
        """Where `refuse` raises, the parameters stay as they were."""
        average_gradients(accelerator, self.parameters)
        total = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
        refuse(norm)
        self.optimizer.step()
        self.zero_grad()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(optimizer_part(state, self.parameters))


class Trained:
    """The parameters of one network with their AdamW and learning-rate schedule, whose step is a rollout.

    sharded: the model whose parameters they are, where its weights are spread over the ranks.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        args: OnlineArguments,
        learning_rate: float,
        weight_decay: float = 0.0,
        sharded: ShardedModel | None = None,
    ) -> None:
        self.name, self.parameters = name, list(parameters)
        betas = (0.9, 0.95)  # [code] of Safe RLHF
        options: dict[str, Any] = dict(lr=learning_rate, betas=betas, weight_decay=weight_decay)
        self.optimizer = adamw(args.optim)(self.parameters, **options)
        self.scheduler = get_scheduler(args.lr_scheduler_type, self.optimizer, args.warmup_steps, args.max_steps)
        how = (self.optimizer, self.parameters, args.max_grad_norm)
        self.stepping = (sharded and sharded.stepping(*how)) or PlainStepping(*how)

    def step(self, accelerator: Accelerator, rollout: int) -> float:
        """One optimizer step on what the gradients have gathered; returns their norm before clipping.

        Raises NotFinite naming the rollout when the norm is not finite.
        """

        def refuse(norm: float) -> None:
            if not math.isfinite(norm):
                raise NotFinite(
                    f"step {rollout}: the norm of the {self.name} gradient is {norm}; lower its learning rate, or load "
                    "the models in a wider dtype, and resume from the last checkpoint"
                )

        return self.stepping.step(accelerator, refuse)

    def zero_grad(self) -> None:
        self.stepping.zero_grad()

    def backward(self, accelerator: Accelerator, loss: Tensor) -> None:
        """Add the gradient of a loss to what was gathered since `zero_grad`."""
        self.stepping.backward(accelerator, loss)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """As of one process, but for tensors that `whole_tree` makes whole."""
        return {"optimizer": self.stepping.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stepping.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def trained_networks(roles: Roles, args: OnlineArguments, critics: bool) -> dict[str, Trained]:
    """The policy and, if wanted, the two critics, by the names their losses are logged under."""
    rates = args.learning_rate, args.weight_decay
    policy = Trained("policy", roles.policy_parameters(), args, *rates, roles.sharded_models.get("policy"))
    networks = [policy]
    for which in ("reward", "cost") if critics else ():
        parameters, sharded = roles.critic_parameters(which), roles.sharded_models.get(f"{which}_critic")
        networks.append(Trained(f"{which}_value", parameters, args, args.critic_learning_rate, sharded=sharded))
    return {network.name: network for network in networks}


class Demonstrations:
    """(prompt, response) pairs whose cross-entropy is added to the policy's loss, so that it does not unlearn them."""

    def __init__(self, pairs: Sequence[tuple[Prompt, str]], coefficient: float, seed: int) -> None:
        self.pairs, self.coefficient = pairs, coefficient
        self.indices = ShuffledIndices(len(pairs), seed)

    def draw(self, count: int, accelerator: Accelerator) -> list[tuple[Prompt, str]]:
        """This rank's `count` pairs of the next count * ranks."""
        drawn = self.indices.take(count * accelerator.num_processes)
        return [self.pairs[i] for i in drawn[accelerator.process_index :: accelerator.num_processes]]


class Updater:
    """Takes a rollout and its advantages through num_ppo_epochs passes of minibatches.

    The gradient of a minibatch does not depend on how it is cut into micro-batches: each counts by its share of rows.
    So when memory runs out it is gathered anew from smaller ones.
    """

    def __init__(
        self,
        roles: Roles,
        algorithm: OnlineAlgorithm,
        trained: Mapping[str, Trained],
        accelerator: Accelerator,
        args: OnlineArguments,
        demonstrations: Demonstrations | None,
        batches: MicroBatches,
    ) -> None:
        self.roles, self.algorithm, self.trained, self.accelerator = roles, algorithm, trained, accelerator
        self.args, self.demonstrations, self.batches = args, demonstrations, batches

    def update(self, rollout: Rollout, advantages: Advantages, step: int) -> dict[str, float]:
        """Change policy and critics; returns losses and norms, averaged over the minibatches."""
        averages = Averages()
        for _ in range(self.args.num_ppo_epochs):
            for rows in shuffled(len(rollout), rollout.group_size).split(self.args.mini_batch_size):
                part = minibatch(rollout, advantages, rows.tolist())
                for name, trained in self.trained.items():
                    drawn = self.demonstrations if name == "policy" else None
                    shown = drawn.draw(len(rows), self.accelerator) if drawn else []
                    averages.merge(self._gather(name, *part, shown))
                    averages.add({f"{name}_grad_norm": trained.step(self.accelerator, step)})
        for trained in self.trained.values():
            trained.scheduler.step()
        return averages.means()

    def _gather(
        self, name: str, rollout: Rollout, advantages: Advantages, shown: Sequence[tuple[Prompt, str]]
    ) -> Averages:
        """Gather the gradient of one network on a minibatch and on demonstrations, from nothing."""
        filled = rollout.responses.mask.any(1)  # (b,): rows that have tokens, those that `masked_mean` counts
        total = max(1, int(filled.sum()))

        def work(parts: list[list[int]]) -> Averages:
            self.trained[name].zero_grad()
            averages = Averages()
            for rows in parts:
                weight = int(filled[rows].sum()) / total
                part = (rollout, advantages) if len(parts) == 1 else minibatch(rollout, advantages, rows)
                loss, metrics = self._loss(name, *part)
                self.trained[name].backward(self.accelerator, loss * weight)
                averages.add({f"{name}_loss": loss.item(), **metrics}, weight)
            if shown:
                averages.add({"ptx_loss": self._imitate(shown)})
            return averages

        read_once = self.roles.reads_once(rollout.prompts)
        return self.batches.run(sizes_of(rollout.prompts, rollout.responses, read_once), work)

    def _loss(self, name: str, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        if name == "policy":
            logps = self.roles.logps(rollout.prompts, rollout.responses, "policy", temperature=self.args.temperature)
            return self.algorithm.policy_loss(logps, rollout, advantages)
        which: Which = "reward" if name == "reward_value" else "cost"
        old = rollout.reward_values if which == "reward" else rollout.cost_values
        returns = advantages.reward_returns if which == "reward" else advantages.cost_returns
        if old is None or returns is None:
            raise ValueError(f"the rollout holds no {which} values, or the algorithm gave no {which} returns")
        assert self.algorithm.critics is not None
        values = self.roles.values(rollout.prompts, rollout.responses, which)
        return clipped_value_loss(values, old, returns, rollout.responses.mask, self.algorithm.critics.value_clip), {}

    def _imitate(self, shown: Sequence[tuple[Prompt, str]]) -> float:
        """Add the gradient of coefficient * cross-entropy on the demonstrations; returns the cross-entropy."""
        assert self.demonstrations is not None
        encoder, device = self.roles.encoder, self.accelerator.device
        inputs = self.roles.prepare(encoder.prompts([prompt for prompt, _ in shown]).to(device))
        responses = encoder.responses([text for _, text in shown]).to(device)
        total = 0.0
        for rows in self.batches.plan(sizes_of(inputs, responses, self.roles.reads_once(inputs))):
            part, said = trim(inputs.select(rows), responses.select(rows))
            loss = token_cross_entropy(self.roles.logps(part, said), said.mask) * (len(rows) / len(shown))
            self.trained["policy"].backward(self.accelerator, self.demonstrations.coefficient * loss)
            total += loss.item()
        return total


def shuffled(rows: int, group_size: int) -> Tensor:
    """A random order of rows (B,) in which those of a prompt stay together, so that a pass reads it once."""
    return (torch.randperm(rows // group_size)[:, None] * group_size + torch.arange(group_size)).flatten()

"""The online loop. It knows rollouts, a multiplier and minibatches, and not which algorithm it runs.

    repeat:  roll out  ->  move the multiplier ONCE, on the costs of all ranks  ->  advantages
             ->  minibatch updates of policy and critics  ->  log, save

A killed run resumes from its newest checkpoint and ends bit for bit where the unbroken run would have ended.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm.auto import tqdm

from beavertails_v.schema import Prompt
from safe_rlhf_v.algorithms.protocol import OnlineAlgorithm
from safe_rlhf_v.config_io import SettingsError, flatten
from safe_rlhf_v.constraint import Constraint
from safe_rlhf_v.cost_measures import MEAN
from safe_rlhf_v.distributed.fsdp2 import whole_tree
from safe_rlhf_v.generation.base import Engine, Sampling
from safe_rlhf_v.online.arguments import MAY_DIFFER, OnlineArguments
from safe_rlhf_v.online.guidance import describe, summary, threshold_guidance
from safe_rlhf_v.online.rollout import Passes, collect, sample, statistics
from safe_rlhf_v.online.updates import Demonstrations, Updater, trained_networks
from safe_rlhf_v.random_state import load_rng_state, rng_state
from safe_rlhf_v.roles.protocol import Roles
from safe_rlhf_v.roles.scorers import ModelScorer, Scorer
from safe_rlhf_v.training import checkpoint
from safe_rlhf_v.training.records import TimeLeft
from safe_rlhf_v.training.runtime import (
    MetricsLog,
    NotFinite,
    ShuffledIndices,
    fingerprint,
    named,
    read_metrics,
)
from safe_rlhf_v.types import Rollout

__all__ = ["OnlineArguments", "OnlineResult", "OnlineTrainer"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineResult:
    """steps: rollouts done; policy_dir: where the trained policy was saved; metrics: the rows of metrics.jsonl."""

    steps: int
    policy_dir: Path
    metrics: list[dict[str, Any]]


class OnlineTrainer:
    """Trains the policy of `roles` on `prompts` with an online algorithm and a constraint.

    constraint: as `algorithm.constraint` makes one, for this run alone. scorer: where rewards and costs come from; None
    takes the reward and cost model of the roles. demonstrations: (prompt, response) pairs for the ptx term, or None.
    accelerator: None makes one. engine: what draws the responses; None lets the roles do so.

    Writes to output_dir: metrics.jsonl (a line a step), threshold.json, checkpoint-<step>/, policy/, and runs/ for
    trackers that write files.
    """

    def __init__(
        self,
        roles: Roles,
        algorithm: OnlineAlgorithm,
        constraint: Constraint,
        prompts: Sequence[Prompt],
        args: OnlineArguments,
        scorer: Scorer | None = None,
        demonstrations: Sequence[tuple[Prompt, str]] | None = None,
        accelerator: Accelerator | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.roles, self.algorithm, self.constraint = roles, algorithm, constraint
        self.prompts, self.args = prompts, args
        self.scorer: Scorer = scorer if scorer is not None else ModelScorer(roles)
        self.engine = engine
        self.output_dir = Path(args.output_dir)
        trackers = list(args.report_to) or None
        self.accelerator = accelerator or Accelerator(log_with=trackers, project_dir=str(self.output_dir / "runs"))
        self.sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
        self.indices = ShuffledIndices(len(prompts), args.seed)
        self.demonstrations = None
        if demonstrations and args.ptx_coeff:
            self.demonstrations = Demonstrations(demonstrations, args.ptx_coeff, args.seed + 1)
        sharded = bool(roles.sharded_models)
        if sharded:
            _refuse_under_sharding(args)
        self.trained = trained_networks(roles, args, algorithm.critics is not None)
        bounds = args.per_device_micro_batch_size, args.per_device_micro_batch_tokens
        self.passes = Passes.bounded(*bounds, fixed=sharded)
        self.updater = Updater(
            roles, algorithm, self.trained, self.accelerator, args, self.demonstrations, self.passes.looks
        )
        self.step = 0

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> OnlineResult:
        """Run to max_steps and save the policy to output_dir/policy.

        resume_from_checkpoint: a checkpoint folder; True or "auto" for the newest one of output_dir, or the beginning
        where there is none; None starts anew.
        Raises CheckpointError when output_dir holds checkpoints a new run would mix with, or when a resumed run's
        settings differ from the checkpoint's; FloatingPointError naming the step for a NaN.
        """
        self._start(resume_from_checkpoint)
        metrics_log = MetricsLog(self.output_dir / "metrics.jsonl", self.step) if self._is_main else None
        self.left = TimeLeft(self.step)
        bar = tqdm(total=self.args.max_steps, initial=self.step, desc="policy", unit="rollout", disable=self._no_bar)
        while self.step < self.args.max_steps:
            started = time.perf_counter()
            self.log(self.advance(), started, metrics_log, bar)
            if self.step % self.args.save_steps == 0 or self.step == self.args.max_steps:
                self.save()
        bar.close()
        return self._finish()

    def advance(self) -> dict[str, float]:
        """One rollout, one step of the multiplier, and the updates; returns what is logged of them."""
        self.step += 1
        rollout = self.collect()
        rewards, costs = self.scores_of_all_ranks(rollout)
        multiplier, violation = self.constraint.observe(costs.view(-1, self.args.num_generations))
        measured = replace(rollout, costs=self.constraint.measured(rollout.costs))
        advantages = self.algorithm.advantages(measured, multiplier, violation)
        losses = self.updater.update(rollout, advantages, self.step)
        scores = {"reward": rewards.mean().item(), "cost": costs.mean().item(), "violation": violation}
        scores["unsafe_share"] = (costs > 0).float().mean().item()
        return scores | self._means_of_all_ranks(losses | statistics(rollout))

    def collect(self) -> Rollout:
        """The next prompts of this rank, answered by the policy and looked at by every role."""
        return collect(
            self.roles, self.scorer, self._next_prompts(self.indices), self.sampling, self.args.num_generations,
            critics=self.algorithm.critics is not None, device=self.accelerator.device, passes=self.passes,
            engine=self.engine,
        )  # fmt: skip

    def scores_of_all_ranks(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Rewards and costs of every rank, each (n,). Raises FloatingPointError naming the step for a NaN."""
        rewards, costs = self.accelerator.gather(torch.stack([rollout.rewards, rollout.costs], dim=1)).T.cpu()
        for name, scores in (("rewards", rewards), ("costs", costs)):
            if not bool(scores.isfinite().all()):
                raise NotFinite(
                    f"step {self.step}: {int((~scores.isfinite()).sum())} of {len(scores)} {name} are not finite; look "
                    f"at the {name[:-1]} model or the scorer, and resume from the last checkpoint"
                )
        return rewards, costs

    def log(self, numbers: dict[str, float], started: float, metrics_log: MetricsLog | None, bar: Any) -> None:
        """A line of metrics.jsonl each step; trackers and console every logging_steps."""
        metrics = {"step": self.step, "multiplier": self.constraint.multiplier, **numbers}
        metrics["learning_rate"] = self.trained["policy"].learning_rate
        metrics["seconds"] = round(time.perf_counter() - started, 3)
        if metrics_log is not None:
            metrics_log.write(metrics)
        bar.update(1)
        if self.step % self.args.logging_steps == 0:
            self.accelerator.log({name: value for name, value in metrics.items() if name != "step"}, step=self.step)
            shown = {name: f"{metrics[name]:.3g}" for name in ("reward", "cost", "multiplier", "kl")}
            bar.set_postfix(shown)
            if bar.disable and self._talks:
                print(self.left.line(self.step, self.args.max_steps, shown), flush=True)

    def save(self) -> None:
        """Write checkpoint-<step>: everything the next steps depend on. Whole, or not there at all."""
        generators, halved = gather_object([rng_state()]), gather_object([self.passes.halved])
        optimizers = {name: trained.state_dict() for name, trained in self.trained.items()}
        trainable, optimizers = whole_tree([self.roles.state_dict(), optimizers], keep=self._is_main)
        if self._is_main:
            state = {
                "step": self.step,
                **self.constraint.state_dict(),
                "prompts": self.indices.state_dict(),
                "demonstrations": self.demonstrations.indices.state_dict() if self.demonstrations else None,
                "halved": halved,
                "settings": self._settings(),
            }
            contents = checkpoint.Contents(trainable=trainable, optimizers=optimizers, rng=generators, state=state)
            with checkpoint.atomic_directory(checkpoint.checkpoint_path(self.output_dir, self.step)) as folder:
                checkpoint.write(folder, contents)
            checkpoint.prune(self.output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Take up everything `save` wrote. Raises CheckpointError naming the settings that differ."""
        contents = checkpoint.read(folder)
        state = contents.state
        checkpoint.refuse_changes(self._as_now(state["settings"]), self._settings(), MAY_DIFFER)
        self.roles.load_state_dict(contents.trainable)
        for name, trained in self.trained.items():
            trained.load_state_dict(contents.optimizers[name])
        self.step = state["step"]
        self.constraint.load_state_dict({"observations": self.step, **state})
        self.indices.load_state_dict(state["prompts"])
        if self.demonstrations:
            self.demonstrations.indices.load_state_dict(state["demonstrations"])
        halved = state["halved"]  # of each rank; other ranks take the smallest of all
        same = len(halved) == self.accelerator.num_processes
        self.passes.halved = tuple(halved[self.accelerator.process_index] if same else _smallest(halved))
        self._take_up_generators(contents.rng)

    def _take_up_generators(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Those of this rank; with another number of processes there are none, and new ones are seeded by the step."""
        if len(saved) == self.accelerator.num_processes:
            load_rng_state(saved[self.accelerator.process_index])
            return
        set_seed(self.args.seed + self.step, device_specific=True)
        if self._talks:
            print(f"{len(saved)} processes before, {self.accelerator.num_processes} now: samples are drawn anew")

    def show_guidance(self) -> None:
        """Costs of the start model against the threshold, to threshold.json and the console; changes nothing else."""
        before, indices = rng_state(), ShuffledIndices(len(self.prompts), self.args.seed)
        costs = [self._sample_costs(indices) for _ in range(self.args.guidance_rollouts)]
        load_rng_state(before)
        known = self.accelerator.gather(torch.cat(costs))
        bounded = self.constraint.statistic(known.view(-1, self.args.num_generations))
        guidance = threshold_guidance(known, self.constraint.threshold, bounded)
        if self._is_main:
            (self.output_dir / "threshold.json").write_text(json.dumps(guidance, indent=1), encoding="utf-8")
        if self._talks:
            print(describe(guidance), flush=True)

    def _sample_costs(self, indices: ShuffledIndices) -> Tensor:
        return sample(
            self.roles, self.scorer, self._next_prompts(indices), self.sampling, self.args.num_generations,
            device=self.accelerator.device, passes=self.passes,
            engine=self.engine,
        ).costs  # fmt: skip

    def _next_prompts(self, indices: ShuffledIndices) -> list[Prompt]:
        n, rank = self.args.per_device_train_batch_size, self.accelerator.process_index
        drawn = indices.take(n * self.accelerator.num_processes)[rank * n : (rank + 1) * n]
        return [self.prompts[i] for i in drawn]

    def _start(self, resume_from_checkpoint: bool | str | Path | None) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        wanted = newest = checkpoint.latest_checkpoint(self.output_dir)
        if resume_from_checkpoint is not True and resume_from_checkpoint != "auto":
            wanted = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        step = checkpoint.step_of(wanted) if wanted else 0
        if newest is not None and checkpoint.step_of(newest) > step:
            raise checkpoint.CheckpointError(
                f"{self.output_dir} holds {newest.name}, newer than where this run starts (step {step}); resume from "
                "it (resume_from_checkpoint=True), move it away, or choose another output_dir"
            )
        if wanted:
            self.load(wanted)
            if self._talks:
                print(f"resumed from {wanted} at step {self.step} of {self.args.max_steps}", flush=True)
        else:
            set_seed(self.args.seed, device_specific=True)
        self._start_trackers()
        if not wanted and self.args.guidance_rollouts:
            self.show_guidance()

    def _start_trackers(self) -> None:
        missing = set(self.args.report_to) - {str(getattr(x, "value", x)) for x in self.accelerator.log_with}
        if missing:
            raise SettingsError(
                f"policy.report_to: {sorted(missing)} cannot be used here; install the package or take it out"
            )
        if self.args.report_to:
            flat = flatten(json.loads(json.dumps(self._settings())))
            config = {name: value for name, value in flat.items() if isinstance(value, (int, float, str))}
            purge = {"tensorboard": {"purge_step": self.step + 1}}
            self.accelerator.init_trackers("policy", config=config, init_kwargs=purge)

    def _finish(self) -> OnlineResult:
        policy_dir, metrics = self.output_dir / "policy", read_metrics(self.output_dir / "metrics.jsonl")
        self.roles.gather_policy(keep=self._is_main)
        if self._is_main:
            with checkpoint.atomic_directory(policy_dir) as folder:
                self.roles.save_policy(folder)
        self.accelerator.wait_for_everyone()
        if self.args.report_to:
            self.accelerator.end_training()
        if self._talks and metrics:
            print(summary(metrics), flush=True)
        return OnlineResult(steps=self.step, policy_dir=policy_dir, metrics=metrics)

    def _means_of_all_ranks(self, numbers: dict[str, float]) -> dict[str, float]:
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(numbers, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must share with the run that wrote the checkpoint, but for MAY_DIFFER."""
        demonstrations = self.demonstrations.pairs if self.demonstrations else []
        return {
            "arguments": asdict(self.args),
            "algorithm": named(self.algorithm),
            "dual": named(self.constraint.dual),
            "measure": named(self.constraint.measure),
            "constraint": {name: getattr(self.constraint, name) for name in ("threshold", "window", "delay")},
            "scorer": getattr(self.scorer, "__qualname__", type(self.scorer).__qualname__),
            "prompts": {"number": len(self.prompts), "hash": fingerprint(p.text for p in self.prompts)},
            "demonstrations": {"number": len(demonstrations), "hash": fingerprint(text for _, text in demonstrations)},
            "rows": {
                "prompts a rollout": self.args.per_device_train_batch_size * self.accelerator.num_processes,
                "rows an optimizer step": self.args.mini_batch_size * self.accelerator.num_processes,
            },
        }

    def _as_now(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's settings; older ones hold no constraint, and the mean for an algorithm's own measure."""
        own = self.algorithm.constraint(self.constraint.dual).measure
        measure = named(own) if saved["measure"] == named(MEAN) else saved["measure"]
        return {"constraint": self._settings()["constraint"], **saved, "measure": measure}

    @property
    def _is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def _talks(self) -> bool:
        return self._is_main and not self.args.disable_tqdm

    @property
    def _no_bar(self) -> bool | None:
        return None if self._talks else True  # None: off unless a terminal


def _smallest(halved: Sequence[Sequence[int | None]]) -> list[int | None]:
    """Of each bound the smallest that any rank was led to, None where none was."""
    return [min((x for x in bounds if x is not None), default=None) for bounds in zip(*halved, strict=True)]


def _refuse_under_sharding(args: OnlineArguments) -> None:
    """Where weights are cut over ranks, each rank must make as many forwards, and torch's AdamW knows their parts."""
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise SettingsError(f"policy.optim {args.optim!r} does not know cut weights: use adamw_torch")
    if args.per_device_micro_batch_tokens:
        raise SettingsError(
            "policy.per_device_micro_batch_tokens lets ranks make unequal numbers of forwards, and cut models cannot: "
            "use per_device_micro_batch_size"
        )

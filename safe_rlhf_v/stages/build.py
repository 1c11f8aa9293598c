"""From settings to the objects a stage is made of."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_rlhf_v import duals
from safe_rlhf_v.config import DirectSection, EngineSection, ModelSection, PolicySection, Settings, SettingsError
from safe_rlhf_v.stages.models import device, one_process
from safe_rlhf_v.training.setup import Setup

if TYPE_CHECKING:
    from safe_rlhf_v.algorithms.protocol import OnlineAlgorithm
    from safe_rlhf_v.constraint import Constraint
    from safe_rlhf_v.cost_measures import CostMeasure
    from safe_rlhf_v.generation.base import Engine
    from safe_rlhf_v.generation.vllm_engine import Client
    from safe_rlhf_v.models.roles import Roles
    from safe_rlhf_v.training.online import OnlineArguments


def setup(settings: Settings) -> Setup:
    """What every training of a run shares."""
    return Setup(model=settings.model, data=settings.data, seed=settings.seed)


def dual(policy: PolicySection) -> duals.Dual:
    """The multiplier's rule; for an algorithm without a multiplier, one that stays at 0."""
    section = policy.dual
    if not algorithm_class(policy).has_multiplier:
        return duals.fixed(0.0)
    if section.kind == "fixed":
        return duals.fixed(section.initial)
    if section.kind == "pid":
        return duals.PIDDual(**section.pid.model_dump())
    rule: Any = {"log": duals.LogDual, "additive": duals.AdditiveDual, "augmented": duals.AugmentedDual}[section.kind]
    return rule(**{f.name: getattr(section, f.name) for f in fields(rule)})  # type: ignore[no-any-return]


def measure(policy: PolicySection) -> CostMeasure:
    """Of what the threshold is a bound."""
    from safe_rlhf_v.cost_measures import CVaR, HighConfidence, Mean

    section = policy.measure
    if section.kind == "high_confidence":
        return HighConfidence(kappa=section.kappa)
    return CVaR(alpha=section.alpha) if section.kind == "cvar" else Mean()


def algorithm_class(policy: PolicySection) -> Any:
    """The class of the algorithm that policy.algorithm names."""
    from safe_rlhf_v.algorithms.crpo import CRPO
    from safe_rlhf_v.algorithms.group_lag import GroupLag
    from safe_rlhf_v.algorithms.imitation import Imitation
    from safe_rlhf_v.algorithms.p3o import P3O
    from safe_rlhf_v.algorithms.ppo_lag import PPOLag
    from safe_rlhf_v.algorithms.repo import RePO
    from safe_rlhf_v.algorithms.rloo_lag import RLOOLag

    kinds: list[Any] = [PPOLag, GroupLag, RLOOLag, RePO, CRPO, P3O, Imitation]
    return {k.__module__.rpartition(".")[2]: k for k in kinds}[policy.algorithm]


def constraint(policy: PolicySection, threshold: float) -> Constraint:
    """That of the algorithm, with its multiplier's rule and its measure, for one run."""
    made = algorithm(policy, threshold)
    return made.constraint(dual(policy), measure(policy), policy.multiplier_patience)


def takes_threshold(policy: PolicySection) -> bool:
    """Whether policy.threshold bounds what the algorithm bounds; else it has a bound of its own, on every prompt."""
    return "threshold" in {f.name for f in fields(algorithm_class(policy))}


def needs_critics(policy: PolicySection) -> bool:
    """Whether the algorithm trains two critics."""
    return algorithm(policy, 0.0).critics is not None


def algorithm(policy: PolicySection, threshold: float) -> OnlineAlgorithm:
    """The algorithm with its own section, and the policy section's beta and threshold where it knows them."""
    kind = algorithm_class(policy)
    shared = {"beta": policy.beta, "threshold": threshold}
    known = {f.name for f in fields(kind)}
    return kind(**getattr(policy, policy.algorithm).model_dump(), **{k: v for k, v in shared.items() if k in known})  # type: ignore[no-any-return]


def direct_algorithm(direct: DirectSection, allow_contradictory: bool = False) -> Any:
    """The algorithm on pairs (or SACPO, which is two of them) with its own section and the direct section's beta."""
    from safe_rlhf_v.algorithms.bfpo import BFPO
    from safe_rlhf_v.algorithms.c_dpo import CDPO
    from safe_rlhf_v.algorithms.dpo import DPO
    from safe_rlhf_v.algorithms.kto import KTO
    from safe_rlhf_v.algorithms.mm_dpo import MMDPO
    from safe_rlhf_v.algorithms.sacpo import SACPO
    from safe_rlhf_v.algorithms.safe_dpo import SafeDPO

    kinds: list[Any] = [DPO, KTO, SACPO, SafeDPO, BFPO, CDPO, MMDPO]
    kind = {k.__module__.rpartition(".")[2]: k for k in kinds}[direct.algorithm]
    shared = {"beta": direct.beta, "allow_contradictory": allow_contradictory}
    known = {f.name for f in fields(kind)}
    own = getattr(direct, direct.algorithm).model_dump()
    return kind(**own, **{k: v for k, v in shared.items() if k in known})


def online_arguments(policy: PolicySection, output_dir: Path, seed: int) -> OnlineArguments:
    """The online loop's arguments: those of the policy section that it knows."""
    from safe_rlhf_v.training.online import OnlineArguments

    known = {f.name for f in fields(OnlineArguments)}
    values = policy.model_dump(include=known)
    return OnlineArguments(**values, output_dir=output_dir, seed=seed)


def roles(policy: PolicySection, model: ModelSection, start: str, reward: str, cost: str) -> Roles:
    """All six roles, on one backbone or on separate models."""
    from safe_rlhf_v.models.roles import AdapterRoles, SeparateRoles
    from safe_rlhf_v.models.sharding import launched_sharded, sharding_of_launch
    from safe_rlhf_v.models.zero3 import zero3_of_launch
    from safe_rlhf_v.training.supervised import lora_settings

    shared: dict[str, Any] = dict(
        critics=needs_critics(policy),
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        max_prompt_length=model.max_prompt_length,
        device=device(),
        bf16=policy.bf16,
        cache=policy.engine.cache,
        gradient_checkpointing=policy.gradient_checkpointing,
        torch_compile=policy.torch_compile,
        use_liger_kernel=policy.use_liger_kernel,
        vision_cache_bytes=policy.vision_cache_mb * 2**20,
    )
    if policy.roles == "separate":
        sharding = zero3_of_launch() or sharding_of_launch()
        return SeparateRoles.from_pretrained(start, reward, cost, sharding=sharding, **shared)
    if launched_sharded():
        raise SettingsError(
            "policy.roles = 'adapters' trains under DDP (configs/accelerate/ddp.yaml): only adapters take gradients, "
            "so there is little to cut. FSDP2 and ZeRO-3 need policy.roles: separate"
        )
    # without dropout, under which old and new log-probabilities would differ by chance
    adapters: dict[str, Any] = dict(lora=lora_settings(model, dropout=0.0), quantization=model.quantization)
    return AdapterRoles.from_pretrained(start, reward, cost, **adapters, **shared)


def engine(section: EngineSection, setup: Setup, start: str, roles: Roles, folder: Path) -> Engine | None:
    """What draws responses in rollouts; None where the roles do so. folder: where adapters are put for vLLM."""
    if section.kind == "transformers":
        return None
    from safe_rlhf_v.generation.transformers_engine import TransformersEngine
    from safe_rlhf_v.generation.vllm_engine import VLLMEngine, colocated
    from safe_rlhf_v.generation.vllm_server import VLLMServer
    from safe_rlhf_v.models.processes import process_state
    from safe_rlhf_v.models.roles import AdapterRoles

    assert isinstance(roles, AdapterRoles), "held by the settings"
    client: Client
    if section.url:
        client = VLLMServer(section.url)
    else:
        one_process("policy.engine.kind vllm without a url")
        limits = dict(gpu_memory_utilization=section.gpu_memory_utilization, max_model_len=section.max_model_len)
        shared: dict[str, Any] = dict(rank=setup.model.lora.r, dtype=setup.model.dtype, seed=setup.seed)
        client = colocated(start, **shared, **limits)  # type: ignore[arg-type]
    eos_ids = TransformersEngine(roles.backbone, roles.encoder).eos_ids
    own = folder / f"vllm-{process_state().process_index}"
    return VLLMEngine(client, roles.encoder, roles.save_policy_adapter, own, eos_ids)
